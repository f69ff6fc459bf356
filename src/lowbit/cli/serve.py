"""``lowbit serve``: models behind one OpenAI-compatible address."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import logging
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.options import parse_bytes, positive
from lowbit.cli.output import human_bytes
from lowbit.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from lowbit.gateway.config import ServeConfig

HELP = "serve models behind one OpenAI-compatible address"
EXAMPLES = """\
  lowbit serve demo
  lowbit serve ./Qwen3-8B-Q4_K_M.gguf --context 16384 --port 9000
  lowbit serve ./Qwen3-8B --quantize int4
  lowbit serve config.yaml
  lowbit serve config.yaml --print-command      # what would run, and nothing more"""

_ENGINES = (
    "auto",
    "llama.cpp",
    "vllm",
    "encoder",
    "sglang",
    "lmdeploy",
    "tensorrt-llm",
    "tgi",
    "ollama",
    "mistral.rs",
    "mlc",
)
_NEEDED = ("aiohttp", "prometheus_client", "pydantic")
_SHARE = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "source", metavar="MODEL|CONFIG", nargs="?", help="a GGUF file, a checkpoint, 'demo', or a YAML configuration"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", help="address to listen at (default: 127.0.0.1)")
    where.add_argument("--port", type=int, help="port (default: 8000; 0: any free one)")
    where.add_argument(
        "--api-key", metavar="KEY", action="append", default=[], help="a key, env:NAME or sha256:HEX; may be repeated"
    )
    where.add_argument("--insecure", action="store_true", help="allow an address that others reach without a key")
    how = parser.add_argument_group("how one model is served")
    how.add_argument("--name", help="what clients call it (default: the name of the file or directory)")
    how.add_argument("--engine", choices=_ENGINES, default="auto", help="default: what suits the checkpoint")
    how.add_argument("--kind", choices=("chat", "embedding", "rerank"), help="what it does (default: as it looks)")
    how.add_argument("--context", type=positive, metavar="N", help="tokens of prompt and answer of each request")
    how.add_argument("--concurrency", type=positive, metavar="N", default=4, help="requests at a time (default: 4)")
    how.add_argument("--quantize", metavar="SCHEME", help="int4, int8 or a scheme such as Q5_K_M: quantize first, once")
    how.add_argument("--python", metavar="PATH", help="interpreter of the environment that has the engine (vLLM)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", type=positive, metavar="N", help="of each engine (default: cores, divided)")
    machine.add_argument("--memory", metavar="SIZE", type=parse_bytes, help="of all engines (default: 90 %% of free)")
    machine.add_argument(
        "--gpu-memory", metavar="SIZE", type=parse_bytes, help="of all engines on each GPU (default: 90 %% of free)"
    )
    machine.add_argument("--logs", metavar="DIR", help="where each engine's output goes (default: the cache directory)")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run engines and gateway on a Ray cluster: auto, HOST:6379, or local to begin one",
    )
    cluster.add_argument(
        "--preflight",
        action="store_true",
        help="ask the machine, or with --ray every node, whether it can be one of several that run a model, and leave",
    )
    parser.add_argument("--print-command", action="store_true", help="print what would run, and leave")
    parser.add_argument("--hash-key", action="store_true", help="make a key, print it and its hash, and leave")
    parser.add_argument("--log", action="store_true", help="a line of JSON for every request and event")
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    if arguments.hash_key:
        key = f"lb-{secrets.token_urlsafe(32)}"
        print(f"key:  {key}\nhash: sha256:{hashlib.sha256(key.encode()).hexdigest()}")
        return 0
    if arguments.source is None:
        raise UsageError("name a model or a configuration: lowbit serve demo")
    _require_extra()
    config = build_config(arguments)
    if arguments.preflight:
        from lowbit.ops.node_preflight import preflight_tiers

        lines, passed = preflight_tiers(config, arguments.ray)
        print("\n".join(lines))
        return 0 if passed else 2
    return asyncio.run(_main(config, arguments))


def _require_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"lowbit serve needs {', '.join(missing)}", ["pip install 'lowbit[serve]'"])


