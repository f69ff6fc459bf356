"""Converting a checkpoint from one format to another, module by module, exactly or not at all.

Decode, move to a grid that the target stores (:mod:`lowbit.codecs.fitting`), encode. Whether that works is found out
from the config, the zero points and the column orders, before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lowbit import __version__
from lowbit.checkpoint import Checkpoint, Manifest, PartialCheckpoint, read_manifest, source_hashes
from lowbit.codecs import CODECS
from lowbit.codecs.codec import Codec, StoredBlocks, StoredGrid, StoredModule, integer_spec
from lowbit.codecs.dense import DenseCodec
from lowbit.codecs.fitting import fitting_spec, is_centred, regrid
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.gptq import GptqCodec
from lowbit.codecs.names import in_numbered_block
from lowbit.codecs.opening import open_model
from lowbit.codecs.reading import dense_names, local_tensors, module_plan, read_quantized, stored_format
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.formats.ggml import BlockTensor
from lowbit.formats.ggml.grids import grid_spec, to_integer
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["DTYPES", "ConversionResult", "convert_checkpoint"]

DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
"""Spellings of ``--dtype``."""

_PART_BYTES = 256 << 20
_ORDERS = ("g_idx", "weight_g_idx")
_ZEROS = ("qzeros", "weight_zero_point")
_SCALES = ("scales", "weight_scale")
_HEADS = frozenset(("lm_head", "embed_out", "output"))


class Progress(Protocol):
    """The part of a progress display that a conversion uses."""

    def start(self, title: str, total: int) -> None:
        """A step of ``total`` units begins."""

    def advance(self, module: str, **fields: float | str) -> None:
        """One unit is done."""

    def close(self) -> None:
        """The step is over."""


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What :func:`convert_checkpoint` did.

    ``modules`` counts the quantized modules of the source, ``regridded`` those that got another number format;
    ``exact`` says whether every weight is the same number as before; ``notes`` say what a user should know.
    """

    out: Path
    source_format: str
    format: str
    modules: int
    regridded: int
    exact: bool
    notes: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str,
    dtype: str | torch.dtype | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Write the checkpoint ``source`` to the directory ``out`` in ``format`` (a key of :data:`lowbit.codecs.CODECS`).

    ``source`` may be a GGUF file. Where its blocks of 32 are integer grids (Q4_0, Q5_0, Q8_0), the linears inside the
    model's blocks keep their codes; embedding and head are written as floats.

    Quantized weights keep their values exactly; where the target's grids cannot hold them :class:`UnsupportedError`
    gives the reasons and nothing is written. ``dense`` writes the values as floats of ``dtype`` (default: the model's).
    ``dtype`` also casts the tensors that are not quantized. A dense source has no grid: quantize it instead.
    Tensors stream through one module at a time; an interrupted conversion goes on with ``resume``.
    """
    codec = CODECS.get(format)
    if codec is None:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(CODECS)}")
    with open_model(
        source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    ) as checkpoint:
        conversion = _Conversion(checkpoint, codec, _dtype(dtype))
        companions = conversion.companions()
        hashes = source_hashes(checkpoint.files)
        fingerprint = conversion.fingerprint(hashes)
        with PartialCheckpoint.create(Path(out), fingerprint, resume=resume, overwrite=overwrite) as partial:
            if not partial.finished:
                _write_parts(conversion, partial, progress)
                partial.finish(
                    conversion.config(),
                    manifest=conversion.manifest(fingerprint, hashes),
                    copy_files=companions,
                )
    return conversion.result(Path(out))


class _Conversion:
    """Everything decided before writing."""

    def __init__(self, checkpoint: Checkpoint, codec: Codec, dtype: torch.dtype | None) -> None:
        self.checkpoint = checkpoint
        self.codec = codec
        self.dtype = dtype
        self.plan = module_plan(checkpoint)
        self.dense = isinstance(codec, DenseCodec)
        if not self.plan and not self.dense:
            raise UnsupportedError(
                f"{checkpoint.path} is dense, and converting to {codec.name} would mean quantizing it",
                ["use lowbit quantize"],
            )
        self.weight_dtype = dtype or _model_dtype(checkpoint, self.plan)
        self.ordered = [module for module in self.plan if not _in_order(checkpoint, self.plan, module)]
        self.specs = {} if self.dense else _target_specs(checkpoint, self.plan, codec, self.ordered)
        details = {"desc_act": True} if self.ordered else {}
        self.quantization = codec.config(self.specs, _left_dense(checkpoint, self.specs), details=details)
        self.notes = _notes(checkpoint, self.plan, self.quantization)

    def companions(self) -> list[Path]:
        """The files to carry over; a vocabulary of a GGUF file that cannot be a tokenizer becomes a note."""
        try:
            return self.checkpoint.auxiliary_files()
        except (CheckpointError, UnsupportedError) as error:
            self.notes.append(f"no tokenizer written: {error}: copy the original model's tokenizer files")
            return []

    @property
    def exact(self) -> bool:
        lossy = len(self.specs) < len(self.plan) and self.weight_dtype != torch.float32
        return not lossy and not (self.dtype is not None and self._casts())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What stands in the target for the tensor ``name`` of the dense model."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.plan:
            tensor = self.checkpoint.read(name)
            return {name: tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor}
        weight = read_quantized(self.checkpoint, module, self.plan[module])
        weight.validate(f"{self.checkpoint.path}: {module}")
        if module not in self.specs:
            return {name: weight.dequantize(self.weight_dtype)}
        if isinstance(weight, BlockTensor):
            weight = to_integer(weight)
        if not isinstance(weight, QuantizedTensor):
            raise UnsupportedError(f"{module}: {weight.spec} is no integer grid", ["convert to dense instead"])
        encoded = self.codec.encode(regrid(weight, self.specs[module]))
        return {f"{module}.{local}": tensor for local, tensor in encoded.items()}

    def fingerprint(self, hashes: Mapping[str, str]) -> str:
        parts = [__version__, dict(hashes), self.checkpoint.config, self.quantization, self.codec.name, str(self.dtype)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def config(self) -> dict[str, Any]:
        config = _without_quantization(self.checkpoint.config)
        if self.quantization:
            config["quantization_config"] = self.quantization
        if self.dtype is not None:
            _set_dtype(config, str(self.dtype).removeprefix("torch."))
        return config

    def manifest(self, fingerprint: str, hashes: Mapping[str, str]) -> Manifest:
        """The source's manifest carried on, or a new one; the certificate is left out, for it is of other files."""
        origin = read_manifest(self.checkpoint.path)
        modules: dict[str, dict[str, Any]] = {}
        for module, spec in self.specs.items():
            known = dict(origin.modules.get(module, {})) if origin else {}
            bits = spec.bits_per_weight(*self.plan[module].shape)
            modules[module] = {**known, "spec": str(spec), "bits_per_weight": bits}
        recipe: dict[str, Any] = {
            "convert": {
                "from": stored_format(self.plan),
                "format": self.codec.name,
                "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
                "exact": self.exact,
                "regridded": self._regridded(),
            }
        }
        if origin:
            recipe["source"] = origin.recipe
        return Manifest(
            fingerprint=fingerprint,
            lowbit_version=__version__,
            source={"name": self.checkpoint.path.name, "weights": dict(hashes)},
            recipe=recipe,
            calibration=origin.calibration if origin else None,
            modules=modules,
            expert_coverage=origin.expert_coverage if origin else {},
        )

    def result(self, out: Path) -> ConversionResult:
        return ConversionResult(
            out=out,
            source_format=stored_format(self.plan),
            format=self.codec.name,
            modules=len(self.plan),
            regridded=self._regridded(),
            exact=self.exact,
            notes=tuple(self.notes),
        )

    def _regridded(self) -> int:
        return sum(_grid(self.plan[module]) != spec for module, spec in self.specs.items())

    def _casts(self) -> bool:
        hidden = _hidden(self.checkpoint, self.plan)
        return any(
            info.dtype.is_floating_point and info.dtype != self.dtype and self.dtype != torch.float32
            for name, info in self.checkpoint.tensors.items()
            if name not in hidden
        )


def _write_parts(conversion: _Conversion, partial: PartialCheckpoint, progress: Progress | None) -> None:
    names = list(dense_names(conversion.checkpoint, conversion.plan))
    done = int(partial.journal[-1]["next"]) if partial.journal else 0
    if progress:
        progress.start(f"converting to {conversion.codec.name}", len(names) - done)
    index = len(partial.journal)
    pending: dict[str, torch.Tensor] = {}
    size = 0
    for position in range(done, len(names)):
        tensors = conversion.tensors(names[position])
        pending |= tensors
        size += sum(tensor.nbytes for tensor in tensors.values())
        if size >= _PART_BYTES or position + 1 == len(names):
            partial.commit_part(index, pending, {"next": position + 1})
            index, size, pending = index + 1, 0, {}
        if progress:
            progress.advance(names[position])
    if progress:
        progress.close()


def _target_specs(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], codec: Codec, ordered: Iterable[str]
) -> dict[str, IntSpec]:
    """Each module's number format in the target; :class:`UnsupportedError` naming the first that has none."""
    for module in ordered:
        if not isinstance(codec, GptqCodec):
            raise UnsupportedError(
                f"{module} has its columns in activation order (g_idx), which {codec.name} does not hold",
                ["convert to dense, or quantize again with static ordering"],
            )
    # One decision for all modules, so that layers which engines merge stay alike.
    centred = all(_centred(checkpoint, module, entry) for module, entry in plan.items())
    specs: dict[str, IntSpec] = {}
    for module, entry in plan.items():
        if isinstance(entry, StoredBlocks) and not in_numbered_block(module):
            continue  # embedding and head: engines want them dense
        try:
            source = _grid(entry)
            spec = fitting_spec(source, entry.shape, codec, centred=centred or source.symmetric)
        except UnsupportedError as error:
            raise UnsupportedError(f"{module}: {error}") from error
        if spec.scale_dtype != source.scale_dtype:
            _check_scales(checkpoint, module, entry, spec.scale_dtype)
        specs[module] = spec
    return specs


