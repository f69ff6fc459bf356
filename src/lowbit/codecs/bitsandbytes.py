"""bitsandbytes checkpoints: NF4 and FP4 in flat blocks with or without double quantization, and LLM.int8().

4 bits, for a weight of ``n = out * in`` values in ``blocks`` of ``blocksize``:

===========================================  =======  ====================  =========================================
``weight``                                   uint8    ``[ceil(n/2), 1]``    the first of two codes in the high nibble
``weight.absmax``                            float32  ``[blocks]``          uint8 under double quantization
``weight.quant_map``                         float32  ``[16]``              the value of each code
``weight.nested_absmax``                     float32  ``[ceil(blocks/256)]``  double quantization only
``weight.nested_quant_map``                  float32  ``[256]``             double quantization only
``weight.quant_state.bitsandbytes__nf4``     uint8    JSON                  blocksize, shape, offset of the maxima
===========================================  =======  ====================  =========================================

8 bits: ``weight`` int8 ``[out, in]``, ``SCB`` float32 ``[out]``, the largest magnitude of a row, and ``weight_format``,
0 for row by row. A weight is ``int8 * SCB / 127``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lowbit.codecs.codec import StoredGrid, TensorHeader, refuse_unless_supported, required, stored, weights_only
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.codebook import CODEBOOKS, NESTED_BLOCK, CodebookSpec, CodebookTensor, NestedScales
from lowbit.formats.spec import PER_CHANNEL, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["BitsAndBytesCodec"]

_STATE = re.compile(r"(?P<module>.+)\.weight\.quant_state\.bitsandbytes__(?P<table>nf4|fp4)")
_STATE_BYTES = 192
"""Room for the quantization state, padded with blanks so that its size does not depend on the weight."""
_LARGEST_STATE = 1 << 16
_THRESHOLD = 6.0
_STEPS = 127
"""Steps of LLM.int8() from zero to the largest magnitude of a row."""


@dataclass(frozen=True, slots=True)
class BitsAndBytesCodec:
    """What bitsandbytes stores in safetensors, and transformers loads."""

    @property
    def name(self) -> str:
        """``bitsandbytes``."""
        return "bitsandbytes"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """float32 for any model."""
        return torch.float32

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons against; see :meth:`Codec.supports`."""
        if isinstance(spec, CodebookSpec):
            return []
        if isinstance(spec, IntSpec) and (spec.bits, spec.group_size, spec.symmetric) == (8, PER_CHANNEL, True):
            return []
        return [f"bitsandbytes stores NF4, FP4 and rows of 8 bits, not {spec}: use --scheme NF4 or LLM_INT8"]

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        if isinstance(spec, CodebookSpec):
            return weights_only(inputs, "bitsandbytes in 4 bits")
        if (inputs.element, inputs.granularity) != ("int8", "token"):
            return [
                f"bitsandbytes multiplies 8-bit weights with inputs of 8 bits per token, not {inputs}: use LLM_INT8"
            ]
        return []

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        if not isinstance(spec, CodebookSpec):
            return frozenset(("weight", "SCB", "weight_format"))
        nested = ("nested_absmax", "nested_quant_map") if spec.double_quant else ()
        return frozenset(("weight", *(f"weight.{part}" for part in ("absmax", "quant_map", _state(spec), *nested))))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of one module."""
        refuse_unless_supported(self, q)
        if isinstance(q, QuantizedTensor):
            return {
                "weight": (q.codes.to(torch.int16) - q.spec.midpoint).to(torch.int8),
                "SCB": q.scales.float().flatten() * _STEPS,
                "weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        if not isinstance(q, CodebookTensor):
            raise UnsupportedError(f"bitsandbytes cannot hold {q.spec}", self.supports(q.spec, q.shape))
        codes = q.codes.flatten()
        if codes.shape[0] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        pairs = codes.view(-1, 2)
        # what a reader computes the weights in where it does not say so itself
        state: dict[str, Any] = {"quant_type": q.spec.codebook, "blocksize": q.spec.group_size, "dtype": "float16"}
        state["shape"] = list(q.shape)
        tensors = {"weight": pairs[:, :1] << 4 | pairs[:, 1:], "weight.quant_map": _table(q.spec, codes.device)}
        if isinstance(q.absmax, NestedScales):
            offset = float(q.absmax.offset)
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
            tensors["weight.absmax"] = q.absmax.codes
            tensors["weight.nested_absmax"] = q.absmax.absmax
            tensors["weight.nested_quant_map"] = q.absmax.table
        else:
            tensors["weight.absmax"] = q.absmax
        text = json.dumps(state).ljust(_STATE_BYTES).encode()
        tensors[f"weight.{_state(q.spec)}"] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
        """Invert :meth:`encode`."""
        if isinstance(spec, CodebookSpec):
            return _decode_blocks(tensors, spec, shape)
        if not isinstance(spec, IntSpec):
            raise UnsupportedError(f"bitsandbytes cannot hold {spec}", self.supports(spec, shape))
        weight = required(tensors, "weight", shape)
        layout = tensors.get("weight_format")
        if weight.dtype != torch.int8 or (layout is not None and (layout.numel() != 1 or int(layout) != 0)):
            raise CheckpointError("weight is not int8 row by row: save it again with a bitsandbytes from 2024 or later")
        codes = (weight.to(torch.int16) + spec.midpoint).to(torch.uint8)
        scales = required(tensors, "SCB", (shape[0],)).float() / _STEPS
        return QuantizedTensor(spec, codes, scales[:, None])

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """None: zero is a code of every format here."""
        return None

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config``; :class:`UnsupportedError` unless all modules share one format.

        Readers leave a module dense if an entry of ``llm_int8_skip_modules`` is part of its name, so a dense layer
        whose name is part of a quantized one's is refused.
        """
        if not plan:
            return {}
        formats = sorted({str(spec) for spec in plan.values()})
        thresholds = sorted({spec.outliers for spec in (inputs or {}).values()}) or [_THRESHOLD]
        if len(formats) > 1 or len(thresholds) > 1:
            raise UnsupportedError(
                f"bitsandbytes has one format for the whole model, the plan has {', '.join(formats)} and outliers from "
                f"{', '.join(map(str, thresholds))}",
                ["use the format compressed-tensors for mixed settings"],
            )
        for dense in left_dense:
            if clash := next((name for name in plan if dense in name), None):
                raise UnsupportedError(
                    f"bitsandbytes' readers would take {clash} for dense, since it contains the name of {dense}",
                    ["quantize both or neither, or use the format compressed-tensors"],
                )
        spec = next(iter(plan.values()))
        codebook = spec if isinstance(spec, CodebookSpec) else None
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": codebook is not None,
            "load_in_8bit": codebook is None,
            "bnb_4bit_quant_type": "nf4" if codebook is None else codebook.codebook,
            "bnb_4bit_use_double_quant": codebook is not None and codebook.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": thresholds[0],
            "llm_int8_skip_modules": list(left_dense),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a quantization state or with ``SCB``; :meth:`described` tells the shape of the former."""
        threshold = config.get("llm_int8_threshold", _THRESHOLD)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
            raise CheckpointError(f"quantization_config: llm_int8_threshold must be a number, not {threshold!r}")
        inputs = ActivationSpec("int8", outliers=float(threshold))
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            if match := _STATE.fullmatch(name):
                module = match["module"]
                packed = stored(tensors, f"{module}.weight", 2)
                count = 2 * math.prod(packed.shape) * packed.dtype.itemsize
                nested = f"{module}.weight.nested_absmax" in tensors
                table: Literal["nf4", "fp4"] = "nf4" if match["table"] == "nf4" else "fp4"
                plan[module] = StoredGrid(self, CodebookSpec(table, double_quant=nested), (1, count))
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                weight, rows = stored(tensors, f"{module}.weight", 2), stored(tensors, name, 1).shape[0]
                if weight.dtype != torch.int8 or weight.shape[0] != rows:
                    raise CheckpointError(f"{module}: SCB has {rows} rows, the weight is {tuple(weight.shape)}")
                spec = IntSpec(8, PER_CHANNEL, scale_dtype=torch.float32)
                plan[module] = StoredGrid(self, spec, (weight.shape[0], weight.shape[1]), inputs)
        return plan

    def describing(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the small tensors that :meth:`described` reads."""
        return frozenset((f"weight.{_state(spec)}",)) if isinstance(spec, CodebookSpec) else frozenset()

    def described(self, entry: StoredGrid, tensors: Mapping[str, torch.Tensor]) -> StoredGrid:
        """``entry`` with the shape and block size that the quantization state of its module gives.

        Raises :class:`CheckpointError` for a state that is none or does not fit the packed weight.
        """
        spec = entry.spec
        if not isinstance(spec, CodebookSpec):
            return entry
        state = _parse_state(tensors, spec)
        shape, size = state.get("shape"), state.get("blocksize")
        if not isinstance(shape, list) or len(shape) != 2 or not all(_is_count(extent) for extent in shape):
            raise CheckpointError(f"{_state(spec)}: shape must be two positive numbers, not {shape!r}")
        if not isinstance(size, int) or not _is_count(size) or size & (size - 1) or not 32 <= size <= 4096:
            raise CheckpointError(f"{_state(spec)}: blocksize must be a power of two from 32 to 4096, not {size!r}")
        if not entry.shape[1] - 16 <= shape[0] * shape[1] <= entry.shape[1]:
            raise CheckpointError(f"{_state(spec)}: shape {shape} does not fit {entry.shape[1]} packed codes")
        return entry._replace(spec=replace(spec, group_size=size), shape=(shape[0], shape[1]))


