"""What quantizing will cost: seconds, peak memory and disk, from shapes and a measured GEMM rate.

Operations are counted per block and divided by the rate. The counts are those of the pipeline: one staged forward,
half of each Gram matrix, one factorisation per distinct input, one triangular correction per weight matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lowbit.planning.modules import PlannedModule, by_block, by_input

BASE_BYTES = 570_000_000
"""Resident memory of the interpreter with torch and transformers loaded (measured, as the next)."""

COMPILER_BYTES = 95_000_000
"""Of numba with its compiled kernels, for methods that use them."""

_KEPT_SHARE, _KEPT_BYTES = 0.2, 300 * 2**20
"""What the C library's allocator keeps of memory that came and went: a fifth of those parts, at most so much
(glibc; measured on models of 4 M to 8 G parameters' shape)."""

TOKENS_PER_FORWARD = 2048
"""Tokens of a batch that is on its way through a block."""
_ALIVE = 4
"""Tensors of the widest intermediate that a batch holds at once: gate, activation, up, and their product."""

_START_SECONDS = 6.0
"""Imports, compiled kernels, hashing the source: what even the smallest model takes."""

_GRAMS, _GRAMS_SEARCHED = 2.5, 1.5
"""Matrices of ``in * in`` floats alive while the widest input is factorised, and where it is only searched with."""
_FACTOR_SHARE = 0.4
"""Rate of a Cholesky factorisation relative to matrix products."""
_FORWARD_SHARE = 0.6
"""Rate of a block's forward (thin products, softmax, norms) relative to large matrix products."""
_ELEMENTS_PER_SECOND = 2.5e8
"""Weights that one pass of choosing a code takes per second and processor: bound by memory, not by the GEMM rate."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The run to predict. ``itemsize`` bytes per activation and computed weight, ``source_itemsize`` per stored one.

    ``experts`` and ``experts_per_token`` are 0 for a dense model; ``shell_bytes`` is what stays loaded beside the
    block; ``keep_states`` says that intermediate states of all tokens stay in memory, or else that batches run again
    from the block's input for every stop; ``reads_per_second`` is the disk's rate in bytes.
    """

    samples: int
    seq_len: int
    hidden: int
    heads: int = 0
    head_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    itemsize: int = 4
    shell_bytes: int = 0
    source_itemsize: int = 2
    cpus: float = 1.0
    keep_states: bool = True
    reads_per_second: float = 1e9

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.samples * self.seq_len


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds and bytes by part; the totals are their sums. ``scratch`` bytes of disk are used while it runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    scratch: int = 0

    @property
    def total_seconds(self) -> float:
        """Predicted time of the whole run."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of resident memory."""
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True)
class MethodCost:
    """Work of a method on one weight ``(out, in)``: ``flops`` in products, ``passes`` over all weights.

    ``needs_reference`` says that the float model runs beside the quantized one, ``compiles`` that its kernels are
    numba's, which stays in memory, ``tunes`` that offsets are learned of all weights of a block together.
    """

    flops: Callable[[int, int], float]
    passes: float
    needs_statistics: bool = True
    factorises: bool = False
    needs_reference: bool = False
    compiles: bool = False
    tunes: bool = False


METHOD_COSTS: dict[str, MethodCost] = {
    "rtn": MethodCost(lambda out, into: 0.0, 20.0, needs_statistics=False),
    # 20 rounds of shrinking errors with a power of each.
    "hqq": MethodCost(lambda out, into: 0.0, 300.0, needs_statistics=False),
    "gptq": MethodCost(lambda out, into: 3.0 * out * into * into, 22.0, factorises=True, compiles=True),
    # A cross product as large as the Gram matrix is solved for with the factor, twice, and applied.
    "gptaq": MethodCost(
        lambda out, into: 5.0 * out * into * into, 22.0, factorises=True, needs_reference=True, compiles=True
    ),
    # 200 steps forwards and backwards over 4096 tokens, gradients and offsets beside each weight.
    "autoround": MethodCost(
        lambda out, into: 5.0 * out * into * into + 200 * 6.0 * 4096 * out * into,
        22.0 + 200 * 30.0,
        factorises=True,
        needs_reference=True,
        compiles=True,
        tunes=True,
    ),
    # 20 candidates of the scaling, each judged by tr(D G Dᵀ), and a clip search within groups.
    # All of the others but learned rounding, before and after AWQ's scaling.
    "best": MethodCost(
        lambda out, into: 65.0 * out * into * into, 850.0, factorises=True, needs_reference=True, compiles=True
    ),
    "awq": MethodCost(lambda out, into: 42.0 * out * into * into, 60.0),
}
"""Cost by method; one that is not listed is taken as the dearest."""


def predict(
    modules: Sequence[PlannedModule],
    fused_groups: Iterable[Sequence[str]],
    workload: Workload,
    gemm_flops: float,
) -> Prediction:
    """Time, peak memory and scratch space of quantizing ``modules`` with ``workload`` at ``gemm_flops`` FLOP/s."""
    groups = [tuple(group) for group in fused_groups]
    blocks = {name: members for name, members in by_block(modules).items() if name}
    seconds = {"start": _START_SECONDS, **dict.fromkeys(("read", "forward", "statistics", "factorise", "solve"), 0.0)}
    calibrated = any(m.spec is not None and _cost(m).needs_statistics for m in modules)
    for members in blocks.values():
        for part, value in _block_seconds(members, groups, workload, gemm_flops, calibrated).items():
            seconds[part] += value
    scratch = _scratch(workload) * (2 if _runs_beside(modules) else 1)
    return Prediction(seconds, _memory(blocks, workload, calibrated), scratch if calibrated else 0)


