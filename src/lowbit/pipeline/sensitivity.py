"""How much each module's precision matters, for all modules and all candidates from one backward sweep.

The divergence that small errors cause is a quadratic form of them: ``KL = E[(g . d)^2] / 2``, where ``d`` is the error
of a module's output at a token and ``g`` the gradient, with respect to that output, of the log-probability of tokens
drawn from the model itself (whose outer products are the Fisher information). So one forward that keeps the hidden
states between blocks, and one sweep from the last block to the first that hands ``g`` on, measure the divergence of
every candidate in every module, in nats per token, with one block in memory.

Taken token by token, the estimate has little variance but leaves out what errors at different tokens do together (a
value's error is averaged over many tokens by attention); taken over a whole sequence, ``E[(sum_t g_t . d_t)^2] / 2``,
it leaves nothing out and is noisy. So candidates are told apart by the first, and each group's scale is the second's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from lowbit.errors import NumericsError
from lowbit.pipeline.choices import (
    Candidate,
    Grouping,
    GroupSensitivity,
    Measured,
    OneInput,
    Restorable,
    Table,
    shared_choices,
)
from lowbit.pipeline.folding import fold_target
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.sensitivity_tables import measure_table
from lowbit.pipeline.sensitivity_work import SweepWork
from lowbit.pipeline.stages import Group, discover_stages
from lowbit.pipeline.store import ActivationStore
from lowbit.pipeline.streamed import StreamedModel
from lowbit.quant import InputStatistics
from lowbit.quant.error import output_energies

__all__ = ["measure_sensitivity"]

TOKENS_PER_PASS = 2048
"""Tokens that go through a block, forward and back, at a time."""


Seen: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A linear's input and its output, whose gradient is kept."""


def measure_sensitivity(
    model: StreamedModel,
    ids: torch.Tensor,
    candidates: Sequence[Candidate],
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    grouping: Grouping = shared_choices,
    tables: Sequence[Table] = (),
    seed: int = 0,
    work: SweepWork | None = None,
    progress: Progress | None = None,
) -> list[GroupSensitivity]:
    """Measure every candidate in every linear (full checkpoint names) that is ``wanted``, on token ids ``[n, length]``.

    ``grouping`` cuts the modules of a block into those that must share one choice; each of ``tables`` is measured too,
    as the last groups. The cost is about five forwards of the model, and two more for each candidate beside solving
    it. What ``work`` has of an earlier run is not done again. Raises :class:`NumericsError` where the model's own
    outputs are not finite.
    """
    progress = progress or Silent()
    count = len(model.block_names)
    progress.start("measuring sensitivity", 2 * count + len(tables))
    with ExitStack() as open_files:
        if work is None:
            scratch = open_files.enter_context(tempfile.TemporaryDirectory(prefix="lowbit-sensitivity-"))
            work = SweepWork(Path(scratch) / "sweep")

        def store(name: str) -> ActivationStore:
            shape = (len(ids), ids.shape[1], model.hidden_size)
            found = ActivationStore(work.folder / f"{name}.bin", *shape, torch.float32)
            open_files.callback(found.close)
            return found

        states = [store(f"states-{index}") for index in range(count + 1)]
        # The gradient above a block stays until that below is whole, so that the block can be begun again.
        gradients = [_Gradient(store(f"gradient-{parity}"), TOKENS_PER_PASS) for parity in range(2)]
        if work.measured("forward") is None:
            _forward(model, ids, states, progress)
            _head(model, states[-1], gradients[count % 2], torch.Generator().manual_seed(seed))
            for written in (*states, gradients[count % 2].store):
                written.sync()
            work.finish("forward")
        else:
            for name in model.block_names:
                progress.advance(model.stored_name(name))
        found: list[GroupSensitivity] = []
        for index in reversed(range(count)):
            step, above, below = f"block {index}", gradients[(index + 1) % 2], gradients[index % 2]
            measured = work.measured(step)
            if measured is None:
                sweep = _BlockSweep(model, index, candidates, wanted, grouping)
                groups = sweep.run(states[index], above, below)
                below.store.sync()
                measured = work.finish(step, groups)
            found[:0] = measured
            progress.advance(model.stored_name(model.block_names[index]))
        for table in tables:
            measured = work.measured(table.name)
            if measured is None:
                group = measure_table(model, table, ids, (states[0], states[-1], gradients[0].store), candidates)
                measured = work.finish(table.name, [group])
            found += measured
            progress.advance(table.name)
    progress.close()
    return found


