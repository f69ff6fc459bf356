"""What to do with an estimate: flags that say the same to the engine, and what helps when it does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowbit.planning.kv_dtypes import KV_DTYPES, LLAMA_CPP, VLLM
from lowbit.planning.serving import GIB, MEMORY, MIB, Load, Memory, Served, shared_memory, shm_advice

_LLAMA_NAMES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True, slots=True)
class Advice:
    """``flags`` for the engine; ``shm_size`` for a container in GiB and the ``shm_bytes`` that it must hold;
    ``offload`` are ways to make it fit (empty if it does), each one line."""

    flags: tuple[str, ...]
    shm_size: int
    shm_bytes: int
    offload: tuple[str, ...]


def advise(engine: str, served: Served, load: Load, memory: int, budget: int, found: Memory) -> Advice:
    """Flags and ways out for a ``load`` whose need is ``found``, on devices of ``memory`` bytes."""
    missing = found.total - budget
    shm = load.devices if load.gpu else 1
    if engine == LLAMA_CPP:
        flags = _llama_cpp_flags(load)
        ways = _llama_cpp_offload(served, load, budget, missing)
    else:
        flags = _vllm_flags(load, memory, found)
        ways = _vllm_offload(served, load, missing)
    if missing > 0:
        ways = (*ways, *_smaller(engine, served, load, budget))
    return Advice(flags, shm_advice(shm), shared_memory(shm), ways if missing > 0 else ())


def told_size(size: float, *, digits: int = 1, up: bool = False) -> str:
    """``size`` bytes in GiB, or in MiB below one; the last digit is rounded ``up`` where it must suffice."""
    unit, name = (GIB, "GiB") if abs(size) >= GIB else (MIB, "MiB")
    parts = 10**digits * size / unit
    return f"{(math.ceil(parts) if up else round(parts)) / 10**digits:.{digits}f} {name}"


def _vllm_flags(load: Load, memory: int, found: Memory) -> tuple[str, ...]:
    share = min(0.97, max(0.05, math.ceil(100 * found.total / memory) / 100))
    flags = [
        f"--max-model-len {load.context}",
        f"--max-num-seqs {load.concurrency}",
        f"--max-num-batched-tokens {load.batch_tokens}",
        f"--gpu-memory-utilization {share:.2f}",
    ]
    if load.kv.name not in ("float16", "bfloat16"):
        flags.append(f"--kv-cache-dtype {load.kv.name}")
    if load.devices > 1:
        flags.append(f"--tensor-parallel-size {load.devices}")
    return tuple(flags)


def _llama_cpp_flags(load: Load) -> tuple[str, ...]:
    kind = _LLAMA_NAMES.get(load.kv.name, load.kv.name)
    flags = [f"-c {load.context * load.concurrency}", f"-np {load.concurrency}", f"-ub {load.batch_tokens}"]
    if kind != "f16":
        flags.append(f"-ctk {kind} -ctv {kind} -fa on")
    flags.append("-ngl 99" if load.gpu else "-ngl 0")
    return tuple(flags)


def _vllm_offload(served: Served, load: Load, missing: int) -> tuple[str, ...]:
    if not load.gpu:
        return ()
    gib = math.ceil(missing / GIB)
    ways = []
    if missing < served.weights:
        ways.append(f"--cpu-offload-gb {gib}: {gib} GiB of each device's weights stay in host memory (slow)")
    ways.append("--kv-offloading-size N: finished prefixes of the cache go to host memory; running requests do not")
    return tuple(ways)


def _llama_cpp_offload(served: Served, load: Load, budget: int, missing: int) -> tuple[str, ...]:
    if not load.gpu:
        return ()
    blocks = served.shape.layers
    memory = MEMORY[LLAMA_CPP](served, load).parts
    movable = memory["weights"] + memory["kv cache"]
    kept = int(blocks * max(0, movable - missing) / movable) if movable else 0
    ways = []
    if kept:
        ways.append(f"-ngl {kept}: {kept} of {blocks} blocks on the GPU, the others on the CPU")
    if budget >= memory["weights"] + memory["activations"] + memory["engine"]:
        ways.append("--no-kv-offload: the cache stays in host memory")
    return tuple(ways)


def _smaller(engine: str, served: Served, load: Load, budget: int) -> tuple[str, ...]:
    """One request, a shorter context or an 8-bit cache, where that alone would do."""
    formula = MEMORY[engine]
    ways = []
    if load.concurrency > 1 and formula(served, replace(load, concurrency=1)).total <= budget:
        ways.append("fewer requests at a time: one fits")
    smaller = KV_DTYPES["fp8" if engine == VLLM else "q8_0"]
    if load.kv.bits > 9 and formula(served, replace(load, kv=smaller)).total <= budget:
        ways.append(f"--kv-dtype {smaller.name}: half the cache, and it fits")
    if load.context > 2048 and formula(served, replace(load, context=2048)).total <= budget:
        ways.append("a shorter context: 2048 tokens fit")
    if load.devices == 1 and load.gpu:
        ways.append("more GPUs: --gpus 2 divides weights and cache")
    return tuple(ways)
