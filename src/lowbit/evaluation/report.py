"""The report: one self-contained HTML page, its plots as PNG files, and the same data as JSON."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import lowbit
from lowbit.errors import ResourceError, UsageError
from lowbit.evaluation.plots import BASELINE, DARK, LIGHT, draw_plots, margin_over_baseline, styles_of
from lowbit.evaluation.results import Candidate, Comparison, Evaluation, Sample, WorstToken

WORST_SHOWN = 12
"""Worst tokens listed per candidate."""


def write_report(directory: Path | str, comparison: Comparison) -> Path:
    """Write ``index.html``, ``report.json`` and a PNG per plot into ``directory`` (made if absent); returns the page.

    Raises :class:`UsageError` if ``directory`` is a file, :class:`ResourceError` if it cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--report {directory}: is a file; name a directory")
    plots = draw_plots(comparison)
    data = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    files = {"report.json": data.encode(), "index.html": render(comparison, plots_as_text(plots)).encode()}
    for plot in plots:
        files[f"{plot.name}.png"] = plot.light
        files[f"{plot.name}-dark.png"] = plot.dark
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = directory / f".{name}.partial"
            partial.write_bytes(content)
            os.replace(partial, directory / name)
    except OSError as error:
        raise ResourceError(f"{directory}: cannot write the report ({error.strerror})") from error
    return directory / "index.html"


def plots_as_text(plots: list[Any]) -> list[dict[str, Any]]:
    """The plots as the page wants them: PNG bytes in base64."""
    return [
        {
            "title": plot.title,
            "caption": plot.caption,
            "wide": plot.wide,
            "light": base64.b64encode(plot.light).decode(),
            "dark": base64.b64encode(plot.dark).decode(),
        }
        for plot in plots
    ]