def _grid(entry: StoredModule) -> IntSpec:
    """The integer grid of a stored weight; :class:`UnsupportedError` for blocks that are none."""
    return grid_spec(entry.spec) if isinstance(entry, StoredBlocks) else integer_spec(entry.spec, "an exact conversion")


def _centred(checkpoint: Checkpoint, module: str, entry: StoredModule) -> bool:
    if isinstance(entry, StoredBlocks) or not isinstance(entry.spec, IntSpec) or entry.spec.symmetric:
        return True
    tensors = _local(checkpoint, module, entry, _ZEROS)
    return is_centred(entry.spec, entry.codec.zero_points(tensors, entry.spec, entry.shape))


def _check_scales(checkpoint: Checkpoint, module: str, entry: StoredModule, dtype: torch.dtype) -> None:
    for scales in _local(checkpoint, module, entry, _SCALES).values():
        if not torch.equal(scales.to(dtype).float(), scales.float()):
            raise UnsupportedError(
                f"{module}: scales of {scales.dtype} are not exact in {dtype}, which the target stores",
                ["convert to compressed-tensors or dense instead"],
            )


def _in_order(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], module: str) -> bool:
    entry = plan[module]
    if isinstance(entry, StoredBlocks):
        return True
    columns, size = entry.shape[1], entry.spec.group_size
    return size <= 0 or all(
        torch.equal(order.long(), torch.arange(columns) // size)
        for order in _local(checkpoint, module, entry, _ORDERS).values()
    )


def _local(checkpoint: Checkpoint, module: str, entry: StoredModule, wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    names = local_tensors(checkpoint, module, entry)
    return {local: checkpoint.read(names[local]) for local in wanted if local in names}


def _hidden(checkpoint: Checkpoint, plan: Mapping[str, StoredModule]) -> set[str]:
    return {name for module, entry in plan.items() for name in local_tensors(checkpoint, module, entry).values()}


def _left_dense(checkpoint: Checkpoint, specs: Mapping[str, IntSpec]) -> list[str]:
    """Dense matrices of the blocks, and the head: what a reader could otherwise take for quantized."""
    blocks = isinstance(checkpoint, GgufCheckpoint)

    def candidates() -> Iterator[str]:
        for name, info in checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            dense = info.dtype.is_floating_point or blocks
            if module != name and module not in specs and len(info.shape) == 2 and dense:
                yield module

    return [name for name in candidates() if in_numbered_block(name) or name.rpartition(".")[2] in _HEADS]


def _notes(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], quantization: dict[str, Any]) -> list[str]:
    config = checkpoint.quantization_config or {}
    notes: list[str] = []
    groups = config.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    if plan and any(scheme.get("input_activations") for scheme in schemes):
        notes.append("the source also quantizes activations; the copy does not, its weights are the same")
    if scheme := config.get("kv_cache_scheme"):
        if quantization.get("quant_method") == "compressed-tensors":
            quantization["kv_cache_scheme"] = scheme
        else:
            notes.append("the source's scheme for the KV cache has no place in the target's config")
    return notes


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = _without_quantization(kept["text_config"])
    return kept


def _set_dtype(config: dict[str, Any], name: str) -> None:
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(keys, name)
    if isinstance(config.get("text_config"), dict):
        _set_dtype(config["text_config"], name)


def _model_dtype(checkpoint: Checkpoint, plan: Mapping[str, StoredModule]) -> torch.dtype:
    nested = checkpoint.config.get("text_config")
    for config in (checkpoint.config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            name = str(config.get(key) or "").removeprefix("torch.")
            if name in DTYPES:
                return DTYPES[name]
    return next((entry.spec.scale_dtype for entry in plan.values() if isinstance(entry, StoredGrid)), torch.float32)


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        found = value
    else:
        found = DTYPES.get(value.lower())
        if found is None:
            raise UsageError(f"unknown dtype {value!r}: use bf16, fp16 or fp32")
    if found is not None and found not in DTYPES.values():
        raise UsageError(f"dtype {found} is none that a model is stored in: use bf16, fp16 or fp32")
    return found
