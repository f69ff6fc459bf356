"""Weights on their way into a GGUF file: slices are read and encoded on all cores and handed to the writer in order.

Each slice is the work of one thread from the read to the blocks, so no core waits for another at its end. What is in
memory is a few slices, and of a source that must be decoded whole (a packed weight) that one weight.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import StoredModule, read_quantized
from lowbit.codecs.gguf.architectures import ExportTensor, load_tensor
from lowbit.errors import NumericsError, UnsupportedError
from lowbit.formats import QuantizedTensor
from lowbit.formats.ggml import BlockTensor, GgmlType
from lowbit.formats.ggml.grids import Rounding, from_integer
from lowbit.formats.spec import PER_TENSOR
from lowbit.kernels.ggml import quantize_rows, round_to_half
from lowbit.kernels.threads import workers

__all__ = ["Tally", "Task", "encoded", "read_ahead"]

SLICE = 1 << 20
"""Weights in a slice. The memory of larger ones was given back to the system, and taken anew, for each."""
_SAMPLED_ROWS, _SAMPLED_SLICES = 4, 4
"""So many rows of one slice in so many are decoded again to see the error."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_T = TypeVar("_T")
_Part: TypeAlias = "torch.Tensor | QuantizedTensor | BlockTensor"


@dataclass(frozen=True, slots=True)
class Task:
    """A tensor of the file and the type that it gets.

    ``importance`` is float32 ``[matrices, in_features]`` or None. ``carry`` takes the codes of a quantized source as
    they are instead of rounding its values anew.
    """

    tensor: ExportTensor
    type: GgmlType
    importance: npt.NDArray[np.float32] | None = None
    carry: bool = False


@dataclass(slots=True)
class Tally:
    """What encoding did to one tensor: squared error and squares of a sample of its rows, and of carried codes, what
    rounding the scales did."""

    error: float = 0.0
    energy: float = 0.0
    rounding: Rounding = field(default_factory=Rounding)

    def add(self, other: Tally) -> None:
        """What became of more rows."""
        self.error += other.error
        self.energy += other.energy
        self.rounding += other.rounding

    @property
    def relative(self) -> float:
        """Squared error over squares."""
        return self.error / self.energy if self.energy else 0.0


def encoded(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tasks: Sequence[Task]
) -> Generator[tuple[Task, npt.NDArray[np.uint8], Tally], None, None]:
    """The bytes of all ``tasks`` in order, piece by piece, each with the tally of its tensor so far.

    Raises :class:`NumericsError` naming the tensor for a weight that is not finite or too large for its type.
    """
    last: Task | None = None
    tally = Tally()
    with workers() as pool:
        submitted = (pool.submit(_encode, part) for part in _slices(checkpoint, plan, tasks))
        # closed before the pool that its thread submits to
        with closing(read_ahead(submitted, torch.get_num_threads())) as futures:
            for future in futures:
                part, blocks, found = future.result()
                if part.task is not last:
                    last, tally = part.task, Tally()
                tally.add(found)
                yield part.task, blocks, tally


class _End(Generic[_T]):
    """The last item of a queue: an error, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead(items: Iterator[_T], depth: int) -> Generator[_T, None, None]:
    """``items``, produced by a thread of its own up to ``depth`` items ahead of the consumer.

    An exception of the producer is raised where its item would be. When the consumer leaves, the producer stops.
    """
    line: queue.Queue[_T | _End[_T]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: _T | _End[_T]) -> bool:
        while not stopped.is_set():
            try:
                line.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as caught:  # noqa: BLE001 - handed to the consumer, whatever it is
            error = caught
        finally:
            if hasattr(items, "close"):
                items.close()
        put(_End(error))

    thread = threading.Thread(target=produce, name="lowbit-read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := line.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows of one matrix of a task's tensor from ``first``, and how to get them; ``number`` counts its slices."""

    task: Task
    matrix: int
    number: int
    first: int
    read: Callable[[], _Part]


def _slices(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tasks: Sequence[Task]) -> Iterator[_Slice]:
    for task in tasks:
        tensor = task.tensor
        if len(tensor.shape) == 1 or not tensor.sources:
            yield _Slice(task, 0, 0, 0, partial(_whole, checkpoint, plan, tensor))
            continue
        for matrix, source in enumerate(tensor.sources):
            for number, (first, read) in enumerate(_matrix(checkpoint, plan, tensor, source)):
                yield _Slice(task, matrix, number, first, read)


def _whole(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tensor: ExportTensor) -> torch.Tensor:
    return load_tensor(checkpoint, plan, tensor).reshape(-1, tensor.shape[-1])


