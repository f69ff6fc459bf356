"""Does ``lowbit fit`` keep what it promises? On the embedded model, held-out text:

    python benchmarks/fit.py [--work DIR] [--json FILE] [--assignments 20] [--tokens 16384]

`ranking`: predicted against measured KL divergence of random assignments of number formats and methods (Spearman's rank
correlation). `uniform`: a fit against every uniform scheme of the same size, by GPTQ (ratio of the measured
divergences), and against a fit that has GPTQ alone. `mixes`: GGUF fits against named mixes of llama.cpp, both by lowbit
with an importance matrix, in files of the same size. `caches`: what llama.cpp's key-value caches of few bits cost,
simulated against the engine itself.

With --work, what an interrupted run has made is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from memory import served

import lowbit
from lowbit.calibration import load_calibration, load_tokenizer
from lowbit.checkpoint.location import DEMO_DIRECTORY
from lowbit.engines.flags import EngineFlags
from lowbit.evaluation.evaluate import evaluate_all
from lowbit.pipeline.fit import Fit, Measurement, choose, measure, measure_caches
from lowbit.pipeline.fit_candidates import name_choice, split_choice

CANDIDATES = (
    "int2-g64-sym", "int3-g64-sym", "int3-g128-sym", "int4-g128-sym", "int4-g64-sym", "int4-g32-sym", "int5-g128-sym",
    "int6-g128-sym", "int8-g128-sym",
)  # fmt: skip
FINER = (
    *("int2-g32-sym", "int3-g32-sym", "int5-g64-sym", "int5-g32-sym", "int6-g64-sym", "int6-g32-sym", "int7-g128-sym"),
)
"""What a fit beside uniform schemes may choose too: sizes between theirs."""
UNIFORM = ("int3-g128-sym", "int4-g128-sym", "int4-g64-sym", "int4-g32-sym", "int5-g128-sym", "int6-g128-sym")
MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
METHOD = "gptq"
"""By which uniform schemes are solved."""
AT_A_TIME = 2
"""Models that are evaluated together, between which the figures are kept."""
CALIBRATION: dict[str, Any] = {"samples": 64, "seq_len": 512}
WINDOWS, WINDOW, STEP = 16, 256, 16
"""Windows of text for caches, their tokens, and how far apart the positions lie that the engine is asked about."""
VOCABULARY = 2048
"""Tokens of the embedded model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--assignments", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--only", nargs="+", choices=("ranking", "uniform", "mixes", "caches"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        parts = {
            "ranking": lambda: ranking(measured(work), work, arguments.assignments, arguments.tokens),
            "uniform": lambda: uniform(measured(work, FINER), work, arguments.tokens),
            "mixes": lambda: mixes(work, arguments.tokens),
            "caches": lambda: caches(work),
        }
        found = {name: part() for name, part in parts.items() if not arguments.only or name in arguments.only}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def measured(work: Path, more: tuple[str, ...] = ()) -> Measurement:
    file = work / ("finer.json" if more else "measurement.json")
    if not file.exists():
        measure("demo", candidates=(*CANDIDATES, *more), work=work / "measuring").save(file)
    return Measurement.load(file)


def assignment(measurement: Measurement, names: list[str]) -> Fit:
    """The fit that gives group ``i`` the candidate ``names[i]``."""
    picked = [group.candidates[name] for group, name in zip(measurement.groups, names, strict=True)]
    return Fit(
        choices={m: name for g, name in zip(measurement.groups, names, strict=True) for m in g.modules},
        bytes=sum(one.bytes for one in picked) + measurement.other_bytes,
        divergence=sum(one.divergence for one in picked),
        bits_per_weight=8 * sum(one.bytes for one in picked) / measurement.weights,
    )


def divergences(measurement: Measurement, fits: dict[str, Fit], work: Path, tokens: int) -> dict[str, float]:
    """Measured KL divergence of each fit, in nats per token of held-out text."""
    for name, one in fits.items():
        if not (work / name).exists():
            recipe = one.recipe(measurement)
            lowbit.quantize("demo", work / name, recipe=recipe, certify_tokens=0, overwrite=True, **CALIBRATION)
    return dict(zip(fits, evaluated([work / name for name in fits], work, tokens), strict=True))


def evaluated(paths: list[Path], work: Path, tokens: int) -> list[float]:
    """KL divergence of each checkpoint, kept in ``work``."""
    file = work / f"divergences-{tokens}.json"
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    missing = [path for path in paths if path.name not in known]
    for first in range(0, len(missing), AT_A_TIME):
        part = missing[first : first + AT_A_TIME]
        found = evaluate_all(part, against="demo", max_tokens=tokens)
        known |= {path.name: float(e.kl_divergence or 0.0) for path, e in zip(part, found, strict=True)}
        file.write_text(json.dumps(known, indent=1) + "\n")
    return [known[path.name] for path in paths]


def ranking(measurement: Measurement, work: Path, count: int, tokens: int) -> dict[str, Any]:
    draw = random.Random(0)
    fits = {}
    for index in range(count):
        # Each assignment has a middle of its own, so that they differ in more than the luck of the draw.
        middle = draw.uniform(1, len(CANDIDATES) - 2)
        formats = [
            CANDIDATES[min(len(CANDIDATES) - 1, max(0, round(draw.gauss(middle, 1.5))))] for _ in measurement.groups
        ]
        names = [draw.choice([one for one in measurement.candidates if split_choice(one)[0] == f]) for f in formats]
        fits[f"random-{index:02d}"] = assignment(measurement, names)
    true = divergences(measurement, fits, work, tokens)
    predicted, values = [one.divergence for one in fits.values()], list(true.values())
    correlation = float(np.corrcoef(_ranks(predicted), _ranks(values))[0, 1])
    for (name, one), value in zip(fits.items(), values, strict=True):
        print(f"{name}  {one.bits_per_weight:6.3f} bits  predicted {one.divergence:.5f}  measured {value:.5f}")
    ratio = float(np.median(np.array(values) / np.array(predicted)))
    print(f"Spearman {correlation:.3f} over {count} random assignments; measured / predicted {ratio:.2f} (median)")
    return {"spearman": correlation, "predicted": predicted, "measured": values}


def _ranks(values: list[float]) -> np.ndarray[Any, np.dtype[np.intp]]:
    return np.argsort(np.argsort(values))


def uniform(measurement: Measurement, work: Path, tokens: int) -> list[dict[str, Any]]:
    fits: dict[str, Fit] = {}
    alone = by_one_method(measurement)
    for name in UNIFORM:
        same = assignment(measurement, [name_choice(name, METHOD)] * len(measurement.groups))
        fits[f"uniform-{name}"] = same
        fits[f"fit-{name}"] = choose(measurement, bits_per_weight=same.bits_per_weight)
        fits[f"fit-{METHOD}-{name}"] = choose(alone, bits_per_weight=same.bits_per_weight)
    true = divergences(measurement, fits, work, tokens)
    rows = []
    for name in UNIFORM:
        a, b, c = true[f"uniform-{name}"], true[f"fit-{name}"], true[f"fit-{METHOD}-{name}"]
        bits = fits[f"fit-{name}"].bits_per_weight
        row = {"uniform": name, "bits_per_weight": bits, "uniform_kl": a, "fit_kl": b, "ratio": b / a}
        rows.append({**row, "one_method_kl": c})
        print(f"{name:14}  {bits:6.3f} bits  uniform {a:.5f}  fit {b:.5f}  ratio {b / a:.2f}  {METHOD} alone {c:.5f}")
    return rows


def by_one_method(measurement: Measurement) -> Measurement:
    """The measurement without the candidates of other methods."""
    groups = tuple(
        replace(group, candidates={n: m for n, m in group.candidates.items() if split_choice(n)[1] in (METHOD, None)})
        for group in measurement.groups
    )
    return replace(measurement, groups=groups)


def mixes(work: Path, tokens: int) -> list[dict[str, Any]]:
    file, paths, sizes = work / "gguf-measurement.json", [], []
    if not file.exists():
        measure("demo", format="gguf", work=work / "measuring").save(file)
    for name in MIXES:
        path = work / f"{name}.gguf"
        if not path.exists():
            lowbit.quantize("demo", path, scheme=name, imatrix="auto", certify_tokens=0, overwrite=True, **CALIBRATION)
        sizes.append(path.stat().st_size)
        paths.append(path)
    for name, size in zip(MIXES, sizes, strict=True):
        path = work / f"fit-{name}.gguf"
        if not path.exists():
            lowbit.fit("demo", path, size=size, measurements=file, certify_tokens=0, **CALIBRATION)
        paths.append(path)
    divergences = evaluated(paths, work, tokens)
    rows = []
    for name, path, a, b in zip(MIXES, paths[len(MIXES) :], divergences, divergences[len(MIXES) :], strict=False):
        size = path.stat().st_size
        mix_size = (work / f"{name}.gguf").stat().st_size
        rows.append({"mix": name, "bytes": mix_size, "fit_bytes": size, "mix_kl": a, "fit_kl": b, "ratio": b / a})
        print(f"{name:8}  {mix_size:9,} bytes  KL {a:.5f}   fit {size:9,} bytes  KL {b:.5f}   ratio {b / a:.2f}")
    return rows


def caches(work: Path) -> list[dict[str, Any]]:
    path = work / "F16.gguf"
    if not path.exists():
        lowbit.quantize("demo", path, scheme="F16", certify_tokens=0)
    simulated = measure_caches("demo", ("q8_0", "q4_0"), samples=WINDOWS, seq_len=WINDOW)
    ids = load_calibration("demo", load_tokenizer(DEMO_DIRECTORY), samples=WINDOWS, seq_len=WINDOW, seed=42).ids
    own = engine_logprobs(path, "f16", ids.tolist())
    rows = []
    for name, expected in simulated.items():
        other = engine_logprobs(path, name, ids.tolist())
        true = float((np.exp(own) * (own - other)).sum(-1).mean())
        rows.append({"cache": name, "simulated_kl": expected, "engine_kl": true, "ratio": expected / true})
        print(f"{name:5}  simulated {expected:.6f}  llama.cpp {true:.6f}  ratio {expected / true:.2f}")
    return rows


def engine_logprobs(path: Path, kind: str, windows: list[list[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 ``[positions, vocabulary]``: what llama.cpp predicts after the beginnings of each window."""
    flags = EngineFlags(context=WINDOW + 8, concurrency=1, kv_dtype=kind, threads=1, gpu_layers=0)
    found = []
    with served("llama.cpp", path, flags, sys.executable) as (_, port):
        for window in windows:
            for length in range(STEP, WINDOW + 1, STEP):
                body = {"prompt": window[:length], "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0.0}
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/completion",
                    json.dumps({**body, "cache_prompt": False}).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=120) as answer:
                    (token,) = json.loads(answer.read())["completion_probabilities"]
                logprobs = np.full(VOCABULARY, -100.0)
                for entry in token["top_logprobs"]:
                    logprobs[entry["id"]] = entry["logprob"]
                found.append(logprobs)
    return np.array(found)


if __name__ == "__main__":
    main()
