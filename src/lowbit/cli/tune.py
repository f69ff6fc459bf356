"""``lowbit tune``: the engine's settings that serve a workload best on this machine."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.bench import read_settings, require_serving
from lowbit.cli.options import number, positive, seed
from lowbit.cli.output import human_seconds, print_fields, print_table, write_json
from lowbit.errors import UsageError
from lowbit.ops.bench.load import parse_seconds

if TYPE_CHECKING:
    from lowbit.gateway.config import ServeConfig
    from lowbit.ops.tune.run import Tuned, Workload

HELP = "find the engine's settings that serve a workload best on this machine"
EXAMPLES = """\
  lowbit tune demo --concurrency 8 --budget 2m
  lowbit tune ./Qwen3-8B-Q4_K_M.gguf --rate 0.5 --prompt-tokens 256-1024 --output-tokens 128 --slo-ttft 2s --budget 20m
  lowbit tune config.yaml --tier assistant@int4 --concurrency 16 --shared-prefix 512 --slo-itl 80ms
  lowbit tune demo --concurrency 8 --settings threads,concurrency,batch --dry-run"""

_WHOLE = 0.98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="MODEL|CONFIG", help="a GGUF file, a checkpoint, 'demo', or a configuration")
    parser.add_argument("--tier", metavar="MODEL@TIER", help="which tier of the configuration (default: the only one)")
    work = parser.add_argument_group("workload")
    work.add_argument("--prompt-tokens", metavar="N", default="128", help="128, 64-256 or lognormal:MEDIAN:SIGMA")
    work.add_argument("--output-tokens", metavar="N", default="64", help="likewise (default: 64)")
    work.add_argument("--rate", type=float, metavar="R", help="requests per second (open loop)")
    work.add_argument("--concurrency", type=positive, metavar="N", help="requests kept under way (closed loop)")
    work.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    work.add_argument("--text", metavar="FILE", help="cut the prompts from it (default: Python's own library)")
    work.add_argument("--temperature", type=number, default=1.0, metavar="T", help="of the sampling (default: 1)")
    goal = parser.add_argument_group("goal")
    goal.add_argument(
        "--objective", choices=("goodput", "throughput", "ttft", "itl"), default="goodput",
        help="answers in time per second (default), tokens per second, or a 90th percentile",
    )  # fmt: skip
    goal.add_argument("--slo-ttft", metavar="TIME", help="objective: to the first token, e.g. 500ms")
    goal.add_argument("--slo-itl", metavar="TIME", help="objective: between tokens, mean of a request")
    goal.add_argument("--slo-e2e", metavar="TIME", help="objective: of the whole answer")
    search = parser.add_argument_group("search")
    search.add_argument("--budget", metavar="TIME", default="5m", help="time to take (default: 5m)")
    search.add_argument(
        "--requests", type=positive, metavar="N", help="of a measurement (default: as the budget allows)"
    )
    search.add_argument("--settings", metavar="LIST", help="try only these: threads,concurrency,batch …")
    search.add_argument("--allow-lossy", action="store_true", help="also a KV cache of fewer bits: answers change")
    search.add_argument("--dedicated", action="store_true", help="nothing else runs here: also threads that spin")
    search.add_argument("--context", type=positive, metavar="N", help="of a MODEL: tokens of each request")
    search.add_argument("--seed", type=seed, default=0, metavar="N", help="of requests and order (default: 0)")
    out = parser.add_argument_group("results")
    out.add_argument("--out", metavar="FILE", help="write here (default: the configuration itself, or NAME.yaml)")
    out.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    out.add_argument("--dry-run", action="store_true", help="write nothing")
    out.add_argument("--json", metavar="FILE", help="everything measured; - is stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Search, say what was found, write it down."""
    require_serving("lowbit tune")
    from lowbit.ops.bench.prompts import source_text
    from lowbit.ops.tune.run import tune

    config, where = _config(arguments)
    workload, objectives = _workload(arguments)
    budget = parse_seconds(arguments.budget, "--budget")
    only = _settings(arguments)
    out = _destination(arguments)
    text = source_text(arguments.text)
    tuned = asyncio.run(
        tune(
            config,
            workload,
            objectives=objectives,
            objective=arguments.objective,
            budget=budget,
            text=text,
            allow_lossy=arguments.allow_lossy,
            dedicated=arguments.dedicated,
            only=only,
            seed=arguments.seed,
            quiet=arguments.quiet,
            say=(lambda line: None) if arguments.quiet else lambda line: print(line, file=sys.stderr, flush=True),
        )
    )
    written = _write(arguments, config, where, tuned, out) if tuned.adopted and out is not None else None
    if arguments.json:
        write_json({**_summary(tuned), "scores": tuned.scores, "failed": tuned.failed}, arguments.json)
    if arguments.json != "-":
        _show(tuned, written)
    return 0


