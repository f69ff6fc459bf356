"""The vocabulary of a GGUF file as a Hugging Face tokenizer that gives llama.cpp's token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.codecs.gguf.byte_level import split_pre_tokenizer
from lowbit.codecs.gguf.character_map import CharacterMap
from lowbit.codecs.gguf.metadata import Value
from lowbit.codecs.gguf.piece_merging import SPACE
from lowbit.codecs.gguf.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer
from lowbit.codecs.gguf.token_table import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from lowbit.codecs.gguf.wordpiece import CONTINUATION
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["tokenizer_from_gguf", "write_tokenizer"]

_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
    "cls": "cls",
}
"""Role in transformers to the stem of the key in GGUF."""


def tokenizer_from_gguf(metadata: Mapping[str, Value]) -> Any:
    """A :class:`transformers.PreTrainedTokenizerFast` made from ``tokenizer.*`` keys, chat templates included.

    Raises :class:`CheckpointError` for keys that are missing or contradict each other and :class:`UnsupportedError` for
    a kind of vocabulary or a pre-tokenizer that lowbit does not know.
    """
    from transformers import PreTrainedTokenizerFast

    stored = _Stored.of(metadata)
    build = _BUILDERS.get(stored.model)
    if build is None:
        raise UnsupportedError(
            f"the vocabulary is of kind {stored.model!r} (tokenizer.ggml.model); lowbit knows {', '.join(_BUILDERS)}"
        )
    try:
        tokenizer = build(stored)
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"the GGUF vocabulary contradicts itself: {error}") from error
    except (CheckpointError, UnsupportedError):
        raise
    except Exception as error:  # the tokenizers package raises bare Exception for merges that do not fit the tokens
        raise CheckpointError(
            f"the GGUF vocabulary contradicts itself: {' '.join(str(error).split())[:200]}"
        ) from error
    _add_tokens(tokenizer, stored)
    _frame(tokenizer, stored)
    roles = {f"{role}_token": stored.tokens[id] for role, id in stored.special.items()}
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    limit = {"model_max_length": length} if isinstance(length, int) and length > 0 else {}
    rebuilt = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles, **limit)
    if template := _chat_template(metadata):
        rebuilt.chat_template = template
    return rebuilt


def write_tokenizer(metadata: Mapping[str, Value], directory: Path) -> list[Path]:
    """Save :func:`tokenizer_from_gguf` in ``directory`` and return the files, sorted by name."""
    before = set(directory.rglob("*"))
    tokenizer_from_gguf(metadata).save_pretrained(str(directory))
    return sorted(path for path in set(directory.rglob("*")) - before if path.is_file())


@dataclass(frozen=True, slots=True)
class _Stored:
    """The keys of a vocabulary, checked."""

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    flags: Mapping[str, bool]
    characters: bytes

    @classmethod
    def of(cls, metadata: Mapping[str, Value]) -> _Stored:
        def listed(key: str, kinds: type | tuple[type, ...], length: int | None = None) -> list[Any]:
            value = metadata.get(f"tokenizer.ggml.{key}", [])
            if (
                isinstance(value, str)
                or not isinstance(value, Sequence)
                or not all(isinstance(x, kinds) for x in value)
            ):
                raise CheckpointError(f"tokenizer.ggml.{key} is not a list of the right type")
            if length is not None and value and len(value) != length:
                raise CheckpointError(f"tokenizer.ggml.{key} has {len(value)} entries for {length} tokens")
            return list(value)

        tokens = listed("tokens", str)
        if not tokens:
            raise CheckpointError("the GGUF file holds no vocabulary (tokenizer.ggml.tokens)")
        kinds = listed("token_type", int, len(tokens)) or [NORMAL] * len(tokens)
        special = {}
        for role, stem in _ROLES.items():
            id = metadata.get(f"tokenizer.ggml.{stem}_token_id")
            if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < len(tokens):
                special[role] = id
        flags = {
            key.removeprefix("tokenizer.ggml."): value
            for key, value in metadata.items()
            if key.startswith("tokenizer.ggml.") and isinstance(value, bool)
        }
        return cls(
            str(metadata.get("tokenizer.ggml.model", "")),
            str(metadata.get("tokenizer.ggml.pre", "default")),
            tokens,
            kinds,
            listed("scores", (int, float), len(tokens)),
            listed("merges", str),
            special,
            flags,
            bytes(value & 0xFF for value in listed("precompiled_charsmap", int)),
        )

    def vocabulary(self) -> dict[str, int]:
        """Text to id; what was only added to fill the embedding's last rows is left out."""
        used = len(self.tokens)
        needed = max(self.special.values(), default=-1) + 1
        while used > needed and self.kinds[used - 1] == UNUSED and self.tokens[used - 1] == f"[PAD{used - 1}]":
            used -= 1
        found = {text: id for id, text in enumerate(self.tokens[:used])}
        if len(found) != used:
            raise CheckpointError("tokenizer.ggml.tokens has the same token twice")
        return found

    def rows(self) -> Iterable[tuple[str, int]]:
        return zip(self.tokens, self.kinds, strict=True)


