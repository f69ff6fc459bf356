"""Ways to quantize by the short names of a comparison: methods at several widths, schemes and GGUF types."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit.codecs.gguf.mixes import MIXES, find_mix, is_mix
from lowbit.errors import UsageError
from lowbit.formats import CodebookSpec, DenseSpec, FloatSpec, IntSpec, Scheme
from lowbit.formats.scheme import PRESETS
from lowbit.quant import METHODS

__all__ = ["Contender", "contenders", "usual_choice"]

_HQQ_GROUP = 64


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to quantize. ``method`` groups contenders of several widths; ``settings`` are those of ``quantize``."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        """Whether the result is a GGUF file rather than a directory."""
        return self.settings.get("format") == "gguf"

    @property
    def file_name(self) -> str:
        """What to call the result on disk."""
        stem = self.name.lower().replace(" bit", "bit").replace(" ", "-")
        return f"{stem}.gguf" if self.is_gguf else stem


def contenders(
    methods: Sequence[str], bits: Sequence[int], *, group_size: int, symmetric: bool, budget: str | None = None
) -> list[Contender]:
    """The contenders that ``methods`` name, each method at all of ``bits``, schemes and GGUF types once.

    A method may be led by a transform: ``awq+gptq``. ``budget`` is that of methods with candidates. Raises
    :class:`UsageError` for an unknown name.
    """
    found: dict[str, Contender] = {}
    for given in methods:
        name = given.strip().lower()
        preset = name.upper().replace("-", "_")
        if preset in PRESETS:
            made = [_of_scheme(preset, PRESETS[preset])]
        elif name.split("+")[-1] in METHODS:
            made = [_of_method(name, width, group_size, symmetric, budget) for width in bits]
        elif is_mix(name):
            mix = find_mix(name).name
            made = [Contender(mix, "gguf", {"scheme": mix, "format": "gguf", "imatrix": "auto"})]
        else:
            known = [*METHODS, *(preset.lower() for preset in PRESETS), *(mix.lower() for mix in MIXES)]
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else f"use e.g. {', '.join([*METHODS, 'nf4', 'q4_k_m'])}"
            )
            raise UsageError(f"--methods: unknown name {given!r}: {hint}")
        found |= {one.name: one for one in made}
    return list(found.values())


def usual_choice(scheme: Scheme) -> tuple[str, str]:
    """The method and file format that a scheme is used with unless told otherwise."""
    spec = scheme.weights
    rows_of_bytes = scheme.inputs is not None and scheme.inputs.outliers > 0
    if isinstance(spec, CodebookSpec) or rows_of_bytes:
        return "rtn", "bitsandbytes"
    if isinstance(spec, FloatSpec):
        return "rtn", "compressed-tensors"
    if isinstance(spec, DenseSpec):
        return "rtn", "dense"
    return ("hqq", "hqq") if isinstance(spec, IntSpec) and spec.has_float_zeros else ("gptq", "compressed-tensors")


def _of_scheme(name: str, scheme: Scheme) -> Contender:
    method, format = usual_choice(scheme)
    return Contender(name, name.lower(), {"scheme": name, "method": method, "format": format})


def _of_method(name: str, width: int, group_size: int, symmetric: bool, budget: str | None) -> Contender:
    transform, _, method = name.rpartition("+")
    grain = "channel" if group_size == -1 else f"g{group_size}"
    settings: dict[str, Any] = {"method": method, "format": "compressed-tensors"}
    settings["scheme"] = f"int{width}-{grain}-{'sym' if symmetric else 'asym'}"
    if transform:
        settings["transform"] = transform
    if budget is not None and METHODS[method].scope == "candidates":
        settings["budget"] = budget
    if method == "hqq":
        settings |= {"scheme": f"int{width}-g{_HQQ_GROUP}-affine", "format": "hqq"}
    return Contender(f"{name.upper()} {width} bit", name, settings)
