"""What an engine must answer for a checkpoint: the file between `make_checkpoints.py` and the engines' checks.

Standard library only, because it is read by the interpreter of each engine's environment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """Tokens in, tokens and natural-log probabilities out.

    `prompt_logprobs[i]` is that of `prompt_ids[i + 1]` after the tokens before it; `greedy_logprobs` go with
    `greedy_ids`. `margins` are the gaps in nats between the best and the second token at each greedy step.
    """

    prompt_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    prompt_logprobs: tuple[float, ...]
    greedy_logprobs: tuple[float, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Expected:
    """The prompts of one checkpoint, and what it holds."""

    format: str
    scheme: str
    method: str
    prompts: tuple[Prompt, ...]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Answer:
    """What an engine said to one prompt; the fields as in :class:`Prompt`."""

    greedy_ids: tuple[int, ...]
    prompt_logprobs: tuple[float, ...]
    greedy_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Largest and mean absolute difference of log-probabilities in nats, and the first greedy token that differs."""

    largest: float
    mean: float
    problem: str | None


def read(path: Path) -> Expected:
    """Read the expectations that :meth:`Expected.write` wrote."""
    content = json.loads(path.read_text())
    prompts = tuple(
        Prompt(**{key: tuple(value) if isinstance(value, list) else value for key, value in item.items()})
        for item in content.pop("prompts")
    )
    return Expected(prompts=prompts, **content)


def cases(folder: Path) -> list[tuple[Path, Expected]]:
    """The checkpoints in `folder` that have expectations beside them."""
    suffix = ".expected.json"
    return [(path.with_name(path.name.removesuffix(suffix)), read(path)) for path in sorted(folder.glob(f"*{suffix}"))]


def compare(expected: Expected, answers: list[Answer], *, largest: float, mean: float) -> Difference:
    """Hold answers to the expectations: the same greedy tokens, log-probabilities within both bounds (nats).

    A greedy token may differ only where the expected one leads by less than `largest`: which of two tokens so close
    comes first is the engine's rounding. What follows such a token has another prefix and is not compared.
    """
    gaps: list[float] = []
    problem = None
    for prompt, answer in zip(expected.prompts, answers, strict=True):
        same = _common(prompt.greedy_ids, answer.greedy_ids)
        if same < len(prompt.greedy_ids) and prompt.margins[same] > largest:
            problem = f"greedy token {same} is {answer.greedy_ids[same]}, not {prompt.greedy_ids[same]}"
        gaps += [abs(a - b) for a, b in zip(prompt.prompt_logprobs, answer.prompt_logprobs, strict=True)]
        pairs = zip(prompt.greedy_logprobs[:same], answer.greedy_logprobs[:same], strict=True)
        gaps += [abs(a - b) for a, b in pairs]
    result = Difference(max(gaps), sum(gaps) / len(gaps), problem)
    if problem is None and not (result.largest <= largest and result.mean <= mean):
        problem = f"log-probabilities differ by {result.largest:.3g} at most, {result.mean:.3g} on average"
        result = Difference(result.largest, result.mean, problem)
    return result


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
