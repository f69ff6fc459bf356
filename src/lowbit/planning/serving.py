"""Memory that an engine takes to serve a model, part by part, each engine by its own formula.

Exact parts: weights (from headers) and cache (:mod:`lowbit.planning.kv`). llama.cpp's compute and output buffers were
measured on 40 shapes and are exact for feed-forwards wider than the model. vLLM's activations follow its profiling run;
its CUDA context and graphs are figures fitted to published start-up logs, which :data:`ASSUMED` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lowbit.checkpoint import ModelDescription
from lowbit.checkpoint.layers import LayerState
from lowbit.planning.kv import llama_cpp_cache, vllm_pool
from lowbit.planning.kv_dtypes import LLAMA_CPP, VLLM, KvDtype

MIB, GIB = 2**20, 2**30

ASSUMED = ("activations", "graphs", "engine")
"""Parts that rest on fitted figures, not on arithmetic."""

VLLM_CPU_BLOCK = 128
"""Tokens in a page of vLLM's CPU build."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """An image encoder: ``tokens`` that one image of the largest size becomes, ``patches`` for each of them."""

    hidden: int
    ffn: int
    tokens: int
    patches: int = 1


@dataclass(frozen=True, slots=True)
class Served:
    """A model as engines see it. ``weights`` are bytes on one device, ``embedding`` those of its token table.

    ``repacked`` are bytes that llama.cpp copies into another order on a CPU, the mapped originals staying cached;
    ``merges`` of the vocabulary's byte-pair encoding, None where that is not known.
    """

    shape: ModelDescription
    layers: tuple[LayerState, ...]
    weights: int
    embedding: int = 0
    repacked: int = 0
    encoder: Encoder | None = None
    merges: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of an engine: ``concurrency`` requests of ``context`` tokens on ``devices`` (GPUs, or the CPU).

    ``batch_tokens`` are computed at a time (vLLM's ``--max-num-batched-tokens``, llama.cpp's ``--ubatch-size``).
    """

    context: int
    concurrency: int
    kv: KvDtype
    batch_tokens: int
    devices: int = 1
    gpu: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part on one device, and on the host beside it; ``reclaimable`` more may be mapped, which the system
    takes back when it needs them."""

    parts: Mapping[str, int]
    host: int = 0
    reclaimable: int = 0

    @property
    def total(self) -> int:
        """Bytes that one device must have."""
        return sum(self.parts.values())


def vllm_memory(model: Served, load: Load) -> Memory:
    """vLLM: weights, pool, the peak of its profiling run, CUDA context with NCCL, and CUDA graphs."""
    block = 16 if load.gpu else VLLM_CPU_BLOCK
    pool = vllm_pool(model.layers, load.kv, load.devices, load.batch_tokens, block)
    parts = {"weights": model.weights, "kv cache": pool.bytes(load.context, load.concurrency)}
    if not load.gpu:
        return Memory(parts | _vllm_cpu(model, load))
    parts["activations"] = _activations(model, load)
    parts["graphs"] = int(_GRAPHS + _GRAPHS_SHARE * model.weights)
    parts["engine"] = _CUDA_CONTEXT + (_NCCL if load.devices > 1 else 0)
    return Memory(parts, host=_VLLM_HOST * (load.devices + 1))


def _vllm_cpu(model: Served, load: Load) -> dict[str, int]:
    """vLLM's CPU build beside weights and pool: a step in its products' float32, and its processes with a second copy
    of embedding and head (packed for products, as all weights are, but without letting go of the first)."""
    shape = model.shape
    tokens = min(load.batch_tokens, load.context * load.concurrency)
    vocabulary = model.embedding * (1 if shape.tied else 2)
    holes = int(VLLM_CPU_HOLES * max(0, model.weights - vocabulary))
    return {
        "activations": int(VLLM_CPU_STEP * _step_width(model, 1)) * tokens,
        "engine": VLLM_CPU_BASE + vocabulary + holes,
    }


def llama_cpp_memory(model: Served, load: Load) -> Memory:
    """llama.cpp: the mapped file, caches, the compute buffer of the widest step, logits, and the process."""
    shape, tokens = model.shape, load.batch_tokens
    cache = llama_cpp_cache(model.layers, load.kv, load.context, load.concurrency, tokens)
    logits = 4 * load.concurrency * shape.vocab
    wide = 3 * (max(1, shape.experts_per_token) * shape.expert_ffn if shape.is_moe else shape.ffn)
    widest = max(4 * tokens * max(wide, 2 * shape.heads * shape.head_dim), logits)
    masks = 2 * tokens * (cache.cells + cache.sliding_cells)
    compute = 4 * tokens * 5 * shape.hidden + widest + masks
    process = _llama_cpp_process(model, load.concurrency)
    if not load.gpu:
        parts = {"weights": model.weights, "kv cache": cache.bytes, "activations": compute + logits, "engine": process}
        return Memory(parts, reclaimable=model.repacked)
    # The token table stays in host memory; a tied one is copied to the device to serve as the output matrix.
    kept = model.embedding if not shape.tied else 0
    parts = {
        "weights": model.weights - kept,
        "kv cache": cache.bytes,
        "activations": compute,
        "engine": _CUDA_CONTEXT,
    }
    return Memory(parts, host=process + model.embedding + logits)