def _byte_level(stored: _Stored) -> Any:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    entry = find_pre_tokenizer(stored.pre)
    if entry is None:
        raise UnsupportedError(
            f"the pre-tokenizer {stored.pre!r} is none that lowbit knows: {', '.join(PRE_TOKENIZERS)}, and "
            "other names for them"
        )
    merges = []
    for merge in stored.merges:
        # The first byte may be a space that is part of a token.
        cut = merge.find(" ", 1)
        if cut < 0:
            raise CheckpointError(f"tokenizer.ggml.merges: {merge!r} is not a pair of tokens")
        merges.append((merge[:cut], merge[cut + 1 :]))
    tokenizer = Tokenizer(BPE(vocab=stored.vocabulary(), merges=merges, ignore_merges=entry.ignore_merges))
    tokenizer.pre_tokenizer = split_pre_tokenizer(entry.original or entry.splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(stored: _Stored) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocabulary = stored.vocabulary()
    scores = stored.scores or [0.0] * len(stored.tokens)
    unknown = stored.tokens[stored.special["unk"]] if "unk" in stored.special else None
    model = BPE(
        vocab=vocabulary,
        merges=_merges(stored, vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = stored.flags.get("add_space_prefix", True)
    to_sign = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_sign]) if prefixed else to_sign
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    return tokenizer


def _merges(stored: _Stored, vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score first."""
    made = [
        (-scores[id], id, text)
        for text, id in vocabulary.items()
        if len(text) > 1 and stored.kinds[id] not in (BYTE, CONTROL, UNKNOWN)
    ]
    pairs = []
    for _, _, text in sorted(made):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((left, right))
    return pairs


def _wordpiece(stored: _Stored) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    if "unk" not in stored.special:
        raise CheckpointError("tokenizer.ggml.unknown_token_id is missing")
    vocabulary = {
        _unmarked(text) if stored.kinds[id] == NORMAL else text: id for text, id in stored.vocabulary().items()
    }
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=stored.tokens[stored.special["unk"]]))
    lowercase = stored.flags.get("normalizer.lowercase", True)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=stored.flags.get("normalizer.strip_accents", lowercase)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return tokenizer


def _unigram(stored: _Stored) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    if "unk" not in stored.special or not stored.scores:
        raise CheckpointError("tokenizer.ggml.unknown_token_id or tokenizer.ggml.scores is missing")
    pieces = [(text, float(stored.scores[id])) for text, id in stored.vocabulary().items()]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=stored.special["unk"], byte_fallback=False))
    if stored.characters:
        tokenizer.normalizer = normalizers.Precompiled(CharacterMap(stored.characters).data)
    prefix = "always" if stored.flags.get("add_space_prefix", True) else "never"
    merged = stored.flags.get("remove_extra_whitespaces", False)
    spaces = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=merged)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces]) if merged else spaces
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prefix)
    return tokenizer


def _unmarked(text: str) -> str:
    return text.removeprefix(SPACE) if text.startswith(SPACE) else CONTINUATION + text


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece, "t5": _unigram}


def _add_tokens(tokenizer: Any, stored: _Stored) -> None:
    """Tokens that are matched in a text before everything else."""
    from tokenizers import AddedToken

    special = [text for text, kind in stored.rows() if kind in (CONTROL, UNKNOWN)]
    others = [text for text, kind in stored.rows() if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in others])


def _frame(tokenizer: Any, stored: _Stored) -> None:
    """BOS and EOS (of WordPiece, CLS and SEP) around a text."""
    from tokenizers import processors

    special, flags = stored.special, stored.flags
    if stored.model == "bert":
        before, after = special.get("bos", special.get("cls")), special.get("sep")
    else:
        before = special.get("bos") if flags.get("add_bos_token", stored.model == "llama") else None
        after = special.get("eos") if flags.get("add_eos_token", False) else None
    single = ["$A:0"]
    if before is not None:
        single.insert(0, f"{stored.tokens[before]}:0")
    if after is not None:
        single.append(f"{stored.tokens[after]}:0")
    if len(single) > 1:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:1"],
            special_tokens=[(stored.tokens[id], id) for id in {before, after} if id is not None],
        )


def _chat_template(metadata: Mapping[str, Value]) -> str | dict[str, str] | None:
    """One template, or several by name."""
    default = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): str(value) for key, value in metadata.items() if key.startswith(prefix)}
    if not named:
        return default if isinstance(default, str) else None
    return {"default": default, **named} if isinstance(default, str) else named
