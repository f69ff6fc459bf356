"""Draw the pictures of the theory pages from the embedded model: every curve is measured by lowbit's own code.

make pictures        # writes docs/theory/images/*.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from transformers import AutoModelForCausalLM

from lowbit.calibration import load_calibration, load_tokenizer
from lowbit.checkpoint import locate
from lowbit.evaluation.plots import LIGHT
from lowbit.formats import IntSpec, parse_spec
from lowbit.formats.activations import ActivationSpec, fake_quantize
from lowbit.formats.codebook import CODEBOOKS
from lowbit.formats.floating import E2M1_VALUES, E4M3_MAX, decode_elements
from lowbit.formats.integer import choose_range, grid, group_extrema, quantize, quantize_dequantize
from lowbit.formats.rounding import round_weight
from lowbit.quant import METHODS, AwqOptions, InputStatistics, output_error
from lowbit.quant.awq import search_scales

IMAGES = Path(__file__).parent / "images"
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


class Model:
    """The embedded model, its linears' weights, inputs and statistics on 32 sequences of its own kind of text."""

    def __init__(self) -> None:
        path = locate("demo")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        ids = load_calibration("demo", load_tokenizer(path), samples=32, seq_len=512, seed=0).ids
        self.linears = {
            name.removeprefix("model."): module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and "layers" in name
        }
        self.inputs: dict[str, torch.Tensor] = {}
        self.statistics = {name: InputStatistics(module.in_features) for name, module in self.linears.items()}
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.linears.items()]
        with torch.no_grad():
            for batch in ids.split(4):
                self.model(batch)
        for handle in handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, 1)
            self.statistics[name].add(rows)
            self.inputs.setdefault(name, rows[:2048].clone())

        return hook

    def weight(self, name: str) -> torch.Tensor:
        """float32 ``[out, in]``."""
        return self.linears[name].weight.detach()