def _config(arguments: argparse.Namespace) -> tuple[ServeConfig, tuple[str, str]]:
    """The configuration reduced to the tier in question, and the names of model and tier."""
    from lowbit.gateway.config import config_for_model, load_config

    if not arguments.source.endswith((".yaml", ".yml")):
        if arguments.tier:
            raise UsageError("--tier is for a configuration; a model has one tier")
        config = config_for_model(arguments.source, context=arguments.context)
    else:
        if arguments.context:
            raise UsageError(f"--context is for a model; in {arguments.source} it stands with the tier")
        config = load_config(arguments.source)
    names = [(name, tier.name) for name, model in config.models.items() for tier in model.tiers if tier.path]
    if arguments.tier:
        wanted = tuple(arguments.tier.rpartition("@")[::2])
        if wanted not in names:
            raise UsageError(f"--tier {arguments.tier}: there are {', '.join('@'.join(pair) for pair in names)}")
    elif len(names) == 1:
        wanted = names[0]
    else:
        known = ", ".join("@".join(pair) for pair in names) or "none with a path"
        raise UsageError(f"{arguments.source}: say which tier with --tier MODEL@TIER: {known}")
    model = config.models[wanted[0]]
    (tier,) = (each for each in model.tiers if each.name == wanted[1])
    alone = model.model_copy(update={"tiers": [tier]})
    return config.model_copy(update={"models": {wanted[0]: alone}}), (wanted[0], wanted[1])


def _workload(arguments: argparse.Namespace) -> tuple[Workload, Any]:
    from lowbit.ops.bench.serving import Level, Load
    from lowbit.ops.tune.run import Workload

    prompt, output, objectives = read_settings(arguments)
    if (arguments.rate is None) == (arguments.concurrency is None):
        raise UsageError("describe the load: --rate R (requests per second) or --concurrency N (requests under way)")
    if arguments.rate is not None and not 0 < arguments.rate < 1e6:
        raise UsageError(f"--rate {arguments.rate:g} is not a number of requests per second")
    if arguments.shared_prefix < 0:
        raise UsageError("--shared-prefix is a whole number of zero or more")
    level = Level(rate=arguments.rate, clients=arguments.concurrency)
    load = Load(prompt, output, count=arguments.requests)
    return Workload(load, level, arguments.shared_prefix, arguments.temperature), objectives


def _settings(arguments: argparse.Namespace) -> tuple[str, ...]:
    from lowbit.ops.tune.run import SETTINGS

    if arguments.settings is None:
        return SETTINGS
    names = tuple(name.strip() for name in arguments.settings.split(","))
    for name in names:
        if name not in SETTINGS:
            raise UsageError(f"--settings {name!r} is none of {', '.join(SETTINGS)}")
    if "kv_dtype" in names and not arguments.allow_lossy:
        raise UsageError("--settings kv_dtype changes answers: say --allow-lossy too")
    return names