def _decode_blocks(tensors: Mapping[str, torch.Tensor], spec: CodebookSpec, shape: tuple[int, int]) -> CodebookTensor:
    count, blocks = shape[0] * shape[1], spec.blocks(*shape)
    if "weight" not in tensors:
        raise CheckpointError("tensor weight is missing: the checkpoint is incomplete, fetch it again")
    packed = tensors["weight"].contiguous().flatten().view(torch.uint8)
    if packed.shape[0] < -(-count // 2):
        raise CheckpointError(f"tensor weight has {2 * packed.shape[0]} codes, expected {count}")
    table = required(tensors, "weight.quant_map", (16,)).float()
    if not torch.allclose(table, _table(spec, table.device), atol=1e-4, rtol=0):
        raise CheckpointError(f"tensor weight.quant_map is not the table of {spec.codebook}: the file is damaged")
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].view(shape)
    if not spec.double_quant:
        return CodebookTensor(spec, codes, required(tensors, "weight.absmax", (blocks,)).float())
    state = _parse_state(tensors, spec)
    offset, size = state.get("nested_offset"), state.get("nested_blocksize")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or size != NESTED_BLOCK:
        raise CheckpointError(f"{_state(spec)}: nested_offset and nested_blocksize {NESTED_BLOCK} are expected")
    inner = required(tensors, "weight.absmax", (blocks,))
    if inner.dtype != torch.uint8:
        raise CheckpointError(f"tensor weight.absmax has dtype {inner.dtype}, expected uint8 under double quantization")
    nested = NestedScales(
        codes=inner,
        absmax=required(tensors, "weight.nested_absmax", (-(-blocks // NESTED_BLOCK),)).float(),
        offset=torch.tensor(float(offset), device=codes.device),
        table=required(tensors, "weight.nested_quant_map", (256,)).float(),
    )
    return CodebookTensor(spec, codes, nested)


def _parse_state(tensors: Mapping[str, torch.Tensor], spec: CodebookSpec) -> dict[str, Any]:
    name = f"weight.{_state(spec)}"
    data = tensors.get(name)
    if data is None or data.dtype != torch.uint8 or data.numel() > _LARGEST_STATE:
        raise CheckpointError(f"tensor {name} is missing or no JSON text: the checkpoint is incomplete, fetch it again")
    try:
        state = json.loads(bytes(data.flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"tensor {name} is no JSON text: the file is damaged") from error
    if not isinstance(state, dict) or state.get("quant_type") != spec.codebook:
        raise CheckpointError(f"tensor {name} does not describe a weight in {spec.codebook}: the file is damaged")
    return state


def _state(spec: CodebookSpec) -> str:
    return f"quant_state.bitsandbytes__{spec.codebook}"


def _table(spec: CodebookSpec, device: torch.device) -> torch.Tensor:
    return torch.tensor(CODEBOOKS[spec.codebook], device=device)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
