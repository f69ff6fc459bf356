"""The table of llama.cpp's mixes: what each named scheme gives to which tensor, as data.

From ``llama_tensor_get_type_impl`` of ``src/llama-quant.cpp`` (October 2026); :mod:`lowbit.codecs.gguf.mixes` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from lowbit.formats.ggml.types import GGML_TYPES, GgmlType

__all__ = ["MIXES", "Mix", "Place", "Role"]

Role: TypeAlias = Literal["embedding", "output", "value", "key", "query", "attention_output", "down", "gate", "up", ""]
"""What a tensor does, as far as the mixes tell tensors apart; fused q, k, v count as ``value``."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: ``index`` among the ``count`` of its role, and what the choice may depend on."""

    index: int
    count: int
    gqa: int
    experts: int
    has_imatrix: bool


Where: TypeAlias = Callable[[Place], bool]
"""A condition of a rule."""

Rules: TypeAlias = Mapping[Role, tuple[tuple[str, Where], ...]]


def _always(place: Place) -> bool:
    return True


def _first_eighth(place: Place) -> bool:
    return place.index < place.count // 8


def _first_sixteenth(place: Place) -> bool:
    return place.index < place.count // 16


def _middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def _outer_and_every_third(place: Place) -> bool:
    """The first and last eighth of the layers, and each third one between."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def _first(count: int) -> Where:
    return lambda place: place.index < count


def _shared_by_four(place: Place) -> bool:
    """Four query heads or more share a key-value head, so that its matrices are small and worth more bits."""
    return place.gqa >= 4


def _shared_by_four_or_experts(place: Place) -> bool:
    return place.gqa >= 4 or place.experts >= 4


def _eight_experts(place: Place) -> bool:
    return place.experts == 8


def _not_eight_experts(place: Place) -> bool:
    return place.experts != 8


def _blind(place: Place) -> bool:
    return not place.has_imatrix


def _blind_first_eighth(place: Place) -> bool:
    return not place.has_imatrix and _first_eighth(place)


def _guided_first_eighth(place: Place) -> bool:
    return place.has_imatrix and _first_eighth(place)


def _first_eighth_or_eight_experts(place: Place) -> bool:
    return _first_eighth(place) or (place.experts == 8 and _outer_and_every_third(place))


@dataclass(frozen=True, slots=True)
class Mix:
    """A named scheme.

    ``file_type`` is the number in ``general.file_type``, ``base`` the type of tensors that no rule speaks of. ``rules``
    give a role its types: the first whose condition holds. ``embedding`` is the type of an embedding that is not the
    output head too, ``output`` that of the head; where None, the base and Q6_K. ``small`` mixes (below 3 bits) count
    layers in their own way and know no exceptions for 70B and 8-expert models.
    """

    name: str
    file_type: int
    base: str
    rules: Rules = field(default_factory=dict)
    embedding: str | None = None
    output: str | None = None
    small: bool = False

    @property
    def base_type(self) -> GgmlType:
        """The base as a type."""
        return GGML_TYPES[self.base]

    @property
    def is_float(self) -> bool:
        """Whether the mix stores floats and quantizes nothing."""
        return self.base in ("F32", "F16", "BF16")


_EIGHT: tuple[tuple[str, Where], ...] = (("Q5_K", _eight_experts),)
_Q4_K_M: Rules = {
    "value": (("Q6_K", _outer_and_every_third),),
    "down": (("Q6_K", _outer_and_every_third),),
}
_IQ4: Rules = {
    "value": (("Q5_K", _shared_by_four),),
    "down": (("Q5_K", _blind_first_eighth),),
    "attention_output": _EIGHT,
}


def _tiny(more: str, attention_output: str | None) -> Rules:
    """The rules of the mixes below 3 bits, ``more`` being their next richer type."""
    output: tuple[tuple[str, Where], ...] = () if attention_output is None else ((attention_output, _always),)
    return {
        "value": (("Q4_K", _shared_by_four_or_experts), (more, _always)),
        "key": (("Q4_K", _eight_experts),),
        "down": ((more, _first_eighth),),
        "attention_output": (*_EIGHT, *output),
    }


_ALL = (
    Mix("F32", 0, "F32"),
    Mix("F16", 1, "F16"),
    Mix("BF16", 32, "BF16"),
    Mix("Q4_0", 2, "Q4_0", {"down": (("Q4_1", _guided_first_eighth),)}),
    Mix("Q4_1", 3, "Q4_1"),
    Mix("Q5_0", 8, "Q5_0", {"down": (("Q5_1", _guided_first_eighth),)}),
    Mix("Q5_1", 9, "Q5_1"),
    Mix("Q8_0", 7, "Q8_0"),
    Mix(
        "Q2_K",
        10,
        "Q2_K",
        {
            "value": (("Q4_K", _shared_by_four), ("Q3_K", _always)),
            "down": (("Q3_K", _always),),
            "attention_output": (*_EIGHT, ("Q3_K", _always)),
        },
    ),
    Mix("Q2_K_S", 21, "Q2_K", {"value": (("Q4_K", _shared_by_four),), "down": (("Q4_K", _first_eighth),)}),
    Mix("Q3_K_S", 11, "Q3_K", {"attention_output": _EIGHT}),
    Mix(
        "Q3_K_M",
        12,
        "Q3_K",
        {
            "value": (("Q5_K", _first(2)), ("Q4_K", _always)),
            "down": (("Q5_K", _first_sixteenth), ("Q4_K", _always)),
            "attention_output": (*_EIGHT, ("Q4_K", _always)),
        },
    ),
    Mix(
        "Q3_K_L",
        13,
        "Q3_K",
        {
            "value": (("Q5_K", _always),),
            "down": (("Q5_K", _always),),
            "attention_output": (("Q5_K", _not_eight_experts),),
        },
    ),
    Mix(
        "Q4_K_S",
        14,
        "Q4_K",
        {"value": (("Q5_K", _first(4)),), "down": (("Q5_K", _first_eighth),), "attention_output": _EIGHT},
    ),
    Mix("Q4_K_M", 15, "Q4_K", {**_Q4_K_M, "attention_output": _EIGHT}),
    Mix("Q5_K_S", 16, "Q5_K"),
    Mix("Q5_K_M", 17, "Q5_K", _Q4_K_M),
    Mix("Q6_K", 18, "Q6_K"),
    Mix("IQ1_S", 24, "IQ1_S", _tiny("Q2_K", "IQ2_XXS"), "Q2_K", "Q5_K", small=True),
    Mix("IQ1_M", 31, "IQ1_M", _tiny("Q2_K", "IQ2_XXS"), "Q2_K", "Q5_K", small=True),
    Mix("IQ2_XXS", 19, "IQ2_XXS", _tiny("Q2_K", None), "Q2_K", "Q5_K", small=True),
    Mix("IQ2_XS", 20, "IQ2_XS", _tiny("Q2_K", None), "Q2_K", "Q5_K", small=True),
    Mix("IQ2_S", 28, "IQ2_XS", _tiny("IQ3_S", "IQ3_S"), "IQ3_S", "Q5_K", small=True),
    Mix("IQ2_M", 29, "IQ2_S", _tiny("IQ3_S", "IQ3_S"), "IQ3_S", "Q5_K", small=True),
    Mix(
        "IQ3_XXS",
        23,
        "IQ3_XXS",
        {
            "value": (("Q4_K", _shared_by_four), ("IQ3_S", _blind)),
            "key": (("IQ2_S", _always),),
            "query": (("IQ2_S", _always),),
            "down": (("Q4_K", _blind_first_eighth), ("Q3_K", _blind)),
            "attention_output": (*_EIGHT, ("IQ3_S", _always)),
        },
        embedding="IQ3_S",
        output="Q5_K",
    ),
    Mix(
        "IQ3_XS",
        22,
        "IQ3_S",
        {
            "value": (("Q4_K", _shared_by_four),),
            "key": (("IQ3_XXS", _always),),
            "query": (("IQ3_XXS", _always),),
            "gate": (("IQ3_XXS", _middle),),
            "up": (("IQ3_XXS", _middle),),
            "attention_output": _EIGHT,
        },
    ),
    Mix("IQ3_S", 26, "IQ3_S", {"value": (("Q4_K", _shared_by_four),), "attention_output": _EIGHT}),
    Mix(
        "IQ3_M",
        27,
        "IQ3_S",
        {
            "value": (("Q4_K", _always),),
            "down": (("Q4_K", _first_eighth_or_eight_experts),),
            "attention_output": (*_EIGHT, ("Q4_K", _always)),
        },
    ),
    Mix("IQ4_NL", 25, "IQ4_NL", _IQ4),
    Mix("IQ4_XS", 30, "IQ4_XS", _IQ4),
    Mix("TQ1_0", 36, "TQ1_0", embedding="Q4_K"),
    Mix("TQ2_0", 37, "TQ2_0", embedding="Q4_K"),
    Mix("MXFP4_MOE", 38, "MXFP4"),
    Mix("NVFP4", 39, "NVFP4"),
)

MIXES: Mapping[str, Mix] = MappingProxyType({mix.name: mix for mix in _ALL})
"""Every scheme that llama.cpp's quantizer has a name for, and NVFP4, which it only reads."""
