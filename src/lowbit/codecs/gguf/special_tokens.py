"""Which tokens begin, end and pad a text: the ids and switches beside a GGUF vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.codecs.gguf.metadata import MetadataValue
from lowbit.codecs.gguf.token_table import Source
from lowbit.errors import CheckpointError

__all__ = ["Frame", "frame_notes", "frame_of", "special_token_metadata"]

_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|end|>",
    "<EOT>",
    "[EOT]",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
)
"""Texts that llama.cpp takes for the end of a turn when the file names none, likeliest first."""

_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "cls": "cls"}
"""Role in transformers to the key's stem in GGUF (which spells separator so)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a tokenizer puts before and after every text."""

    before: list[int]
    after: list[int]


def frame_of(source: Source) -> Frame:
    """Found by encoding a word with and without the special tokens."""
    bare = source.ids("a")
    framed = source.ids("a", special=True)
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return Frame(framed[:start], framed[start + len(bare) :])
    return Frame([], [])


def special_token_metadata(source: Source, config: Mapping[str, Any], size: int) -> dict[str, MetadataValue]:
    """``tokenizer.ggml.{bos,eos,…}_token_id`` and ``add_{bos,eos}_token``; ids from ``size`` on do not count.

    Raises :class:`CheckpointError` when nothing says which token ends a text: llama.cpp would stop at token 11.
    """
    frame = frame_of(source)
    ends = [*_ids(config, "eos_token_id"), *_ids(_generation_config(source.where), "eos_token_id")]
    found_ids = {
        role: source.id_of(getattr(source.tokenizer, f"{role}_token", None)) for role in ("bos", "eos", *_KEYS)
    }
    named = {role: id if id is None or id < size else None for role, id in found_ids.items()}
    bos = named["bos"]
    if len(frame.before) == 1:
        bos = frame.before[0]
    elif bos is None:
        bos = next(iter(_ids(config, "bos_token_id")), None)
    eos = named["eos"]
    if eos is None:
        eos = next((id for id in (*ends, *frame.after) if id < size), None)
    if eos is None:
        raise CheckpointError(f"{source.where}: no token ends a text: set eos_token in tokenizer_config.json")
    found: dict[str, MetadataValue] = {}
    if bos is not None and bos < size:
        found["tokenizer.ggml.bos_token_id"] = bos
    found["tokenizer.ggml.eos_token_id"] = eos
    turn = _end_of_turn(source, [eos, *(id for id in ends if id < size)])
    if turn is not None:
        found["tokenizer.ggml.eot_token_id"] = turn
    for role, stem in _KEYS.items():
        if (id := named[role]) is not None:
            found[f"tokenizer.ggml.{stem}_token_id"] = id
    found["tokenizer.ggml.add_bos_token"] = bool(frame.before) and frame.before == [bos]
    found["tokenizer.ggml.add_eos_token"] = bool(frame.after) and frame.after == [eos]
    return found


def frame_notes(source: Source, metadata: Mapping[str, MetadataValue]) -> Iterator[str]:
    """What the original puts around every text and llama.cpp, which knows one token on each side, does not."""
    frame = frame_of(source)
    for ids, key, where in ((frame.before, "add_bos_token", "in front of"), (frame.after, "add_eos_token", "after")):
        if ids and not metadata[f"tokenizer.ggml.{key}"]:
            yield f"llama.cpp does not put {source.backend.decode(ids, skip_special_tokens=False)} {where} a text"


def _end_of_turn(source: Source, ends: list[int]) -> int | None:
    """The best known added token among ``ends`` (EOS first), else the best known one, else another of ``ends``."""
    added = {token.text: token.id for token in source.added}
    known = [added[text] for text in _END_OF_TURN if text in added]
    others = [id for id in ends if id != ends[0]]
    return next((id for id in known if id in ends), next(iter([*known, *others]), None))


def _ids(config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int) and not isinstance(id, bool) and id >= 0]


def _generation_config(directory: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / 'generation_config.json'}: not readable as JSON ({error})") from error
    return found if isinstance(found, dict) else {}
