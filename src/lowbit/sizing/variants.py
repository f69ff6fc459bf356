"""The same model at another precision, before it is made: which tensors its files would hold, to the byte.

Sizes come from the code that will write them: codecs encode tensors without data (torch's ``meta`` device), recipes
decide which modules, the writer's rule lays out the files.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from lowbit.checkpoint.sizes import weight_file_sizes
from lowbit.codecs import CODECS
from lowbit.codecs.gguf.mixes import MIXES, is_mix
from lowbit.errors import UsageError
from lowbit.formats import PRESETS, ActivationSpec, Scheme, WeightSpec, parse_scheme
from lowbit.formats.rounding import blank_weight
from lowbit.pipeline.architectures import fused_groups
from lowbit.pipeline.module_plan import resolve
from lowbit.pipeline.recipe import Recipe
from lowbit.planning import PlannedModule
from lowbit.quant import METHODS
from lowbit.sizing.gguf_sizes import gguf_variant
from lowbit.sizing.headers import Header, HeaderModel, block_number
from lowbit.sizing.variant import Variant

FLOATS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dense precisions by the name that ``convert --dtype`` takes."""

_SHORT = {"int4": "int4-g128-sym", "int8": "int8-g128-sym", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "int4-g128-sym", "int4-g128-asym", "int8-channel-sym", "stored")
_SMALL = 1 << 20
CONVERSION_PART_BYTES = 256 << 20
"""After how many bytes a conversion starts a new part, which decides the order of tensors in several files."""


def make_variant(
    model: HeaderModel, scheme: str, format: str = "compressed-tensors", *, prefer_gguf: bool = False
) -> Variant:
    """``model`` as ``scheme`` would have it: ``stored``, a dense precision, a number format or a GGUF mix.

    ``format`` is where a number format is stored; ``prefer_gguf`` decides for names that mean a dense precision and a
    GGUF file alike (``bf16``). Raises :class:`UsageError` for a scheme or format that is not known;
    a combination that cannot work is a variant with a ``problem``.
    """
    name = _SHORT.get(scheme.strip().lower(), scheme.strip())
    if name.lower() == "stored":
        return _stored(model)
    mix = is_mix(name) and not _reads_as_number_format(name) and (prefer_gguf or name.upper() not in PRESETS)
    if name.lower() in FLOATS and not (mix and prefer_gguf):
        return _dense(model, name.lower())
    if mix:
        return gguf_variant(model, name)
    return _quantized(model, _scheme(scheme, name), format)


def _scheme(scheme: str, name: str) -> Scheme:
    try:
        return parse_scheme(name)
    except UsageError as error:
        known = [*_SHORT, *FLOATS, *_PRESETS, *MIXES]
        close = difflib.get_close_matches(scheme.lower(), [entry.lower() for entry in known], n=1, cutoff=0.5)
        by_lower = {entry.lower(): entry for entry in known}
        hint = f"did you mean {by_lower[close[0]]!r}?" if close else "use e.g. bf16, int8, int4-g128-sym or Q4_K_M"
        raise UsageError(f"--scheme {scheme}: {hint if close or 'unknown' in str(error) else error}") from error


def _reads_as_number_format(name: str) -> bool:
    return name.lower().startswith(("int", "w")) and not name.lower().startswith("iq")


def _stored(model: HeaderModel) -> Variant:
    """The model as it is."""
    checkpoint = model.checkpoint
    files = model.file_sizes
    tensors = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    exact = len(files) == len(checkpoint.files)
    if not checkpoint.files:
        return Variant("stored", model.stored, 0.0, problem="there is a config.json only, and no weights")
    bits = 8 * sum(tensors.values()) / max(1, model.parameters)
    modules = tuple(PlannedModule(name, shape) for name, shape in model.linears.items())
    if not exact:
        files = {"(headers not counted)": sum(tensors.values())}
    return Variant("stored", model.stored, bits, files, tensors, modules, exact)