def panel(figure: Figure, place: tuple[int, int, int], title: str, x: str = "", y: str = "") -> Any:
    """Axes in the style of the report."""
    axes = figure.add_subplot(*place)
    axes.set_title(title, color=LIGHT.text, loc="left", fontsize=10)
    axes.set_xlabel(x, color=LIGHT.muted)
    axes.set_ylabel(y, color=LIGHT.muted)
    axes.tick_params(colors=LIGHT.muted, length=0)
    axes.grid(color=LIGHT.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def log_axis(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers on it."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / max(low, 1e-12) < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def relative(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """Root of the squared error over the squared weights."""
    return float((rounded - weight).norm() / weight.norm())


def number_lines(model: Model) -> Figure:
    """The values that four bits can stand for, over the weights that they have to."""
    group = model.weight("layers.2.mlp.up_proj")[7, :128]
    low, high = float(group.min()), float(group.max())
    largest = float(group.abs().max())
    symmetric, _ = grid(*group_extrema(group[None], IntSpec(4, -1)), IntSpec(4, -1))
    steps, zeros = grid(*group_extrema(group[None], IntSpec(4, -1, False)), IntSpec(4, -1, False))
    codes = torch.arange(16).float()
    e2m1 = torch.tensor(E2M1_VALUES)
    lines = {
        "int4, symmetric": (codes - 8) * symmetric.float(),
        "int4, zero point": (codes - zeros.float()) * steps.float(),
        "FP4 (E2M1)": torch.cat([-e2m1, e2m1]) * largest / 6,
        "NF4": torch.tensor(CODEBOOKS["nf4"]) * largest,
    }
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = panel(figure, (1, 1, 1), "One group of 128 weights, and what four bits can say about them", "weight")
    axes.hist(group.numpy(), bins=40, range=(low, high), color=LIGHT.grid)
    top = axes.get_ylim()[1]
    for index, (name, values) in enumerate(lines.items()):
        height = -(index + 1) * top * 0.16
        spots = values.flatten().tolist()
        axes.plot(spots, [height] * len(spots), "|", color=LIGHT.palette[index], markersize=13, markeredgewidth=2)
        axes.text(0.47, height, name, color=LIGHT.palette[index], va="center")
    axes.set_xlim(right=0.72)
    axes.set_yticks([])
    axes.grid(visible=False)
    return figure


def saturation(model: Model) -> Figure:
    """Rounding error and clipping error against the range."""
    weight = model.weight("layers.2.mlp.down_proj")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, bits in enumerate((4, 3, 2), 1):
        spec = IntSpec(bits, 128)
        low, high = group_extrema(weight, spec)
        shares = torch.linspace(0.3, 1.1, 41).tolist()
        parts: dict[str, list[float]] = {"all": [], "saturated": [], "rounded": []}
        for share in shares:
            scales, zeros = grid(low * share, high * share, spec)
            rounded = quantize_dequantize(weight, spec, scales, zeros)
            spread = scales.float().repeat_interleave(128, 1)
            outside = (weight > (spec.midpoint - 0.5) * spread) | (weight < -(spec.midpoint + 0.5) * spread)
            error = (rounded - weight).square() / weight.square().sum()
            parts["all"].append(float(error.sum()))
            parts["saturated"].append(float(error[outside].sum()))
            parts["rounded"].append(float(error[~outside].sum()))
        axes = panel(figure, (1, 3, place), f"{bits} bits", "range kept", "squared error" if place == 1 else "")
        for index, (name, values) in enumerate(parts.items()):
            style = "-" if name == "all" else "--"
            axes.plot(shares, values, style, color=LIGHT.palette[index], label=name)
        best = min(range(len(shares)), key=parts["all"].__getitem__)
        axes.plot(shares[best], parts["all"][best], "o", color=LIGHT.palette[0])
        axes.set_ylim(0, 2.5 * parts["all"][best])
        if place == 1:
            axes.legend(frameon=False, fontsize=8)
    return figure


def granularity(model: Model) -> Figure:
    """Error against bits per weight as scales get finer."""
    weights = [model.weight(f"layers.2.{name}") for name in LAYERS]
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = panel(figure, (1, 1, 1), "What finer scales buy, and cost", "bits per weight", "relative weight error")
    for index, bits in enumerate((4, 3)):
        for form, style in ((True, "-"), (False, "--")):
            points = []
            for size in (0, -1, 128, 64, 32):
                if size == 0 and not form:
                    continue
                spec = IntSpec(bits, size, form)
                done = [quantize(weight, spec) for weight in weights]
                error = sum(relative(w, q.dequantize()) for w, q in zip(weights, done, strict=True)) / len(weights)
                points.append((sum(q.bits_per_weight for q in done) / len(done), error, size))
            label = f"{bits} bits, {'symmetric' if form else 'zero points'}"
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], f"o{style}", color=LIGHT.palette[index], label=label
            )
            for wide, error, size in points if form else []:
                name = {0: "matrix", -1: "row"}.get(size, f"{size}")
                axes.annotate(name, (wide, error), (4, 4), textcoords="offset points", fontsize=8, color=LIGHT.muted)
    log_axis(axes, "y")
    axes.legend(frameon=False, fontsize=8)
    return figure


def four_bits(model: Model) -> Figure:
    """Formats of about four bits, each by rounding to nearest."""
    names = (
        "int4-g128-sym",
        "int4-g64-sym",
        "int4-g32-sym",
        "int4-g32-asym",
        "mxfp4",
        "nvfp4",
        "nf4-b64-dq",
        "nf4-b64",
    )
    weights = [model.weight(f"layers.{layer}.{name}") for layer in range(5) for name in LAYERS]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = panel(figure, (1, 1, 1), "Four-bit formats, rounded to nearest", "bits per weight", "relative weight error")
    for index, name in enumerate(names):
        spec = parse_spec(name)
        done = [round_weight(weight, spec) for weight in weights]
        error = sum(relative(w, q.dequantize()) for w, q in zip(weights, done, strict=True)) / len(weights)
        bits = sum(q.bits_per_weight for q in done) / len(done)
        axes.plot(bits, error, "o", color=LIGHT.palette[index % len(LIGHT.palette)])
        axes.annotate(name, (bits, error), (5, 4), textcoords="offset points", fontsize=8, color=LIGHT.text)
    axes.margins(x=0.16, y=0.15)
    return figure


def floats(model: Model) -> Figure:
    """The spacing of E4M3 against that of eight-bit integers, and what inputs look like."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    values = decode_elements(codes, "e4m3") / E4M3_MAX
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = panel(figure, (1, 2, 1), "Gap to the next number", "value, as a share of the largest", "relative gap")
    gaps = (values[1:] - values[:-1]) / values[1:]
    axes.plot(values[1:].tolist(), gaps.tolist(), ".", color=LIGHT.palette[0], markersize=3, label="E4M3")
    whole = torch.arange(1, 128).float() / 127
    axes.plot(whole.tolist(), (1 / 127 / whole).tolist(), ".", color=LIGHT.palette[1], markersize=3, label="int8")
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.legend(frameon=False, fontsize=8)
    inputs = model.inputs["layers.3.mlp.down_proj"]
    axes = panel(figure, (1, 2, 2), "Rounding a linear's input", "", "relative error")
    kinds = {
        "int8, token": ActivationSpec("int8"),
        "E4M3, token": ActivationSpec("e4m3"),
        "int8, matrix": ActivationSpec("int8", "tensor"),
        "E4M3, matrix": ActivationSpec("e4m3", "tensor"),
        "int4, token": ActivationSpec("int4"),
        "E2M1, 32": ActivationSpec("e2m1", "group", group_size=32, scale="e8m0"),
    }
    errors = [relative(inputs, fake_quantize(inputs, kind)) for kind in kinds.values()]
    axes.barh(list(kinds), errors, color=[LIGHT.palette[i % 2] for i in range(len(kinds))])
    log_axis(axes, "x")
    axes.invert_yaxis()
    return figure


def output_matters(model: Model) -> Figure:
    """GPTQ has the larger weight error and the smaller output error."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    spec = IntSpec(3, 128)
    names = [f"layers.{layer}.{name}" for layer in range(5) for name in LAYERS]
    results: dict[str, list[tuple[float, float]]] = {"rtn": [], "gptq": []}
    for name in names:
        for method, points in results.items():
            solved = METHODS[method].solve(model.weight(name), model.statistics[name], spec).tensor.dequantize()
            weight = model.weight(name)
            points.append((relative(weight, solved), output_error(weight, solved, model.statistics[name])))
    spots = range(len(names))
    for place, (what, index) in enumerate(
        (("of the weights (relative)", 0), ("of the output (share of its energy)", 1)), 1
    ):
        axes = panel(figure, (1, 2, place), f"Error {what}", "linears, by depth")
        for color, (method, points) in enumerate(results.items()):
            axes.plot(
                spots, [point[index] for point in points], "o-", color=LIGHT.palette[color], label=method, markersize=3
            )
        log_axis(axes, "y")
        axes.set_xticks([])
        axes.legend(frameon=False, fontsize=8)
    return figure


def gram(model: Model) -> Figure:
    """The Gram matrix of an input, and the spread of its eigenvalues."""
    name = "layers.1.self_attn.o_proj"
    statistics = model.statistics[name]
    matrix = statistics.gram / statistics.tokens
    scale = matrix.diagonal().sqrt()
    correlation = matrix / scale / scale[:, None]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = panel(figure, (1, 2, 1), "Correlation of the channels of an input")
    order = torch.argsort(matrix.diagonal(), descending=True)[:96]
    shown = axes.imshow(correlation[order][:, order].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    axes = panel(figure, (1, 2, 2), "Energy along each direction", "direction, strongest first", "share of all")
    for index, short in enumerate(LAYERS):
        here = model.statistics[f"layers.1.{short}"]
        values = torch.linalg.eigvalsh(here.gram.double()).flip(0).clamp_min(1e-12)
        axes.plot((values / values.sum()).tolist(), color=LIGHT.palette[index], label=short)
    log_axis(axes, "y")
    axes.set_ylim(1e-7, 1)
    axes.legend(frameon=False, fontsize=8)
    return figure


def awq_ratio(model: Model) -> Figure:
    """Output error against the exponent of AWQ's scales."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for place, bits in enumerate((4, 3), 1):
        spec = IntSpec(bits, 128)
        axes = panel(figure, (1, 2, place), f"{bits} bits", "ratio r", "output error, as a share" if place == 1 else "")
        for index, short in enumerate(("self_attn.q_proj", "mlp.up_proj")):
            name = f"layers.1.{short}"
            weight, statistics = model.weight(name), model.statistics[name]
            ratios, errors = [], []
            for step in range(11):
                ratio = step / 10
                scales = statistics.abs_mean.clamp_min(1e-6).pow(ratio)
                scales = scales / (scales.max() * scales.min()).sqrt()
                scaled = weight * scales
                restored = quantize_dequantize(scaled, spec, *choose_range(scaled, spec)) / scales
                ratios.append(ratio)
                errors.append(output_error(weight, restored, statistics, rows=None))
            axes.plot(ratios, errors, "o-", color=LIGHT.palette[index], label=short)
            found = search_scales([weight], statistics, spec, AwqOptions(rows=0))
            axes.axhline(found.after, linestyle=":", color=LIGHT.palette[index])
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    return figure


def outliers(model: Model) -> Figure:
    """Channel maxima before and after a SmoothQuant scaling, and the error against its strength."""
    name = "layers.1.mlp.up_proj"
    inputs, weight = model.inputs[name].clone(), model.weight(name)
    largest, heavy = inputs.abs().amax(0), weight.abs().amax(0)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = panel(figure, (1, 2, 1), "Largest magnitude of each channel", "channel, by its input", "")
    order = torch.argsort(largest, descending=True)
    scales = largest.sqrt() / heavy.sqrt()
    axes.plot(largest[order].tolist(), color=LIGHT.palette[0], label="input")
    axes.plot((largest / scales)[order].tolist(), "--", color=LIGHT.palette[0], label="input, scaled")
    axes.plot(heavy[order].tolist(), color=LIGHT.palette[1], label="weight")
    axes.plot((heavy * scales)[order].tolist(), "--", color=LIGHT.palette[1], label="weight, scaled")
    log_axis(axes, "y")
    axes.legend(frameon=False, fontsize=8)
    axes = panel(figure, (1, 2, 2), "W8A8 output error", "migration strength", "share of the output's energy")
    exact = inputs @ weight.T
    for index, (title, kind) in enumerate(
        (("inputs per token", ActivationSpec("int8")), ("per matrix", ActivationSpec("int8", "tensor")))
    ):
        strengths, errors = [step / 20 for step in range(21)], []
        for strength in strengths:
            scale = (largest.pow(strength) / heavy.pow(1 - strength)).clamp_min(1e-5)
            rounded = round_weight(weight * scale, IntSpec(8, -1)).dequantize()
            error = fake_quantize(inputs / scale, kind) @ rounded.T - exact
            errors.append(float(error.square().sum() / exact.square().sum()))
        axes.plot(strengths, errors, color=LIGHT.palette[index], label=title)
        plain = fake_quantize(inputs, kind) @ round_weight(weight, IntSpec(8, -1)).dequantize().T - exact
        axes.axhline(float(plain.square().sum() / exact.square().sum()), linestyle=":", color=LIGHT.palette[index])
    log_axis(axes, "y")
    axes.legend(frameon=False, fontsize=8)
    return figure


def rotation(model: Model) -> Figure:
    """Channel magnitudes of an input before and after a Hadamard rotation."""
    name = "layers.1.mlp.down_proj"
    inputs = model.inputs[name]
    size = inputs.shape[1]
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    turned = inputs @ (hadamard / size**0.5)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = panel(figure, (1, 2, 1), "Values of the input", "value, in standard deviations", "share")
    for index, (title, values) in enumerate((("as it is", inputs), ("rotated", turned))):
        spread = (values / values.std()).flatten()
        axes.hist(
            spread.numpy(),
            bins=120,
            range=(-12, 12),
            histtype="step",
            density=True,
            color=LIGHT.palette[index],
            label=title,
        )
    log_axis(axes, "y")
    axes.legend(frameon=False, fontsize=8)
    axes = panel(figure, (1, 2, 2), "Rounding it to 4 bits per token", "", "relative error")
    errors = [relative(values, fake_quantize(values, ActivationSpec("int4"))) for values in (inputs, turned)]
    axes.bar(["as it is", "rotated"], errors, color=LIGHT.palette[:2], width=0.5)
    return figure


PICTURES: dict[str, Callable[[Model], Figure]] = {
    "number-lines": number_lines,
    "saturation": saturation,
    "granularity": granularity,
    "four-bits": four_bits,
    "floats": floats,
    "gram": gram,
    "output-matters": output_matters,
    "awq-ratio": awq_ratio,
    "outliers": outliers,
    "rotation": rotation,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="pictures to draw (default: all)")
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Model()
    for name in options.names or PICTURES:
        with rc_context({"font.size": 9, "svg.hashsalt": "lowbit"}):
            PICTURES[name](model).savefig(options.out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(options.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