def _llama_cpp_process(model: Served, slots: int) -> int:
    """The process itself: code and start-up, the vocabulary's tables, and the sampler and the threads of each slot."""
    vocab = model.shape.vocab
    tables = LLAMA_CPP_TOKEN * vocab + LLAMA_CPP_MERGE * (vocab if model.merges is None else model.merges)
    samplers = slots * (LLAMA_CPP_CANDIDATE * vocab + LLAMA_CPP_SLOT)
    return LLAMA_CPP_BASE + tables + samplers + min(slots, LLAMA_CPP_ARENAS) * LLAMA_CPP_ARENA


MEMORY: Mapping[str, Callable[[Served, Load], Memory]] = {VLLM: vllm_memory, LLAMA_CPP: llama_cpp_memory}
"""The formula of each engine."""

BATCH_TOKENS: Mapping[str, int] = {VLLM: 2048, LLAMA_CPP: 512}
"""Tokens computed at a time unless a flag says otherwise."""

LLAMA_CPP_BASE = 32 * MIB
"""Resident bytes of a process of ``lowbit serve`` with llama.cpp in it: 20 MiB of code, 12 of its own. This and the
next were measured with the release of autumn 2026: one model of two blocks with vocabularies of 2,048, 8,000, 32,000,
64,000 and 128,256 tokens, with and without merges, and 1 to 32 slots (``benchmarks/memory.py`` measures them again)."""
LLAMA_CPP_TOKEN, LLAMA_CPP_MERGE = 150, 230
"""Of the tables of a vocabulary, for each token and for each merge."""
LLAMA_CPP_CANDIDATE = 12
"""Of each slot's sampler, for each token: its id, logit and probability."""
LLAMA_CPP_SLOT = MIB // 5
LLAMA_CPP_ARENA, LLAMA_CPP_ARENAS = 9 * MIB // 20, 8
"""Of each slot; and of the allocator's arenas of the threads that serve them, which are bounded."""

VLLM_CPU_BASE = 1462 * MIB
"""Resident bytes of vLLM's four CPU processes (0.32: server, core, worker, tracker), what they share counted once. This
and the next two were measured on models of 4 M to 1.1 G parameters (``benchmarks/memory.py`` measures them again)."""
VLLM_CPU_STEP = 9.2
"""Bytes per token and feature of the widest step: 2 in bfloat16, and float32 ones that the allocator keeps."""
VLLM_CPU_HOLES = 0.09
"""Share of the linears' weights that packing them one after the other leaves as holes in the heap."""

_CUDA_CONTEXT = 600 * MIB
_NCCL = 900 * MIB
_GRAPHS = 200 * MIB
_GRAPHS_SHARE = 0.015
_VLLM_HOST = 2 * GIB


def _activations(model: Served, load: Load) -> int:
    """The larger of the widest step of a full batch and of sampling; of the image encoder, if there is one."""
    shape, tokens, devices = model.shape, load.batch_tokens, load.devices
    item = 2
    forward = int(item * tokens * _step_width(model, devices))
    sampling = load.concurrency * shape.vocab * (item + 4 + 4)
    image = 0
    if (encoder := model.encoder) is not None:
        patches = max(tokens, encoder.tokens) * encoder.patches
        image = item * patches * (2 * encoder.hidden + max(3 * encoder.ffn, 4 * encoder.hidden))
        image += item * max(tokens, encoder.tokens) * shape.hidden
    return max(forward, sampling, image)


def _step_width(model: Served, devices: int) -> float:
    """Features of one token that are alive in the widest step: the residual twice, and attention or feed-forward."""
    shape = model.shape
    if shape.is_moe:
        chosen, width = max(1, shape.experts_per_token), shape.expert_ffn / devices
        feed_forward = chosen * (max(2 * width, shape.hidden) + width)
    else:
        feed_forward = 3 * shape.ffn / devices
    attention = 2 * (shape.heads + 2 * max(shape.kv_heads, devices)) * shape.head_dim / devices
    return 2 * shape.hidden + max(feed_forward, attention)


def largest(fits: Callable[[int], bool], limit: int, step: int = 1) -> int:
    """The largest multiple of ``step`` up to ``limit`` for which ``fits`` holds (it must not hold again after it
    failed); 0 if there is none."""
    low, high = 0, limit // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def largest_concurrency(engine: str, model: Served, load: Load, budget: int, limit: int = 4096) -> int:
    """Most requests of ``load.context`` tokens that ``budget`` bytes of one device hold; 0 if not one."""
    formula = MEMORY[engine]
    return largest(lambda n: formula(model, replace(load, concurrency=n)).total <= budget, limit)


def largest_context(engine: str, model: Served, load: Load, budget: int, limit: int) -> int:
    """Longest context, in steps of 256 tokens, that ``load.concurrency`` requests may have; 0 if none."""
    formula = MEMORY[engine]
    return largest(lambda n: formula(model, replace(load, context=n)).total <= budget, limit, min(256, limit))


def shared_memory(gpus: int) -> int:
    """Bytes of ``/dev/shm`` that tensor-parallel workers can come to need; see the constants for what is counted."""
    if gpus <= 1:
        return _QUEUE
    return _QUEUE * 2 + gpus * (gpus - 1) * _NCCL_CHANNELS * _NCCL_CONNECTION


_QUEUE = 10 * 16 * MIB
"""vLLM's message queue between its processes: ten chunks of 16 MiB."""
_NCCL_CHANNELS = 16
_NCCL_CONNECTION = 10 * MIB
"""NCCL's buffers for one direction between a pair and one channel, where GPUs reach each other through the host."""


def shm_advice(gpus: int) -> int:
    """A size for ``--shm-size``, in GiB: the need with half as much again, up to a power of two."""
    need, size = 1.5 * shared_memory(gpus) / GIB, 1
    while size < need:
        size *= 2
    return size