def build_config(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration of a command line: a YAML file with flags over it, or one model."""
    from lowbit.gateway.config import config_for_model, load_config, parse_config

    serve: dict[str, Any] = {}
    for name in ("host", "port", "memory", "gpu_memory", "threads", "logs"):
        if getattr(arguments, name) is not None:
            serve[name] = getattr(arguments, name)
    if arguments.api_key:
        serve["api_keys"] = [hashed(key) for key in arguments.api_key]
    if arguments.insecure:
        serve["insecure"] = True
    if arguments.source.endswith((".yaml", ".yml")):
        given = [
            name for name in ("name", "kind", "context", "quantize", "python") if getattr(arguments, name) is not None
        ]
        if given:
            raise UsageError(f"--{given[0]} is for one model; in {arguments.source} it stands with a tier")
        config = load_config(arguments.source)
        return parse_config({**config.model_dump(), **serve}, where="lowbit serve") if serve else config
    return config_for_model(
        arguments.source,
        name=arguments.name,
        engine=arguments.engine,
        context=arguments.context,
        concurrency=arguments.concurrency,
        quantize=arguments.quantize,
        python=arguments.python,
        kind=arguments.kind,
        **serve,
    )


def hashed(key: str) -> str:
    """A key as the configuration keeps it: never itself."""
    if key.startswith(("env:", "sha256:")):
        return key
    if len(key) < 8:
        raise UsageError("--api-key is shorter than 8 characters; lowbit serve --hash-key makes a good one")
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


async def _serve_on_ray(config: ServeConfig, plans: Any, facts: Any, arguments: argparse.Namespace) -> int:
    """Deploy to the cluster, then wait; the application is taken down at the end."""
    from lowbit.ops.ray_cluster import connect
    from lowbit.ops.ray_serve.application import APPLICATION, run_application

    connect(arguments.ray)
    from ray import serve

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    try:
        host, port = await asyncio.to_thread(run_application, config, plans, facts)
        if not arguments.quiet:
            print(f"lowbit serves {', '.join(config.models)} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        await ended.wait()
    finally:
        await asyncio.to_thread(serve.delete, APPLICATION)
    return 0


async def _main(config: ServeConfig, arguments: argparse.Namespace) -> int:
    from lowbit.cache import cache_directory
    from lowbit.engines.memory import available_bytes
    from lowbit.gateway.app import make_app, serve
    from lowbit.gateway.launch import idle_cores, plan_tiers, printable
    from lowbit.gateway.log import log_to
    from lowbit.gateway.placement import find_devices
    from lowbit.gateway.pool import Pool
    from lowbit.gateway.prepare import prepare

    devices = find_devices(config) if arguments.ray is None else ()
    facts = await prepare(config, devices=devices, quiet=arguments.quiet)
    logs = Path(config.logs) if config.logs is not None else cache_directory() / "logs"
    plans = plan_tiers(config, facts, logs, None if config.threads else idle_cores(), devices)
    if arguments.print_command:
        nodes = {f"{name}@{tier.name}": tier.nodes for name, model in config.models.items() for tier in model.tiers}
        for tier_id, plan in plans.items():
            there = [
                f", {human_bytes(size)} of GPU {number}" for number, size in enumerate(plan.policy.gpu_memory) if size
            ]
            print(f"# {tier_id}: {plan.facts.engine}, {human_bytes(plan.policy.memory)} of memory{''.join(there)}")
            print(printable(plan, nodes[tier_id]))
        return 0
    log_to(level=logging.INFO if arguments.log else logging.WARNING)
    if arguments.ray is not None:
        return await _serve_on_ray(config, plans, facts, arguments)
    budget = config.memory if config.memory is not None else int(_SHARE * available_bytes())
    pool = Pool(config, plans, budget, tuple(device.budget for device in devices))
    app = make_app(pool, config)
    failures: dict[str, str] = {}
    only = next(iter(plans)) if len(plans) == 1 else None

    def listen(event: str, tier_id: str, details: Any) -> None:
        if event == "load_failed" and tier_id == only and not pool.engines():
            failures[tier_id] = str(details["reason"])
            serving.cancel()
        elif not arguments.quiet and not arguments.log and event in ("ready", "loading", "load_failed"):
            print(f"{tier_id}: {event}", file=sys.stderr, flush=True)

    pool.subscribe(listen)

    def listening(host: str, port: int) -> None:
        if not arguments.quiet:
            shown = f"[{host}]" if ":" in host else host
            print(f"lowbit serves {', '.join(config.models)} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)

    serving = asyncio.create_task(serve(app, listening=listening))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        if failures:
            raise UsageError(next(iter(failures.values()))) from None
    return 0
