"""``lowbit plan``: how many replicas a load needs, from what one was measured to do."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.bench import read_settings
from lowbit.cli.options import positive, seed
from lowbit.cli.output import plain, print_fields, print_table, write_json
from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.ops.bench.load import Objectives
    from lowbit.ops.fleet.model import Forecast, Replica, Work
    from lowbit.ops.fleet.simulation import Cell

HELP = "how many replicas a load needs, from a measurement of one"
EXAMPLES = """\
  lowbit bench ./Qwen3-8B-Q4_K_M.gguf --concurrency 1,2,4,8,16 --prompt-tokens 64-512 --json fleet.json
  lowbit plan fleet --bench fleet.json --rate 20 --prompt-tokens 64-512 --slo-ttft 1s --slo-itl 60ms
  lowbit plan fleet --bench fleet.json --rate 20 --gpu-price 2.5 --gpus-per-replica 2 --simulate"""

_BUSY = (0.3, 0.5, 0.7, 0.8, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("what", choices=("fleet",), help="replicas of one model")
    parser.add_argument(
        "--bench", metavar="FILE", required=True, help="of lowbit bench MODEL --concurrency 1,2,4,8 --json"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, required=True, metavar="R", help="requests per second, of all clients")
    load.add_argument("--prompt-tokens", metavar="N", default="128", help="128, 64-256 or lognormal:MEDIAN:SIGMA")
    load.add_argument("--output-tokens", metavar="N", default="64", help="likewise (default: 64)")
    goal = parser.add_argument_group("objectives")
    goal.add_argument("--slo-ttft", metavar="TIME", help="to the first token, e.g. 500ms")
    goal.add_argument("--slo-itl", metavar="TIME", help="between tokens, mean of a request")
    goal.add_argument("--slo-e2e", metavar="TIME", help="of the whole answer")
    goal.add_argument("--attainment", type=float, default=0.95, metavar="SHARE", help="of requests (default: 0.95)")
    price = parser.add_argument_group("replicas")
    price.add_argument("--slots", type=positive, metavar="N", help="requests at a time on each (default: as measured)")
    price.add_argument("--gpus-per-replica", type=int, default=1, metavar="N", help="0: priced by the machine instead")
    price.add_argument("--gpu-price", type=float, metavar="PRICE", help="of a GPU (or a machine) for an hour")
    price.add_argument(
        "--max-replicas", type=positive, default=1000, metavar="N", help="give up beyond (default: 1000)"
    )
    check = parser.add_argument_group("check")
    check.add_argument(
        "--simulate", action="store_true", help="play the load through, event by event, beside the model"
    )
    check.add_argument("--seed", type=seed, default=0, metavar="N", help="of the simulation (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="the plan as JSON; - is stdout")


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print it."""
    from lowbit.ops.bench.results import read_bench
    from lowbit.ops.fleet.model import Work, replica_of, smallest_fleet

    prompt, output, objectives = read_settings(arguments)
    _check(arguments)
    replica = replica_of(read_bench(Path(arguments.bench)), slots=arguments.slots)
    work = Work(arguments.rate, prompt, output)
    chosen, tried = smallest_fleet(replica, work, objectives, arguments.attainment, arguments.max_replicas)
    document = _document(arguments, replica, work, objectives, chosen)
    grid: list[Cell] = []
    if arguments.simulate:
        from lowbit.ops.fleet.simulation import error_grid, simulate

        requests = min(40_000, max(4000, 200 * chosen.replicas * replica.slots))
        seen = simulate(
            replica, work.rate, prompt, output, chosen.replicas, objectives, requests=requests, seed=arguments.seed
        )
        document["simulated"] = plain(seen)
        sizes = sorted({1, chosen.replicas, min(16, 2 * chosen.replicas)})
        grid = error_grid(replica, work, objectives, replicas=sizes, busy=_BUSY, seed=arguments.seed)
        document["grid"] = plain(grid)
    if arguments.json:
        write_json(document, arguments.json)
    if arguments.json != "-":
        _show(arguments, replica, work, chosen, tried, document, grid)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.rate < 1e9:
        raise UsageError(f"--rate {arguments.rate:g} is not a number of requests per second")
    if not 0 < arguments.attainment < 1:
        raise UsageError(f"--attainment {arguments.attainment:g} is not a share between 0 and 1, e.g. 0.95")
    if arguments.gpu_price is not None and not 0 <= arguments.gpu_price < math.inf:
        raise UsageError(f"--gpu-price {arguments.gpu_price:g} is not a price of an hour")
    if not 0 <= arguments.gpus_per_replica <= 1024:
        raise UsageError(f"--gpus-per-replica {arguments.gpus_per_replica} is not a number of GPUs")