def _dense(model: HeaderModel, name: str) -> Variant:
    """All floats in one dtype, as ``lowbit convert --format dense --dtype`` writes them."""
    dtype = FLOATS[name]
    headers = {
        tensor: (dtype if stored.is_floating_point else stored, shape)
        for tensor, (stored, shape) in model.dense.items()
    }
    modules = tuple(PlannedModule(module, shape) for module, shape in model.linears.items())
    files = weight_file_sizes(_conversion_parts(headers))
    return Variant(name, "dense", dtype.itemsize * 8, files, _bytes(headers), modules)


def _conversion_parts(headers: Mapping[str, Header]) -> Iterator[dict[str, Header]]:
    part: dict[str, Header] = {}
    filled = 0
    for name, header in headers.items():
        part[name] = header
        filled += math.prod(header[1]) * header[0].itemsize
        if filled >= CONVERSION_PART_BYTES:
            yield part
            part, filled = {}, 0
    yield part


def _quantized(model: HeaderModel, scheme: Scheme, format: str) -> Variant:
    """Linears in ``scheme``, the rest as stored, as ``lowbit quantize`` writes them."""
    codec = CODECS.get(format)
    if codec is None:
        close = difflib.get_close_matches(format, CODECS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(CODECS)}"
        raise UsageError(f"--format {format}: {hint}")
    spec, inputs = scheme.weights, scheme.inputs
    variant = Variant(str(scheme), format, float(spec.bits))
    if format == "dense":
        return replace(variant, problem="dense files hold floats, whatever they were rounded to: see --scheme bf16")
    recipe = Recipe(scheme=str(spec), method="rtn", format=format)
    try:
        entries = resolve(recipe, model.linears, fused_groups(list(model.linears)), methods=METHODS)
    except UsageError as error:
        return replace(variant, problem=str(error))
    scaled = spec.with_scale_dtype(codec.scale_dtype(model.dtype))
    modules = tuple(
        PlannedModule(name, shape, *((scaled, "rtn", inputs) if entries[name] is not None else ()))
        for name, shape in model.linears.items()
    )
    for module in modules:
        if module.spec is None:
            continue
        reasons = codec.supports(module.spec, module.shape)
        reasons += [] if inputs is None else codec.supports_inputs(module.spec, inputs)
        if reasons:
            return replace(variant, problem=f"{module.name}: {reasons[0]}")
    parts: list[dict[str, Header]] = [{} for _ in range(model.description.layers + 1)]
    for name, header in model.dense.items():
        parts[block_number(name, model.blocks, model.description.layers) + 1][name] = header
    for module in modules:
        if module.spec is None:
            continue
        part = parts[block_number(f"{module.name}.", model.blocks, model.description.layers) + 1]
        del part[f"{module.name}.weight"]
        for local, header in _encoded(format, module.spec, module.shape, inputs).items():
            part[f"{module.name}.{local}"] = header
    sizes = {name: size for part in parts for name, size in _bytes(part).items()}
    return replace(variant, files=weight_file_sizes(parts), tensors=sizes, modules=modules)


@lru_cache(maxsize=256)
def _encoded(format: str, spec: WeightSpec, shape: tuple[int, int], inputs: ActivationSpec | None) -> dict[str, Header]:
    """Dtype and shape of each tensor that a module becomes: what the codec makes of one without data."""
    # The first use of the meta device costs seconds of imports: small tensors are really encoded.
    with torch.device("meta" if math.prod(shape) > _SMALL else "cpu"):
        tensor = blank_weight(spec, shape)
        scale = torch.ones(1) if inputs is not None and inputs.needs_calibration else None
        encoded = CODECS[format].encode(tensor, scale, inputs=inputs)
        return {name: (item.dtype, tuple(item.shape)) for name, item in encoded.items()}


def _bytes(headers: Mapping[str, Header]) -> dict[str, int]:
    return {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in headers.items()}
