"""``lowbit bench``: how fast models are, alone and under load."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.options import number, positive, seed
from lowbit.cli.output import human_bytes, plain, print_table
from lowbit.errors import UnsupportedError, UsageError
from lowbit.ops.bench.load import Lengths, Objectives, parse_lengths, parse_rates, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.ops.bench.results import Bench, Run
    from lowbit.ops.bench.serving import Level
    from lowbit.ops.bench.stats import Figure

HELP = "measure memory, latency and throughput of models, alone or under load"
EXAMPLES = """\
  lowbit bench demo
  lowbit bench demo --quantize none,int8,int4 --repeats 7 --out bench/
  lowbit bench ./Qwen3-8B ./Qwen3-8B-Q4_K_M.gguf --prompt-tokens 512 --output-tokens 128 --json run.json
  lowbit bench ./Qwen3-8B-Q4_K_M.gguf --concurrency 1,2,4,8 --json fleet.json
  lowbit bench --url http://127.0.0.1:8000 --model assistant --rate 1,2,4 --slo-ttft 500ms --slo-itl 50ms
  lowbit bench --compare before.json after.json"""

_NEEDED = ("aiohttp", "pydantic")
_SERVING = ("rate", "concurrency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("models", metavar="MODEL", nargs="*", help="GGUF files, checkpoints, or 'demo'")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="two runs: ratios, and what is noise")
    work = parser.add_argument_group("work")
    work.add_argument("--prompt-tokens", metavar="N", default="128", help="128, 64-256 or lognormal:MEDIAN:SIGMA")
    work.add_argument("--output-tokens", metavar="N", default="64", help="likewise (default: 64)")
    work.add_argument("--repeats", type=positive, metavar="N", help="rounds (default: 5; under load 3)")
    work.add_argument("--warmup", type=int, default=1, metavar="N", help="requests that do not count (default: 1)")
    work.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    work.add_argument("--text", metavar="FILE", help="cut the prompts from it (default: Python's own library)")
    work.add_argument("--temperature", type=number, default=1.0, metavar="T", help="of the sampling (default: 1)")
    work.add_argument("--seed", type=seed, default=0, metavar="N", help="of prompts, arrivals and order (default: 0)")
    engine = parser.add_argument_group("models started here")
    engine.add_argument("--quantize", metavar="LIST", help="each model at each of: none, int8, int4, Q5_K_M …")
    engine.add_argument("--threads", type=positive, metavar="N", help="of the engine (default: as lowbit serve)")
    engine.add_argument("--parallel", type=positive, metavar="N", help="requests at a time, under load (default: 4)")
    engine.add_argument("--kv-dtype", metavar="NAME", help="of the cache: f16 (default), q8_0 …")
    served = parser.add_argument_group("load")
    served.add_argument("--url", help="a server that runs already, instead of models")
    served.add_argument("--model", metavar="NAME", help="what that server calls the model")
    served.add_argument("--rate", metavar="LIST", help="requests per second, open loop: 1,2,4")
    served.add_argument("--concurrency", metavar="LIST", help="requests kept under way instead, closed loop: 1,4,16")
    served.add_argument("--duration", metavar="TIME", help="of each run (default: 30s)")
    served.add_argument("--requests", type=positive, metavar="N", help="of each run, instead of --duration")
    served.add_argument("--slo-ttft", metavar="TIME", help="objective: to the first token, e.g. 500ms")
    served.add_argument("--slo-itl", metavar="TIME", help="objective: between tokens, mean of a request")
    served.add_argument("--slo-e2e", metavar="TIME", help="objective: of the whole answer")
    served.add_argument("--api", choices=("chat", "completions"), default="chat", help="route of --url (default: chat)")
    served.add_argument("--api-key", metavar="KEY", help="for --url; env:NAME reads it from the environment")
    served.add_argument("--timeout", metavar="TIME", default="300s", help="of one answer (default: 300s)")
    served.add_argument("--keep-alive", action="store_true", help="reuse connections to --url")
    out = parser.add_argument_group("results")
    out.add_argument("--out", metavar="DIR", help="bench.json, bench.csv and the pictures")
    out.add_argument("--json", metavar="FILE", help="all figures; - is stdout")
    out.add_argument("--csv", metavar="FILE", help="a line for each figure")
    out.add_argument("--plot", metavar="DIR", help="the pictures alone")
    out.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Measure, or compare two measurements."""
    if arguments.compare:
        return _compare(*arguments.compare)
    require_serving("lowbit bench")
    settings = read_settings(arguments)
    _check(arguments)
    bench = asyncio.run(_measure(arguments, settings))
    failed = sum(sum(each.failures.values()) for each in bench.runs)
    if bench.kind == "serving" and failed == sum(len(each.requests) for each in bench.runs):
        raise UsageError("not one request was answered: " + next(iter(bench.runs[0].failures), "no arrivals in time"))
    _write(bench, arguments)
    if arguments.json != "-":
        show(bench)
    return 0


