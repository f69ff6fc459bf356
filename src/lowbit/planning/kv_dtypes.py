"""Number formats of the key-value cache: bytes of one vector, scales included, by the name an engine takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.errors import UsageError

VLLM, LLAMA_CPP = "vllm", "llama.cpp"


@dataclass(frozen=True, slots=True)
class KvDtype:
    """``block`` numbers take ``block_bytes``; a vector (one head's key or value of one token) ``per_vector`` more."""

    name: str
    block: int
    block_bytes: int
    per_vector: int = 0
    engines: tuple[str, ...] = (VLLM, LLAMA_CPP)

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of ``dim`` numbers, a started block counted whole."""
        return -(-dim // self.block) * self.block_bytes + (self.per_vector if dim else 0)

    @property
    def bits(self) -> float:
        """Bits per number, without what is added per vector."""
        return 8 * self.block_bytes / self.block


_TYPES = (
    KvDtype("float32", 1, 4),
    KvDtype("float16", 1, 2),
    KvDtype("bfloat16", 1, 2),
    KvDtype("fp8", 1, 1, engines=(VLLM,)),
    KvDtype("fp8_per_token_head", 1, 1, 4, engines=(VLLM,)),
    KvDtype("int8_per_token_head", 1, 1, 4, engines=(VLLM,)),
    KvDtype("int4_per_token_head", 2, 1, 4, engines=(VLLM,)),
    KvDtype("nvfp4", 16, 9, engines=(VLLM,)),
    KvDtype("q8_0", 32, 34, engines=(LLAMA_CPP,)),
    KvDtype("q5_1", 32, 24, engines=(LLAMA_CPP,)),
    KvDtype("q5_0", 32, 22, engines=(LLAMA_CPP,)),
    KvDtype("q4_1", 32, 20, engines=(LLAMA_CPP,)),
    KvDtype("q4_0", 32, 18, engines=(LLAMA_CPP,)),
    KvDtype("iq4_nl", 32, 18, engines=(LLAMA_CPP,)),
)
KV_DTYPES: Mapping[str, KvDtype] = {kind.name: kind for kind in _TYPES}
"""By vLLM's names and, for the blocks of 32, llama.cpp's. A vector's scale per token and head is a float32."""

_ALIASES = {"f32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"} | dict.fromkeys(
    ("fp8_e4m3", "fp8_e5m2"), "fp8"
)


def parse_kv_dtype(name: str, engine: str, model_dtype: str = "bfloat16") -> KvDtype:
    """The format called ``name``; ``auto`` is 16 bits: the model's own where it has such, else float16.

    Raises :class:`UsageError` for a name that is unknown or that ``engine`` does not take.
    """
    if name == "auto":
        name = "bfloat16" if model_dtype == "bfloat16" and engine == VLLM else "float16"
    kind = KV_DTYPES.get(_ALIASES.get(name.lower(), name.lower()))
    offered = [known.name for known in _TYPES if engine in known.engines]
    if kind is None:
        close = difflib.get_close_matches(name.lower(), offered, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(offered)}"
        raise UsageError(f"--kv-dtype {name}: unknown: {hint}")
    if engine not in kind.engines:
        raise UsageError(f"--kv-dtype {name}: {engine} has no such cache: use one of {', '.join(offered)}")
    return kind