def output_bytes(modules: Iterable[PlannedModule], dense_bytes: int, dense_itemsize: int) -> int:
    """Bytes of the finished checkpoint: modules as planned, and ``dense_bytes`` of everything else."""
    return dense_bytes + sum(module.stored_bytes(dense_itemsize) for module in modules)


def disk_bytes(output: int, prediction: Prediction) -> int:
    """Free disk that a run needs: parts and their joined copy at once, and the activation store."""
    return 2 * output + prediction.scratch


def _cost(module: PlannedModule) -> MethodCost:
    return METHOD_COSTS.get(module.method) or max(METHOD_COSTS.values(), key=lambda cost: cost.passes)


def _runs_beside(modules: Iterable[PlannedModule]) -> bool:
    """Whether the float model runs beside the quantized one for some of ``modules``."""
    return any(module.spec is not None and _cost(module).needs_reference for module in modules)


def _tokens(module: PlannedModule, workload: Workload) -> float:
    if module.is_expert and workload.experts:
        return workload.tokens * workload.experts_per_token / workload.experts
    return float(workload.tokens)


def _block_seconds(
    members: Sequence[PlannedModule],
    groups: Sequence[Sequence[str]],
    workload: Workload,
    gemm_flops: float,
    calibrated: bool,
) -> dict[str, float]:
    out = {"read": sum(m.weights for m in members) * workload.source_itemsize / workload.reads_per_second}
    if calibrated:
        flops = sum(2.0 * m.weights * _tokens(m, workload) for m in members)
        flops += 4.0 * workload.tokens * workload.seq_len * workload.heads * workload.head_dim
        repeats = 1.0 if workload.keep_states else (len(by_input(members, groups)) + 1) / 2
        models = 2.0 if _runs_beside(members) else 1.0
        out["forward"] = models * repeats * flops / (gemm_flops * _FORWARD_SHARE)
    statistics = factorise = solve = passes = 0.0
    for together in by_input(members, groups):
        planned = [m for m in together if m.spec is not None]
        if not planned:
            continue
        into = planned[0].shape[1]
        if any(_cost(m).needs_statistics for m in planned):
            products = 3.0 if _runs_beside(planned) else 1.0
            statistics += products * _tokens(planned[0], workload) * into**2
        if any(_cost(m).factorises for m in planned):
            factorise += float(into) ** 3
        solve += sum(_cost(m).flops(*m.shape) for m in planned)
        passes += sum(_cost(m).passes * m.weights for m in planned)
    out["statistics"] = statistics / gemm_flops
    out["factorise"] = factorise / (gemm_flops * _FACTOR_SHARE)
    out["solve"] = solve / gemm_flops + passes / (_ELEMENTS_PER_SECOND * max(1.0, workload.cpus))
    return out


def _memory(blocks: dict[str, list[PlannedModule]], workload: Workload, calibrated: bool) -> dict[str, int]:
    largest = max((sum(m.weights for m in members) for members in blocks.values()), default=0)
    planned = [m for members in blocks.values() for m in members if m.spec is not None]
    widest = max((m.shape[1] for m in planned), default=0)
    weights = max((m.weights for m in planned), default=0)
    memory = {
        "base": BASE_BYTES,
        "shell": workload.shell_bytes,
        # Solved matrices are kept as codes, one byte a weight, until the block is written.
        "block": largest * (workload.itemsize + 1),
        "solver": weights * 4 * 3,
    }
    if any(_cost(m).compiles for m in planned):
        memory["compiler"] = COMPILER_BYTES
    if any(_cost(m).tunes for m in planned):
        # of each weight: what it was, its offset and gradient, and what the graph keeps of its rounding
        memory["tuning"] = largest * 4 * 8
    if calibrated:
        models = 2 if _runs_beside(planned) else 1
        # beside a Gram matrix its cross product with the float model's inputs, what solves it, and the solution
        grams = _GRAMS if any(_cost(m).factorises for m in planned) else _GRAMS_SEARCHED
        memory["statistics"] = int((grams + 3 * (models - 1)) * 4 * widest**2)
        memory["activations"] = models * _in_flight(workload, widest)
        memory["block"] += (models - 1) * largest * workload.itemsize
    comes_and_goes = sum(memory.values()) - BASE_BYTES - memory.get("compiler", 0)
    memory["allocator"] = min(_KEPT_BYTES, int(_KEPT_SHARE * comes_and_goes))
    return memory


def _in_flight(workload: Workload, widest: int) -> int:
    """Bytes of intermediate states: of tokens that wait, a block's input, residual, norm output and widest
    intermediate; of the batch that is under way, what its feed-forward holds besides."""
    batch = min(workload.tokens, max(TOKENS_PER_FORWARD, workload.seq_len))
    waiting = workload.tokens if workload.keep_states else batch
    features = waiting * (3 * workload.hidden + widest) + batch * _ALIVE * widest
    return features * workload.itemsize


def _scratch(workload: Workload) -> int:
    """Bytes of the two activation stores, the block's inputs and its outputs."""
    return 2 * workload.tokens * workload.hidden * workload.itemsize