def _destination(arguments: argparse.Namespace) -> Path | None:
    """The file to write, None for none; said before the search what would keep it from being written."""
    from lowbit.ops.bench.results import check_writable

    if arguments.dry_run:
        return None
    if arguments.source.endswith((".yaml", ".yml")):
        out = Path(arguments.out or arguments.source)
        new = arguments.out is not None
    else:
        name = re.sub(r"[^A-Za-z0-9._\-]", "-", Path(arguments.source).name.removesuffix(".gguf")) or "model"
        out, new = Path(arguments.out or f"{name}.yaml"), True
    if new and out.exists() and not arguments.overwrite:
        raise UsageError(f"{out}: is there already: say --overwrite, or another --out")
    check_writable([out])
    return out


def _write(arguments: argparse.Namespace, config: ServeConfig, where: tuple[str, str], tuned: Tuned, out: Path) -> Path:
    """Write the winner's settings with the evidence."""
    from lowbit.ops.bench.results import write_file
    from lowbit.ops.tune.config import edit_tier, new_config, tier_changes

    changes = tier_changes(dict(tuned.winner.changes), tuned.evidence())
    if arguments.source.endswith((".yaml", ".yml")):
        text = edit_tier(Path(arguments.source).read_text(encoding="utf-8"), *where, changes, arguments.source)
    else:
        tier = config.models[where[0]].tiers[0]
        given = tier.model_dump(include={"name", "path", "context", "concurrency"})
        if given["path"] != "demo":
            given["path"] = str(Path(given["path"]).absolute())
        text = new_config(where[0], given, changes)
    write_file(out, text.encode())
    return out


def _summary(tuned: Tuned) -> dict[str, Any]:
    return {
        "winner": tuned.winner.name,
        "changes": dict(tuned.winner.changes),
        "adopted": tuned.adopted,
        "default": tuned.default.to_json(),
        "tuned": tuned.tuned.to_json(),
        "ratio": tuned.ratio,
        "p": tuned.p,
        "verdict": tuned.verdict,
        "attainment": list(tuned.attainment),
        "objective": tuned.objective,
        "workload": tuned.workload,
        "objectives": tuned.objectives,
        "machine": tuned.machine,
        "kl_divergence_at_least": tuned.kl,
        "date": tuned.date,
        "seconds": tuned.seconds,
    }


def _show(tuned: Tuned, written: Path | None) -> None:
    """The table of the races, the last comparison, and what became of it."""
    base = tuned.scores.get("default", 0.0)
    ranked = sorted(tuned.scores.items(), key=lambda pair: -pair[1])
    rows = [[name, f"{score:.4g}", f"{score / base:.3f}" if base else "-"] for name, score in ranked]
    rows += [[name, "-", "cannot run"] for name in tuned.failed]
    print_table(["in the races", tuned.default.unit, "of default"], rows, emphasis=[0])
    print()
    lines = {}
    for name, figure, attained in (
        ("default", tuned.default, tuned.attainment[0]),
        (tuned.winner.name, tuned.tuned, tuned.attainment[1]),
    ):
        low, high = figure.spread
        shown = f"{figure.median:.4g} {figure.unit} ({low:.4g} to {high:.4g}), {attained:.0%} in time"
        lines[name] = f"{shown}, {len(figure.values)} runs"
    lines["ratio"] = f"{tuned.ratio:.3f} (p {tuned.p:.3f}), {human_seconds(tuned.seconds)} in all"
    if tuned.kl is not None:
        lines["quality"] = f"the KV cache's type costs a KL divergence of at least {tuned.kl:.4g} nats"
    print_fields(lines)
    if not tuned.adopted:
        print("nothing was left to gain: the best change does not beat the default beyond the spread")
        if tuned.objective == "goodput" and tuned.attainment[0] >= _WHOLE and "rate" in tuned.workload:
            print("the default answers all of this rate in time; a higher --rate would tell settings apart")
    elif written is not None:
        print(f"written to {written}: lowbit serve {written}")
    else:
        print("not written (--dry-run): " + ", ".join(f"{key}: {value}" for key, value in tuned.winner.changes))