def _matrix(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tensor: ExportTensor, source: str
) -> Iterator[tuple[int, Callable[[], _Part]]]:
    """Slices of one matrix in GGUF's row order, each with its first row."""
    count, columns = tensor.shape[-2:]
    step = max(1, SLICE // columns)
    order = None if tensor.row_order is None else torch.from_numpy(tensor.row_order)
    module = source.removesuffix(".weight")
    weight: _Part | None = None
    if module != source and module in plan:
        stored = read_quantized(checkpoint, module, plan[module])
        weight = stored if isinstance(stored, QuantizedTensor | BlockTensor) else stored.dequantize()
    for first in range(0, count, step):
        some = range(first, min(first + step, count))
        if weight is None:
            rows = some if order is None else order[first : some.stop]
            yield first, partial(_read, checkpoint, source, rows, tensor)
        else:
            part = slice(first, some.stop)
            yield first, partial(_take, weight, part if order is None else order[part], tensor)


def _read(checkpoint: Checkpoint, source: str, rows: range | torch.Tensor, tensor: ExportTensor) -> torch.Tensor:
    """Some rows of a matrix that is stored as it is."""
    values = checkpoint.read_rows(source, rows).reshape(len(rows), tensor.shape[-1])
    return tensor.shifted(values)


def _take(weight: _Part, rows: slice | torch.Tensor, tensor: ExportTensor) -> _Part:
    """Some rows of a weight, as it is stored."""
    if isinstance(weight, torch.Tensor):
        return tensor.shifted(weight[rows])
    if isinstance(weight, BlockTensor):
        return BlockTensor(weight.type, weight.blocks[rows])
    shared = weight.spec.group_size == PER_TENSOR
    zeros = weight.zero_points
    return QuantizedTensor(
        weight.spec,
        weight.codes[rows],
        weight.scales if shared else weight.scales[rows],
        zeros if zeros is None or shared else zeros[rows],
        weight.group_index,
    )


def _encode(part: _Slice) -> tuple[_Slice, npt.NDArray[np.uint8], Tally]:
    tally = Tally()
    rows = part.read()
    try:
        blocks = _blocks(part, rows, tally)
    except (NumericsError, UnsupportedError) as error:
        names = part.task.tensor.sources or (part.task.tensor.name,)
        raise type(error)(f"{names[part.matrix]}: {error}") from error
    return part, blocks, tally


def _blocks(part: _Slice, rows: _Part, tally: Tally) -> npt.NDArray[np.uint8]:
    """The slice's ``rows`` in the blocks of its type."""
    kind = part.task.type
    if isinstance(rows, BlockTensor) and rows.type == kind:
        rows.validate("blocks")
        return rows.blocks.numpy()
    if part.task.carry and isinstance(rows, QuantizedTensor):
        carried, rounding = from_integer(rows, kind)
        tally.rounding += rounding
        tally.error += rounding.error
        tally.energy += rounding.energy
        return carried.blocks.numpy()
    values = rows if isinstance(rows, torch.Tensor) else rows.dequantize()
    if kind.name in _FLOATS:
        return _as_floats(values, kind, tally)
    importance = None if part.task.importance is None else part.task.importance[part.matrix]
    full_size = max(0, part.task.tensor.score_rows - part.first)
    blocks = quantize_rows(_array(values), kind, importance, full_size=full_size)
    if part.number % _SAMPLED_SLICES:
        return blocks
    sample = slice(None, None, max(1, len(values) // _SAMPLED_ROWS))
    decoded = BlockTensor(kind, torch.from_numpy(blocks[sample].copy())).dequantize().double()
    wanted = values[sample].double()
    tally.error += float((decoded - wanted).square().sum())
    tally.energy += float(wanted.square().sum())
    return blocks


def _array(values: torch.Tensor) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    """``values`` as float32, or the bits of bfloat16 as they are."""
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return values.float().numpy()


def _as_floats(values: torch.Tensor, kind: GgmlType, tally: Tally) -> npt.NDArray[np.uint8]:
    stored_as = _FLOATS[kind.name]
    if stored_as == values.dtype:
        _require_finite(values)
        return values.contiguous().view(torch.uint8).numpy()
    if kind.name == "F16" and values.dtype in (torch.bfloat16, torch.float32):
        halves, error, energy = round_to_half(_array(values))
        tally.error += error
        tally.energy += energy
        return halves.view(np.uint8)
    _require_finite(values)
    stored = values.to(stored_as).contiguous()
    _require_finite(stored, f"is too large for {kind}: use BF16 or F32")
    if kind.name != "F32":
        tally.error += float((stored.float() - values.float()).square().sum(dtype=torch.float64))
        tally.energy += float(values.float().square().sum(dtype=torch.float64))
    return stored.view(torch.uint8).numpy()


def _require_finite(values: torch.Tensor, problem: str = "is not finite: the source is damaged") -> None:
    # A sum is not finite if a value is not; it may also overflow, so look closer before refusing.
    if not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
        raise NumericsError(f"a weight {problem}")
