"""Importance matrices collected from a streamed model: mean squared inputs of every matrix of the blocks.

The same figures that llama.cpp's ``imatrix`` tool gathers, for checkpoints that need not be GGUF files yet: block by
block in the memory of one, quantized sources included, experts by the tokens that they were chosen for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs.gguf.architectures import ExportPlan, ExportTensor, export_plan
from lowbit.codecs.gguf.imatrix import FORMS, Form, ImportanceMatrix, write_imatrix
from lowbit.errors import NumericsError, UnsupportedError, UsageError
from lowbit.pipeline.job import DEMO, calibration_data, compute_device
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.store import ActivationStore
from lowbit.pipeline.streamed import StreamedModel
from lowbit.planning import probe

__all__ = ["ImatrixResult", "collect", "imatrix", "is_encoder", "refuse_encoder", "unseen_experts"]

TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True, slots=True)
class ImatrixResult:
    """What :func:`imatrix` wrote: ``entries`` matrices of ``tensors``, from ``tokens`` of ``calibration``.

    ``unseen`` are the experts that no token chose, whose columns all weigh the same; ``seconds`` is the time it took.
    """

    out: Path
    tensors: int
    tokens: int
    calibration: dict[str, Any]
    unseen: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()


def imatrix(
    source: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 42,
    form: Form | None = None,
    device: str = "auto",
    memory: int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ImatrixResult:
    """Collect the importance matrix of ``source`` and write it to ``out``.

    ``calibration`` is what :func:`lowbit.quantize` takes; ``form`` is ``gguf`` or the legacy ``dat`` (default: by the
    suffix of ``out``). ``memory`` in bytes. Raises a :class:`lowbit.errors.LowbitError` for what is the user's to mend.
    """
    started = time.perf_counter()
    out = Path(out)
    form = form or ("dat" if out.suffix == ".dat" else "gguf")
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r} of an importance matrix: use {' or '.join(FORMS)}")
    if out.is_dir():
        raise UsageError(f"{out}: is a directory: name a file, e.g. {out / 'model.imatrix.gguf'}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists already: name another file, or --overwrite")
    progress = progress or Silent()
    with open_checkpoint(
        source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    ) as checkpoint:
        export = export_plan(checkpoint)
        refuse_encoder(export, str(checkpoint.path))
        model = StreamedModel(checkpoint, device=compute_device(device), trust_remote_code=trust_remote_code)
        data, _ = calibration_data(
            DEMO if calibration is None and str(source) == DEMO else calibration,
            model,
            memory or probe().available // 2,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        matrix = collect(model, data.ids, export.tensors, data.name, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_imatrix(out, matrix, form, overwrite=overwrite)
    return ImatrixResult(
        out,
        len(matrix),
        data.tokens,
        {"name": data.name, "sha256": data.sha256, "samples": len(data.ids), "seq_len": data.ids.shape[1]},
        unseen_experts(matrix),
        time.perf_counter() - started,
        data.notes,
    )


def is_encoder(export: ExportPlan) -> bool:
    """Whether the model makes embeddings of whole texts, which is not run token by token."""
    return export.metadata.get(f"{export.architecture}.attention.causal") is False


def refuse_encoder(export: ExportPlan, where: str) -> None:
    """Raise :class:`UnsupportedError` for a model whose activations lowbit does not collect."""
    if is_encoder(export):
        raise UnsupportedError(
            f"{where}: importance is collected from causal language models, and this one is an encoder",
            ["use a scheme that needs none, e.g. Q8_0 or Q4_K_M, without --imatrix auto"],
        )


def unseen_experts(matrix: ImportanceMatrix) -> tuple[str, ...]:
    """``tensor[expert]`` of each matrix that no token reached."""
    return tuple(
        f"{name}[{expert}]" for name, counts in matrix.counts.items() for expert in np.flatnonzero(counts == 0).tolist()
    )


def collect(
    model: StreamedModel, ids: torch.Tensor, tensors: Sequence[ExportTensor], name: str, progress: Progress
) -> ImportanceMatrix:
    """Run ``ids`` int64 ``[samples, seq_len]`` through ``model`` and sum up the squared inputs of its linears.

    ``tensors`` are those of the GGUF file, whose names the matrix gets; ``name`` is recorded as the data set. Hidden
    states wait on disk between blocks. Raises :class:`NumericsError` for activations that are not finite.
    """
    samples, length = ids.shape
    batch = max(1, TOKENS_PER_FORWARD // length)
    sums: dict[str, _Sum] = {}
    progress.start("importance matrix", len(model.block_names))
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="lowbit-imatrix-") as scratch:
        store = ActivationStore(Path(scratch) / "states.bin", samples, length, model.hidden_size, model.dtype)
        try:
            for first in range(0, samples, batch):
                store.write(first, model.embed(ids[first : first + batch]))
            for index, prefix in enumerate(model.block_names):
                begun = time.perf_counter()
                block = model.load_block(index)
                inputs = _Inputs(block, partial(_stored_name, model, prefix), sums)
                for first in range(0, samples, batch):
                    store.write(first, model.run_block(block, index, store.read(first, batch)))
                    inputs.forget()
                del block, inputs
                rate = ids.numel() / max(time.perf_counter() - begun, 1e-9)
                progress.advance(model.stored_name(prefix), tokens_per_second=rate)
        finally:
            store.close(delete=True)
    progress.close()
    return _matrix(sums, tensors, ids, name)


def _stored_name(model: StreamedModel, prefix: str, local: str) -> str:
    return model.stored_name(f"{prefix}.{local}")


class _Sum:
    """Squares of one linear's inputs, summed in float64, and how many inputs there were."""

    def __init__(self, columns: int) -> None:
        self.squares = torch.zeros(columns, dtype=torch.float64)
        self.count = 0


class _Inputs:
    """Hooks that add up the squared inputs of every linear of a block; linears that share an input share the work."""

    def __init__(self, block: nn.Module, stored_name: Callable[[str], str], sums: dict[str, _Sum]) -> None:
        self._last: torch.Tensor | None = None
        self._squares = torch.empty(0)
        for local, module in block.named_modules():
            if isinstance(module, nn.Linear):
                name = stored_name(local)
                sums[name] = _Sum(module.in_features)
                module.register_forward_pre_hook(self._hook(name, sums[name]))

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _hook(self, name: str, total: _Sum) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            if x is not self._last:
                squares = x.reshape(-1, x.shape[-1]).float().square().sum(0)
                if not bool(torch.isfinite(squares).all()):
                    raise NumericsError(f"{name}: an input is not finite: the model overflows on the calibration text")
                self._last, self._squares = x, squares.double().cpu()
            total.squares += self._squares
            total.count += x.numel() // x.shape[-1]

        return hook


def _matrix(sums: dict[str, _Sum], tensors: Sequence[ExportTensor], ids: torch.Tensor, name: str) -> ImportanceMatrix:
    values: dict[str, npt.NDArray[np.float32]] = {}
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for tensor in tensors:
        parts = [sums.get(source.removesuffix(".weight")) for source in tensor.sources if source.endswith(".weight")]
        found = [part for part in parts if part is not None]
        if not tensor.keep_float and found and len(found) == len(tensor.sources):
            values[tensor.name] = torch.stack([part.squares for part in found]).float().numpy()
            counts[tensor.name] = np.array([part.count for part in found], np.int64)
    return ImportanceMatrix(values, counts, (name,), len(ids), ids.shape[1])