def _document(
    arguments: argparse.Namespace, replica: Replica, work: Work, objectives: Objectives, chosen: Forecast
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "replicas": chosen.replicas,
        "gpus": chosen.replicas * arguments.gpus_per_replica,
        "forecast": plain(chosen),
        "replica": plain(replica),
        "rate": work.rate,
        "prompt_tokens": str(work.prompt),
        "output_tokens": str(work.output),
        "objectives": plain(objectives),
        "attainment_asked": arguments.attainment,
    }
    if arguments.gpu_price is not None:
        hour = chosen.replicas * max(1, arguments.gpus_per_replica) * arguments.gpu_price
        tokens = work.rate * work.output_mean * 3600
        found |= {"cost_per_hour": hour, "cost_per_million_output_tokens": hour / tokens * 1e6}
    return found


def _show(
    arguments: argparse.Namespace,
    replica: Replica,
    work: Work,
    chosen: Forecast,
    tried: list[Forecast],
    document: dict[str, Any],
    grid: list[Cell],
) -> None:
    rows = [_row(each) for each in tried[-4:]]
    print_table(
        ["replicas", "busy", "waits", "TTFT p50 ms", "p90", "per token ms", "p90", "E2E s", "in time"],
        rows, emphasis=[len(rows) - 1],
    )  # fmt: skip
    print()
    steps = ", ".join(f"{step * 1e3:.3g} ms at {count}" for count, step in replica.steps)
    gpus = f", {document['gpus']} GPUs" if document["gpus"] else ""
    lines = {
        "needed": f"{chosen.replicas} replicas{gpus}, {replica.slots} requests at a time on each",
        "measured": f"prompt {replica.base * 1e3:.3g} ms + {replica.per_token * 1e6:.3g} µs per token; step {steps}",
    }
    if "cost_per_hour" in document:
        million = document["cost_per_million_output_tokens"]
        lines["cost"] = f"{document['cost_per_hour']:.4g} per hour, {million:.4g} per million tokens of answers"
    if "simulated" in document:
        seen, figures = document["simulated"], document["simulated"]["figures"]
        lines["simulated"] = (
            f"TTFT p50 {figures['ttft_p50'] * 1e3:.0f} ms, p90 {figures['ttft_p90'] * 1e3:.0f} ms, "
            f"{seen['tpot'] * 1e3:.3g} ms per token, {seen['attainment']:.1%} in time"
        )
    print_fields(lines)
    if grid:
        print("\nmodel / simulation, at shares of the greatest throughput:")
        print_table(
            ["replicas", "busy", "TTFT", "p90", "per token", "p90", "E2E", "in time: model", "simulation"],
            [_errors(cell) for cell in grid],
        )


def _row(each: Forecast) -> list[str]:
    if not each.stable:
        return [str(each.replicas), f"{each.busy:.0%}", *["-"] * 7]
    return [
        str(each.replicas), f"{each.busy:.0%}", f"{each.waiting:.1%}", f"{each.ttft_p50 * 1e3:.0f}",
        f"{each.ttft_p90 * 1e3:.0f}", f"{each.tpot * 1e3:.3g}", f"{each.tpot_p90 * 1e3:.3g}", f"{each.e2e:.3g}",
        f"{each.attainment:.1%}",
    ]  # fmt: skip


def _errors(cell: Cell) -> list[str]:
    expected, seen = cell.forecast, cell.simulated
    pairs = (
        (expected.ttft, seen.ttft), (expected.ttft_p90, seen.figures["ttft_p90"]), (expected.tpot, seen.tpot),
        (expected.tpot_p90, seen.figures["tpot_p90"]), (expected.e2e, seen.e2e),
    )  # fmt: skip
    ratios = [f"{model / truth:.2f}" if truth else "-" for model, truth in pairs]
    return [
        str(cell.replicas), f"{cell.busy:.0%}", *ratios, f"{expected.attainment:.1%}", f"{seen.attainment:.1%}",
    ]  # fmt: skip