def render(comparison: Comparison, plots: list[dict[str, Any]]) -> str:
    """The HTML page; everything from the comparison is escaped."""
    template = resources.files("lowbit.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    entries = comparison.candidates
    has = {
        "seconds": any(entry.seconds is not None for entry in entries),
        "memory": any(entry.peak_memory_bytes is not None for entry in entries),
        "verdict": any(entry.evaluation.verdicts for entry in entries),
    }
    methods = list(dict.fromkeys(entry.method for entry in entries))
    colors = {
        theme.name: {entry.method: styles_of(comparison, theme)[entry.name].color for entry in entries}
        for theme in (LIGHT, DARK)
    }
    return page.render(
        comparison=comparison,
        version=lowbit.__version__,
        lead=lead_sentence(comparison),
        facts=_facts(entries[0].evaluation),
        has=has,
        colors={name: {method: table[method] for method in methods} for name, table in colors.items()},
        rows=[*_reference_row(comparison, has), *(_row(entry, comparison, methods, has) for entry in entries)],
        verdicts=[
            (entry.name, verdict.message)
            for entry in entries
            for verdict in entry.evaluation.verdicts
            if verdict.level in ("warning", "error")
        ],
        plots=plots,
        samples=[_sample(sample, comparison.reference) for sample in comparison.samples],
        worst=[
            {
                "name": entry.name,
                "total": f"{entry.evaluation.tokens:,}",
                "tokens": [_worst(token) for token in entry.evaluation.worst_tokens[:WORST_SHOWN]],
            }
            for entry in entries
            if entry.evaluation.worst_tokens
        ],
    )


def lead_sentence(comparison: Comparison) -> str:
    """What the comparison shows, in a sentence or two."""
    best = best_candidate(comparison)
    if best is None:
        names = _list(
            [f"{e.name} has perplexity {_perplexity(e.evaluation.perplexity)}" for e in comparison.candidates]
        )
        return f"On {comparison.candidates[0].evaluation.text}, {names}; there is no reference to compare with."
    figures = best.evaluation
    only = len(comparison.candidates) == 1
    text = f"{best.name} is" if only else f"Closest to {comparison.reference} is {best.name}:"
    text += f" {figures.kl_divergence:.3g} nats per token away" + (f" from {comparison.reference}" if only else "")
    if figures.reference_size_bytes:
        text += f" at {figures.size_bytes / figures.reference_size_bytes:.0%} of its size"
    if figures.perplexity_ratio is not None and figures.top1_agreement is not None:
        text += (
            f", perplexity {_signed(figures.perplexity_ratio - 1)}, same first choice for "
            f"{figures.top1_agreement:.1%} of tokens"
        )
    gains = [
        f"{entry.name} is {_gain(margin)}"
        for entry in comparison.candidates
        if entry.method != BASELINE and (margin := margin_over_baseline(entry, comparison)) is not None
    ]
    return f"{text}. Against round-to-nearest at the same precision, {_list(gains)}." if gains else f"{text}."


def best_candidate(comparison: Comparison) -> Candidate | None:
    """The candidate with the least divergence from the reference."""
    measured = [entry for entry in comparison.candidates if entry.evaluation.kl_divergence is not None]
    return min(measured, key=lambda entry: entry.evaluation.kl_divergence or 0.0, default=None)


def human_bytes(size: float) -> str:
    """``5.4 MiB``; three digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _gain(margin: float) -> str:
    return f"{abs(margin):.0%} {'closer' if margin <= 0 else 'further away'}"


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _signed(share: float) -> str:
    return f"{share:+.2%}".replace("-", "−")


def _facts(figures: Evaluation) -> list[tuple[str, str]]:
    cut = f"{figures.windows:,} of {figures.seq_len:,} tokens"
    return [
        ("Text", figures.text),
        ("Scored tokens", f"{figures.tokens:,}"),
        ("Windows", cut if figures.stride is None else f"{cut}, stride {figures.stride:,}"),
        ("Text sha256", figures.text_sha256[:12]),
    ]


def _cell(label: str, value: str, detail: str = "", verdict: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail, "verdict": verdict}


def _one_digit(value: float) -> str:
    """One significant digit without an exponent."""
    return f"{Decimal(f'{value:.1g}'):f}"


def _perplexity(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"


def _figure(value: float | None, template: str) -> str:
    return "–" if value is None else template.format(value)


def _reference_row(comparison: Comparison, has: Mapping[str, bool]) -> list[dict[str, Any]]:
    figures = comparison.candidates[0].evaluation
    if figures.reference is None:
        return []
    cells = [
        _cell("Bits per weight", _figure(figures.reference_bits_per_weight, "{:.4g}")),
        _cell("Size", "–" if figures.reference_size_bytes is None else human_bytes(figures.reference_size_bytes)),
        _cell(
            "Perplexity",
            "–" if figures.reference_perplexity is None else _perplexity(figures.reference_perplexity),
            _figure(figures.reference_perplexity_error, "± {:.2g}"),
        ),
        _cell("KL divergence", "0"),
        _cell("99 % of tokens below", "0"),
        _cell("Top-1 agreement", "100 %"),
    ]
    cells += [_cell("", "") for shown in has.values() if shown]
    return [{"name": figures.reference, "kind": "reference", "color": None, "cells": cells}]


def _row(entry: Candidate, comparison: Comparison, methods: list[str], has: Mapping[str, bool]) -> dict[str, Any]:
    figures = entry.evaluation
    error = figures.kl_divergence_error
    rise = None if figures.perplexity_ratio is None else f"({_signed(figures.perplexity_ratio - 1)})"
    cells = [
        _cell("Bits per weight", f"{figures.linear_bits_per_weight:.4g}", f"/ {figures.bits_per_weight:.3g}"),
        _cell("Size", human_bytes(figures.size_bytes)),
        _cell("Perplexity", _perplexity(figures.perplexity), rise or f"± {figures.perplexity_error:.2g}"),
        _cell("KL divergence", _figure(figures.kl_divergence, "{:.3g}"), f"± {_one_digit(error)}" if error else ""),
        _cell("99 % of tokens below", _figure(figures.kl_p99, "{:.2g}")),
        _cell("Top-1 agreement", _figure(figures.top1_agreement, "{:.1%}").replace("%", " %")),
    ]
    if has["seconds"]:
        cells.append(_cell("Seconds", _figure(entry.seconds, "{:.3g}")))
    if has["memory"]:
        cells.append(
            _cell("Peak memory", "–" if entry.peak_memory_bytes is None else human_bytes(entry.peak_memory_bytes))
        )
    if has["verdict"]:
        order = ("error", "warning", "acceptable", "good")
        level = next((one for one in order if any(v.level == one for v in figures.verdicts)), "")
        cells.append(_cell("Verdict", level or "–", verdict=level))
    kind = "best" if len(comparison.candidates) > 1 and entry is best_candidate(comparison) else ""
    return {"name": entry.name, "kind": kind, "color": methods.index(entry.method), "cells": cells}


def _sample(sample: Sample, reference: str | None) -> dict[str, Any]:
    expected = None if reference is None else sample.continuations.get(reference)
    entries = []
    for name, text in sample.continuations.items():
        same = common_prefix(text, expected) if expected is not None and name != reference else 0
        remark = ""
        if expected is not None and name != reference:
            remark = "same text" if text == expected else f"same for {same} characters"
        if name == reference:
            remark = "reference"
        entries.append(
            {
                "name": name,
                "remark": remark,
                "same": text[:same].lstrip("\n"),
                "rest": text[same:].lstrip("\n") if same == 0 else text[same:],
            }
        )
    return {"prompt": sample.prompt, "entries": entries}


def common_prefix(first: str, second: str) -> int:
    """Number of leading characters that two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _worst(token: WorstToken) -> dict[str, str]:
    return {
        "divergence": f"{token.divergence:.2f}",
        "before": token.before,
        "token": visible(token.token),
        "after": token.after,
        "was": _probability(token.reference_probability),
        "now": _probability(token.probability),
        "choices": f"{visible(token.reference_choice)} → {visible(token.choice)}",
    }


def _probability(value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if value >= 0.0005 else "< 0.1 %"


def visible(text: str) -> str:
    """Tokens that are blank made visible: ``␣`` for spaces, ``⏎`` for line ends, ``⇥`` for tabs."""
    shown = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
    blank = not shown.strip(" ⏎⇥")
    return shown.replace(" ", "␣") if blank else shown
