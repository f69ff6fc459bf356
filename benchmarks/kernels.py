"""Time of each step of GPTQ and AWQ on one linear, over its floor: operations / the GEMM rate measured beside it.

    python benchmarks/kernels.py [--in 2048] [--out 5632] [--tokens 16384] [--threads N] [--repeat 3]

The floor of a step counts the multiplications it cannot avoid: half a Gram matrix (``tokens · in²``), a Cholesky factor
(``in³ / 3``), GPTQ's corrections (``out · in²``), and half of ``D G Dᵀ`` per candidate of AWQ's scale search
(``rows · in²``), of the block-diagonal part per candidate of its clip search (``2 · out · in · group``).
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch

from lowbit.formats import IntSpec
from lowbit.formats.integer import SEARCH_STEPS
from lowbit.quant import (
    AwqOptions,
    GptqOptions,
    InputStatistics,
    RtnOptions,
    factorise,
    output_error,
    round_to_nearest,
    search_scales,
    solve_gptq,
)


def seconds(action: Callable[[], object], repeat: int, clock: Callable[[], float]) -> float:
    """Shortest of ``repeat`` runs."""
    times = []
    for _ in range(repeat):
        start = clock()
        action()
        times.append(clock() - start)
    return min(times)


def gemm_rate(clock: Callable[[], float]) -> float:
    """float32 operations per second of a large matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ b, 5, clock)


def correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs ``[rows, columns]`` of low rank plus noise, with 16 channels that are far larger."""
    inputs = torch.randn(rows, columns // 8) @ torch.randn(columns // 8, columns) + torch.randn(rows, columns)
    inputs[:, :: columns // 16] *= 8
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="columns", type=int, default=2048)
    parser.add_argument("--out", dest="rows", type=int, default=5632)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds; with --threads 1 they bear a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows, columns, tokens, group = arguments.rows, arguments.columns, arguments.tokens, arguments.group
    spec = IntSpec(arguments.bits, group)
    weight = 0.02 * torch.randn(rows, columns)
    print(f"[{rows}, {columns}], {tokens} tokens, {spec}, {arguments.threads} threads")
    print(f"{'step':34} {'seconds':>8} {'floor':>8} {'over':>6}")

    def show(step: str, operations: float, action: Callable[[], object], repeat: int = arguments.repeat) -> None:
        rate = gemm_rate(clock)
        took = seconds(action, repeat, clock)
        floor = operations / rate
        over = f"{took / floor:6.2f}" if operations else "      "
        print(f"{step:34} {took:8.3f} {floor:8.3f} {over}   GEMM {rate / 1e9:.0f} GFLOP/s", flush=True)

    statistics = InputStatistics(columns)
    inputs = correlated(tokens, columns)
    show("Gram matrix", tokens * columns**2, lambda: statistics.add(inputs), 1)
    clip_operations = SEARCH_STEPS * 2 * rows * columns * group
    for method, operations in (("minmax", 0), ("mse", 0), ("gram", clip_operations)):
        options = RtnOptions("minmax" if method == "minmax" else "mse" if method == "mse" else "gram")
        round_to_nearest(weight[:64], statistics, spec, options)
        show(f"RTN {method}", operations, lambda o=options: round_to_nearest(weight, statistics, spec, o))
    for ordering in ("none", "static"):
        gptq = GptqOptions(ordering="static" if ordering == "static" else "none")
        show(f"GPTQ factorisation, {ordering}", columns**3 / 3, lambda o=gptq: factorise(statistics, o))
        factor = factorise(statistics, gptq)
        solve_gptq(weight[:64], factor, spec, gptq)
        show(f"GPTQ solve, {ordering}", rows * columns**2, lambda o=gptq, f=factor: solve_gptq(weight, f, spec, o))
        del factor
    awq = AwqOptions()
    measured = -(-rows // max(1, rows // awq.rows))
    evaluations = awq.steps // 2 + 4
    show(
        f"AWQ scale search, {measured} rows",
        evaluations * measured * columns**2,
        lambda: search_scales([weight], statistics, spec, awq),
    )
    show("output error", 2 * measured * columns**2, lambda: output_error(weight, weight * 1.01, statistics))
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
