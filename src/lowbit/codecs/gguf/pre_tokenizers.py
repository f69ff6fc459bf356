"""The pre-tokenizers that llama.cpp knows by name, as regular expressions.

A GGUF file with a BPE vocabulary names its pre-tokenizer in ``tokenizer.ggml.pre``; the expressions behind a name are
part of llama.cpp (``src/llama-vocab.cpp``) and come from the ``tokenizer.json`` of the models. Each expression splits
what the one before it left; between matches, what does not match is a piece of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ALIASES", "PRE_TOKENIZERS", "PreTokenizer", "find_pre_tokenizer"]

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_KANA_AND_HAN = "[一-龥\u3040-ゟ゠-ヿ]+"

# llama.cpp reduces all letters outside ASCII to one class, so that "not a lower-case letter" stands in for "upper".
_UPPER = r"(?:(?=[\p{L}])(?:[^a-z]))"
_LOWER = r"(?:(?=[\p{L}])(?:[^A-Z]))"
_TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED_UPPER}*{_CASED_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED_UPPER}+{_CASED_LOWER}*",
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

# The letters that deepseek-llm lists one range after the other are, but for a few, those with two cases.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_HAN = "[一-龥ࠀ-一가-\ud7ff]+"


def _any_of(*patterns: str) -> str:
    return "|".join(patterns)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How llama.cpp splits a text before it merges bytes.

    ``splits`` are its expressions. ``ignore_merges``: a piece that is a token is taken whole. ``original``: the
    expressions of the model that the name was made for, where llama.cpp only approaches them.
    """

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    original: tuple[str, ...] = ()


_TABLE = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True),
    PreTokenizer("qwen2", (_QWEN2,)),
    PreTokenizer("smaug-bpe", (_LLAMA3,)),
    PreTokenizer("starcoder", (r"\p{N}", _GPT2)),
    PreTokenizer("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(
        "deepseek-llm",
        (
            "[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _DEEPSEEK_HAN,
            r"\p{N}+",
        ),
    ),
    PreTokenizer("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")),
    PreTokenizer(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            _KANA_AND_HAN,
            _any_of(
                _ASCII_PUNCTUATION,
                r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
                r" ?[\p{P}\p{S}]+[\r\n]*",
                _SPACES,
            ),
        ),
    ),
    PreTokenizer(
        "tekken",
        (_any_of(*_TEKKEN_WORDS, r"\p{N}", _SLASHED, _SPACES),),
        ignore_merges=True,
        original=(_any_of(*_CASED_WORDS, r"\p{N}", _SLASHED, _SPACES),),
    ),
    PreTokenizer(
        "gpt-4o",
        (_any_of(*(f"{word}{_CONTRACTIONS}?" for word in _TEKKEN_WORDS), r"\p{N}{1,3}", _SLASHED, _SPACES),),
        original=(_any_of(*(f"{word}{_CONTRACTIONS}?" for word in _CASED_WORDS), r"\p{N}{1,3}", _SLASHED, _SPACES),),
    ),
    PreTokenizer("poro-chat", (" ?[^(\\s|.,!?…。，、।۔،)]+",)),
    PreTokenizer("viking", (" ?[^(\\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    PreTokenizer("seed-coder", (_any_of(_CONTRACTIONS, _WORD, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES),)),
    PreTokenizer(
        "qwen35",
        (
            _any_of(
                _CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES
            ),
        ),
    ),
    PreTokenizer(
        "exaone-moe",
        (
            _any_of(
                _CONTRACTIONS,
                r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                r"\s*[\r\n]|\s+(?!\S)|\s+",
            ),
        ),
    ),
    PreTokenizer(
        "minicpm5",
        (r"\p{N}{1,3}", _any_of(_CONTRACTIONS, _WORD, r"\p{N}+", _SYMBOLS, _SPACES)),
        ignore_merges=True,
    ),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {entry.name: entry for entry in _TABLE}
"""By name; where several fit a tokenizer, the first is taken, so the widely known names stand first."""

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(
        ("phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe"),
        "gpt-2",
    ),
    **dict.fromkeys(("mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "exaone4", "mellum"), "gpt-2"),
    **dict.fromkeys(("modern-bert", "a.x-4.0"), "gpt-2"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2", "solar-open", "kormo"), "qwen2"),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), "qwen2"),
    **dict.fromkeys(("dbrx", "chatglm-bpe"), "smaug-bpe"),
    **dict.fromkeys(("glm4",), "llama-bpe"),
    **dict.fromkeys(("smollm", "command-r", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), "starcoder"),
    **dict.fromkeys(("bloom", "gpt3-finnish"), "poro-chat"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), "deepseek-v3"),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2"), "gpt-4o"),
}
"""Other names of llama.cpp for the same splits."""


def find_pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer that ``tokenizer.ggml.pre`` names, or None for one that lowbit does not know."""
    return PRE_TOKENIZERS.get(ALIASES.get(name, name))