def require_serving(verb: str) -> None:
    """Raise :class:`UnsupportedError` where the packages of the extra ``serve`` are absent."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"{verb} needs {', '.join(missing)}", ["pip install 'lowbit[serve]'"])


def read_settings(arguments: argparse.Namespace) -> tuple[Lengths, Lengths, Objectives]:
    """Lengths and objectives of a command line. Raises :class:`UsageError` naming the flag."""
    limits = {
        name: parse_seconds(value, f"--slo-{name}") if (value := getattr(arguments, f"slo_{name}")) else None
        for name in ("ttft", "itl", "e2e")
    }
    prompt = parse_lengths(arguments.prompt_tokens, "--prompt-tokens")
    output = parse_lengths(arguments.output_tokens, "--output-tokens")
    return prompt, output, Objectives(**limits)


def _check(arguments: argparse.Namespace) -> None:
    """What cannot work is said before anything is started."""
    from lowbit.ops.bench.results import check_writable

    if bool(arguments.models) == bool(arguments.url):
        raise UsageError("name models to start, or a server with --url: lowbit bench demo")
    if arguments.url and not arguments.url.startswith(("http://", "https://")):
        raise UsageError(f"--url {arguments.url!r} is not an http(s) url")
    if arguments.url and not arguments.model:
        raise UsageError("--url needs --model, the name that the server knows it by")
    ours = [name for name in ("quantize", "threads", "parallel", "kv_dtype") if getattr(arguments, name) is not None]
    if arguments.url and ours:
        raise UsageError(f"--{ours[0].replace('_', '-')} is for models started here; the server at --url has its own")
    if arguments.rate and arguments.concurrency:
        raise UsageError("--rate (open loop) and --concurrency (closed loop) exclude each other")
    if arguments.warmup < 0 or arguments.shared_prefix < 0:
        raise UsageError("--warmup and --shared-prefix are whole numbers of zero or more")
    loaded = bool(arguments.url or arguments.rate or arguments.concurrency)
    given = [name for name in ("duration", "requests", "parallel") if getattr(arguments, name) is not None]
    if given and not loaded:
        raise UsageError(f"--{given[0]} is for a test under load: give --rate or --concurrency too")
    if arguments.duration and arguments.requests:
        raise UsageError("--duration and --requests exclude each other")
    if len(arguments.models) * len(_schemes(arguments)) > 1 and loaded:
        raise UsageError("under load one model at a time: a run each, then lowbit bench --compare A.json B.json")
    files = [Path(name) for name in (arguments.json, arguments.csv) if name and name != "-"]
    check_writable([*files, *(Path(each) / "bench.json" for each in (arguments.out, arguments.plot) if each)])


def _schemes(arguments: argparse.Namespace) -> list[str | None]:
    names = [name.strip() for name in (arguments.quantize or "none").split(",")]
    if not all(names):
        raise UsageError(f"--quantize {arguments.quantize!r}: write e.g. none,int8,int4")
    return [None if name.lower() == "none" else name for name in names]


async def _measure(arguments: argparse.Namespace, settings: tuple[Lengths, Lengths, Objectives]) -> Bench:
    from lowbit import __version__
    from lowbit.ops.bench.prompts import source_text
    from lowbit.ops.bench.results import Bench, machine_facts

    prompt, output, objectives = settings
    say = (lambda line: None) if arguments.quiet else lambda line: print(line, file=sys.stderr, flush=True)
    text = source_text(arguments.text)
    loaded = bool(arguments.url or arguments.rate or arguments.concurrency)
    asked = {
        "prompt_tokens": str(prompt),
        "output_tokens": str(output),
        "shared_prefix": arguments.shared_prefix,
        "warmup": arguments.warmup,
        "repeats": arguments.repeats or (3 if loaded else 5),
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    machine = machine_facts()
    if not loaded:
        runs = await _offline(arguments, prompt, output, asked["repeats"], text, say)
        return Bench("offline", asked, machine, tuple(runs), lowbit_version=__version__)
    runs, more = await _serving(arguments, prompt, output, objectives, asked["repeats"], text, say)
    asked |= {"objectives": plain(objectives), **more}
    return Bench("serving", asked, machine, tuple(runs), lowbit_version=__version__)


async def _offline(
    arguments: argparse.Namespace, prompt: Lengths, output: Lengths, repeats: int, text: str, say: Any
) -> list[Run]:
    from lowbit.ops.bench.engine import bench_offline, context_for, prepare_models

    models = await prepare_models(
        [(source, scheme) for source in arguments.models for scheme in _schemes(arguments)],
        context=context_for(prompt, output),
        concurrency=1,
        threads=arguments.threads,
        kv_dtype=arguments.kv_dtype,
        quiet=arguments.quiet,
    )
    return await bench_offline(
        models,
        prompt=prompt,
        output=output,
        repeats=repeats,
        warmup=arguments.warmup,
        text=text,
        temperature=arguments.temperature,
        seed=arguments.seed,
        say=say,
    )


async def _serving(
    arguments: argparse.Namespace,
    prompt: Lengths,
    output: Lengths,
    objectives: Objectives,
    repeats: int,
    text: str,
    say: Any,
) -> tuple[list[Run], dict[str, Any]]:
    """The runs, and what else was set."""
    from lowbit.ops.bench.client import Target
    from lowbit.ops.bench.engine import context_for, prepare_models, running
    from lowbit.ops.bench.serving import Load, bench_serving, fit_to_server

    levels = _levels(arguments)
    seconds = None if arguments.requests else parse_seconds(arguments.duration or "30s", "--duration")
    load = Load(prompt, output, seconds, arguments.requests)
    timeout = parse_seconds(arguments.timeout, "--timeout")
    common: dict[str, Any] = {"repeats": repeats, "warmup": arguments.warmup, "seed": arguments.seed, "say": say}
    more = {"seconds": seconds, "requests": arguments.requests, "loop": "open" if levels[0].rate else "closed"}
    if arguments.url:
        url = arguments.url.rstrip("/").removesuffix("/v1")
        extra = {"ignore_eos": True, "temperature": arguments.temperature}
        target = Target(url, arguments.model, arguments.api, _bearer(arguments.api_key), extra, timeout)
        target, prompts = await fit_to_server(target, text, shared=arguments.shared_prefix, say=say)
        keep = arguments.keep_alive
        runs = await bench_serving(target, prompts, levels, load, objectives, keep_alive=keep, **common)
        return runs, {**more, "url": url, "model": arguments.model, "api": arguments.api}
    (scheme,) = _schemes(arguments)
    parallel = arguments.parallel or max([4, *(level.clients or 0 for level in levels)])
    (model,) = await prepare_models(
        [(arguments.models[0], scheme)],
        context=context_for(prompt, output),
        concurrency=parallel,
        threads=arguments.threads,
        kv_dtype=arguments.kv_dtype,
        quiet=arguments.quiet,
    )
    async with running(
        model, text, shared=arguments.shared_prefix, temperature=arguments.temperature, timeout=timeout
    ) as engine:
        facts = {"parallel": parallel, **model.describe()}
        runs = await bench_serving(engine.target, engine.prompts, levels, load, objectives, facts=facts, **common)
    return runs, {**more, "model": model.name}


def _levels(arguments: argparse.Namespace) -> Sequence[Level]:
    from lowbit.ops.bench.serving import Level

    if arguments.concurrency:
        clients = parse_rates(arguments.concurrency, "--concurrency")
        if not all(each.is_integer() for each in clients):
            raise UsageError(f"--concurrency {arguments.concurrency!r}: write whole numbers, e.g. 1,4,16")
        found = [Level(clients=int(each)) for each in clients]
    else:
        found = [Level(rate=rate) for rate in parse_rates(arguments.rate or "1", "--rate")]
    if len({level.name for level in found}) < len(found):
        raise UsageError("--rate and --concurrency name each level once")
    return found


def _bearer(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if key.startswith("env:"):
        value = os.environ.get(key.removeprefix("env:"))
        if not value:
            raise UsageError(f"--api-key {key}: that environment variable is not set")
        key = value
    return {"Authorization": f"Bearer {key}"}


def _write(bench: Bench, arguments: argparse.Namespace) -> None:
    from lowbit.checkpoint.files import dump_json
    from lowbit.ops.bench.results import to_csv, write_file

    document = dump_json(bench.to_json(), allow_nan=False)
    if arguments.json == "-":
        print(document.decode(), end="")
    directory = Path(arguments.out) if arguments.out else None
    for path in ([Path(arguments.json)] if arguments.json not in (None, "-") else []) + (
        [directory / "bench.json"] if directory else []
    ):
        write_file(path, document)
    for path in ([Path(arguments.csv)] if arguments.csv else []) + ([directory / "bench.csv"] if directory else []):
        write_file(path, to_csv(bench).encode())
    for each in (arguments.out, arguments.plot):
        if each:
            from lowbit.ops.bench.plots import draw_bench

            draw_bench(Path(each), bench)


def show(bench: Bench) -> None:
    """Print the table: medians, with half the distance of the quartiles behind ±."""
    offline = {
        "load s": ("load", 1.0), "memory": ("memory", 0.0), "TTFT ms": ("ttft", 1e3), "ITL p50 ms": ("itl_p50", 1e3),
        "p90": ("itl_p90", 1e3), "p99": ("itl_p99", 1e3), "prefill tok/s": ("prefill", 1.0),
        "decode tok/s": ("decode", 1.0),
    }  # fmt: skip
    serving = {
        "TTFT p50 ms": ("ttft_p50", 1e3), "p90": ("ttft_p90", 1e3), "p99": ("ttft_p99", 1e3),
        "ITL p50 ms": ("itl_p50", 1e3), " p99": ("itl_p99", 1e3), "E2E p50 s": ("e2e_p50", 1.0),
        "tok/s": ("output_tokens_per_second", 1.0), "answers/s": ("requests_per_second", 1.0),
        "goodput/s": ("goodput", 1.0), "in time": ("attainment", 1.0),
    }  # fmt: skip
    columns = offline if bench.kind == "offline" else serving
    header = ["", *columns, *(["bits", "KL", "perplexity"] if bench.kind == "offline" else ["failed"])]
    rows = []
    for run in bench.runs:
        cells = [_cell(run.figures[key], factor) for key, factor in columns.values()]
        if bench.kind == "offline":
            cells += [_plain(run.facts.get(key)) for key in ("bits_per_weight", "kl_divergence", "perplexity")]
        else:
            cells.append(", ".join(f"{count} {kind}" for kind, count in run.failures.items()) or "0")
        rows.append([run.name, *cells])
    print_table(header, rows)
    repeats = bench.settings["repeats"]
    print(f"medians of {repeats} rounds, ± half the distance between the quartiles")


def _cell(figure: Figure, factor: float) -> str:
    low, high = figure.spread
    if math.isnan(figure.median):
        return "-"
    if not factor:
        return human_bytes(figure.median)
    return f"{figure.median * factor:.4g} ±{(high - low) / 2 * factor:.2g}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _compare(first: str, second: str) -> int:
    from lowbit.ops.bench.compare import compare
    from lowbit.ops.bench.results import read_bench

    before, after = read_bench(Path(first)), read_bench(Path(second))
    rows = compare(before, after)
    print_table(
        ["", "figure", "A", "B", "B / A", "p", "B is"],
        [
            [
                row.run,
                row.figure,
                f"{row.before:.4g}",
                f"{row.after:.4g}",
                f"{row.ratio:.3f}",
                f"{row.p:.3f}",
                row.verdict,
            ]
            for row in rows
        ],
    )
    for name in ("prompt_tokens", "output_tokens", "shared_prefix", "temperature"):
        if before.settings.get(name) != after.settings.get(name):
            print(f"note: {name} was {before.settings.get(name)} in A and {after.settings.get(name)} in B")
    if before.machine.get("cpu") != after.machine.get("cpu"):
        print(f"note: A ran on {before.machine.get('cpu')}, B on {after.machine.get('cpu')}")
    print(
        "p: chance of such ranks were there no difference (exact Mann-Whitney test over the repeats; below 0.05 counts)"
    )
    return 0