def _forward(model: StreamedModel, ids: torch.Tensor, stores: Sequence[ActivationStore], progress: Progress) -> None:
    """Fill ``stores`` with the hidden states before each block and after the last."""
    samples, length = ids.shape
    batch = max(1, TOKENS_PER_PASS // length)
    for first in range(0, samples, batch):
        stores[0].write(first, model.embed(ids[first : first + batch]))
    for index, name in enumerate(model.block_names):
        block = model.load_block(index)
        for first in range(0, samples, batch):
            stores[index + 1].write(first, model.run_block(block, index, stores[index].read(first, batch)))
        progress.advance(model.stored_name(name))


class _Gradient:
    """The gradient at a block boundary, read and written batch by batch of about so many ``tokens``."""

    def __init__(self, store: ActivationStore, tokens: int) -> None:
        samples, length, _ = store.shape
        self.store = store
        self.samples, self.tokens, self.batch = samples, samples * length, max(1, tokens // length)

    def batches(self, states: ActivationStore) -> Iterator[tuple[int, torch.Tensor]]:
        """First sample and hidden states ``[batch, length, hidden]`` of each batch."""
        for first in range(0, self.samples, self.batch):
            yield first, states.read(first, self.batch)


def _head(model: StreamedModel, states: ActivationStore, gradient: _Gradient, generator: torch.Generator) -> None:
    """Draw a token from the model at every position and take the gradient of its log-probability."""
    for first, hidden in gradient.batches(states):
        out = torch.empty_like(hidden)
        for row in range(len(hidden)):
            state = hidden[row : row + 1].to(model.device).requires_grad_()
            logits = model.logits(state)[0].float()
            if not bool(torch.isfinite(logits).all()):
                raise NumericsError(
                    f"{model.checkpoint.path}: the model's logits are not finite on the calibration text"
                )
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert state.grad is not None
            out[row] = state.grad[0]
        gradient.store.write(first, out)


class _BlockSweep:
    """One block's part of the sweep: collect statistics, solve every candidate, then go back through the block."""

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        candidates: Sequence[Candidate],
        wanted: Callable[[str], bool],
        grouping: Grouping,
    ) -> None:
        self.model, self.index, self.candidates = model, index, candidates
        self.lossy = [candidate for candidate in candidates if not candidate.exact]
        self.block = model.load_block(index)
        prefix = model.block_names[index]
        self.full = {
            name: full
            for name, module in self.block.named_modules()
            if isinstance(module, nn.Linear) and wanted(full := model.stored_name(f"{prefix}.{name}"))
        }
        self.local = {full: name for name, full in self.full.items()}
        self.groups = grouping(list(self.full.values()))
        self.solved: dict[tuple[str, str], Restorable] = {}
        self.energies: dict[tuple[str, str], tuple[float, float]] = {}
        self.sums: dict[tuple[int, str], list[float]] = {}
        self.samples_seen = 0

    def run(self, states: ActivationStore, above: _Gradient, below: _Gradient) -> list[GroupSensitivity]:
        """Measure, given the gradient ``above``, at this block's output, and leave that at its input ``below``."""
        self._solve(self._statistics(states, above))
        for first, hidden in above.batches(states):
            below.store.write(first, self._backward(hidden, above.store.read(first, above.batch)))
        return [self._summary(number, group, above.tokens) for number, group in enumerate(self.groups)]

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._weight(name).shape
        return rows, columns

    def _weight(self, name: str) -> torch.Tensor:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.weight

    def _statistics(self, states: ActivationStore, gradient: _Gradient) -> dict[Group, InputStatistics]:
        names = list(self.full)
        probe = states.read(0, 1)
        stages = discover_stages(self.block, names, lambda: self.model.run_block(self.block, self.index, probe))
        groups = [group for stage in stages for group in stage.groups]
        statistics = {group: InputStatistics(self._shape(group[0])[1], self.model.device) for group in groups}
        with _hooked(
            self.block,
            {group[0]: lambda x, _, one=statistics[group]: one.add(x) for group in groups},  # type: ignore[misc]
        ):
            for _, hidden in gradient.batches(states):
                self.model.run_block(self.block, self.index, hidden)
        return statistics

    @torch.no_grad()
    def _solve(self, statistics: dict[Group, InputStatistics]) -> None:
        for group, collected in statistics.items():
            weights = {self.full[name]: self._weight(name).float() for name in group}
            scalable = fold_target(self.block, self.model.family, group[0]) is not None
            shared: dict[object, object] = {}
            for candidate in self.lossy:
                fitting = {n: weight for n, weight in weights.items() if candidate.size(*weight.shape) is not None}
                if not fitting:
                    continue
                for name, solved in candidate.solve(OneInput(fitting, collected, shared, scalable)).items():
                    key = self.local[name], candidate.name
                    self.solved[key] = solved
                    self.energies[key] = output_energies(weights[name], solved.dequantize(), collected)

    def _backward(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient at the block's input, from that at its output; adds up the divergences on the way."""
        seen: dict[str, Seen] = {}

        def keep(name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
            def hook(x: torch.Tensor, output: torch.Tensor) -> None:
                output.retain_grad()
                seen[name] = (x.detach(), output)

            return hook

        self.samples_seen = len(hidden)
        state = hidden.to(self.model.device).requires_grad_()
        with _hooked(self.block, {name: keep(name) for name in self.full}), torch.enable_grad():
            output = self.model.run_block(self.block, self.index, state)
        output.backward(gradient.to(output))  # type: ignore[no-untyped-call]
        for number, group in enumerate(self.groups):
            for candidate in self.lossy:
                self._add([self.local[full] for full in group], (number, candidate.name), seen)
        assert state.grad is not None
        return state.grad

    @torch.no_grad()
    def _add(self, names: Sequence[str], key: tuple[int, str], seen: Mapping[str, Seen]) -> None:
        """Add up ``(g . d)^2 / 2`` by tokens and by sequences; errors of modules at one place are summed first."""
        samples = self.samples_seen
        by_token: torch.Tensor | None = None
        by_sequence = torch.zeros(samples, dtype=torch.float64, device=self.model.device)
        apart = 0.0
        for name in names:
            if name not in seen or (name, key[1]) not in self.solved:
                continue
            x, output = seen[name]
            gradient = output.grad
            if gradient is None:
                continue
            error = self.solved[name, key[1]].dequantize().to(x) - self._weight(name)
            changed = (torch.nn.functional.linear(x, error) * gradient).sum(-1).flatten().double()
            if ".experts." in self.full[name]:
                # An expert sees tokens in an order of its own: what belongs to one sequence is not known here.
                apart += 0.5 * float((changed**2).sum())
                continue
            by_token = changed if by_token is None else by_token + changed
            by_sequence += changed.view(samples, -1).sum(1)
        sums = self.sums.setdefault(key, [0.0, 0.0, 0.0])
        if by_token is not None:
            sums[0] += 0.5 * float((by_token**2).sum())
            sums[1] += 0.5 * float((by_sequence**2).sum())
        sums[2] += apart

    def _summary(self, number: int, group: tuple[str, ...], tokens: int) -> GroupSensitivity:
        shapes = [self._shape(self.local[full]) for full in group]
        sums = {c.name: self.sums[number, c.name] for c in self.lossy}
        ratios = [by_sequence / by_token for by_token, by_sequence, _ in sums.values() if by_token > 0]
        scale = sum(ratios) / len(ratios) if ratios else 1.0
        measured = {}
        for candidate in self.candidates:
            sizes = [size for shape in shapes if (size := candidate.size(*shape)) is not None]
            if len(sizes) < len(shapes):
                continue
            if candidate.exact:
                measured[candidate.name] = Measured(sum(sizes), 0.0, 0.0)
                continue
            by_token, _, apart = sums[candidate.name]
            energies = [self.energies[self.local[full], candidate.name] for full in group]
            signal = sum(signal for _, signal in energies)
            error = sum(error for error, _ in energies) / signal if signal > 0 else 0.0
            measured[candidate.name] = Measured(sum(sizes), (scale * by_token + apart) / tokens, error)
        return GroupSensitivity(group, sum(a * b for a, b in shapes), measured)


@contextmanager
def _hooked(block: nn.Module, hooks: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]]) -> Iterator[None]:
    """Call ``hooks[name](input, output)`` whenever the linear ``name`` has run."""
    handles = [
        block.get_submodule(name).register_forward_hook(lambda _, x, output, call=call: call(x[0], output))
        for name, call in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
