"""What ``lowbit doctor`` looks for, as data, and what it found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["GATEWAY", "MODEL", "Diagnosis", "Finding", "Report", "collect"]

State: TypeAlias = Literal["ok", "finding", "not measured"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that can be wrong: what people notice, how it is measured, where the limit comes from, what mends it.

    ``mend`` is a command or a setting; ``{path}`` and ``{url}`` are filled in.
    """

    symptom: str
    measured: str
    origin: str
    mend: str


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one diagnosis at one place; ``detail`` has the figures, ``mend`` is empty where all is well."""

    check: str
    state: State
    where: str
    detail: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All results for a model or a gateway."""

    target: str
    results: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found; what could not be measured is neither."""
        return not any(result.state == "finding" for result in self.results)


MODEL: Mapping[str, Diagnosis] = {
    "files": Diagnosis(
        "a checkpoint does not load, or answers nonsense",
        "headers, shapes, every tensor, and each file's sha256 against lowbit.json",
        "one changed bit is one too many",
        "lowbit restore DEST OUT from a backup, or quantize or download again; lowbit verify {path} tells more",
    ),
    "scales": Diagnosis(
        "some answers are nonsense, perplexity jumps",
        "scales that are zero, negative or implausibly large, and codes that are all alike",
        "weights of trained models stay far below 1e5; a scale of zero loses its whole group",
        "lowbit quantize ORIGINAL OUT again, with --calibration text like the task; is ORIGINAL whole? lowbit verify "
        "ORIGINAL",
    ),
    "certificate": Diagnosis(
        "accuracy dropped, or nobody knows",
        "the certificate in lowbit.json: perplexity and KL divergence against the original on held-out text",
        "8 bits usually cost 1-2 % of perplexity, 4 bits 3-5 %; 0.1 nats of KL are about 10 %",
        "lowbit quantize ORIGINAL OUT with --calibration text like the task, --scheme W8A16 or --group-size 64; then "
        "lowbit eval OUT --against ORIGINAL",
    ),
    "modules": Diagnosis(
        "accuracy dropped though the bits should do",
        "relative weight error of each module in lowbit.json against the median of those with the same number format",
        "modules of one model quantize alike: three times the median is an outlier",
        "lowbit quantize ORIGINAL OUT --skip REGEX for those modules, or lowbit fit ORIGINAL OUT --size SIZE",
    ),
    "tokenizer": Diagnosis(
        "the engine does not start, or text comes out garbled",
        "tokenizer files in the checkpoint",
        "engines need them beside the weights",
        "copy tokenizer.json and tokenizer_config.json of the original into {path}",
    ),
    "chat template": Diagnosis(
        "chats run on, or answer as if to themselves",
        "chat_template.jinja, tokenizer_config.json, or the GGUF file's metadata",
        "without one, engines refuse chats or guess a format",
        "copy chat_template.jinja of the original into {path} (a base model has none: use completions)",
    ),
    "memory": Diagnosis(
        "out of memory when it is loaded, or under load",
        "the planner's figure for weights, KV cache and engine against what is free here",
        "the sum must be below what is free, or the kernel ends the engine",
        "lowbit estimate {path} shows what costs most: less --context or --concurrency, --kv-dtype, fewer bits "
        "(lowbit fit)",
    ),
    "engine": Diagnosis(
        "no engine takes it",
        "the checkpoint's format against the engines and GPUs that are here",
        "GGUF and dense files run in llama.cpp, other formats in vLLM on a GPU, or converted",
        "pip install 'lowbit[llama-cpp]', or vLLM where a GPU is; lowbit convert {path} OUT.gguf",
    ),
}

GATEWAY: Mapping[str, Diagnosis] = {
    "reachable": Diagnosis(
        "nobody gets an answer", "GET /v1/models", "within ten seconds", "start it: lowbit serve CONFIG.yaml"
    ),
    "ready": Diagnosis(
        "503 for a model",
        "GET /ready",
        "each model has a tier that answers, or one that loads when asked",
        "lowbit doctor PATH for its checkpoints; the engines' logs",
    ),
    "models": Diagnosis(
        "404 for a model", "GET /v1/models", "at least one", "add it under models: of serve.yaml and start again"
    ),
    "probe": Diagnosis(
        "answers fail or take long to begin",
        "one request for one token to each chat model, timed",
        "--ttft, five seconds unless given",
        "lowbit tune CONFIG.yaml; is the machine busy with something else?",
    ),
    "metrics": Diagnosis(
        "nobody sees trouble coming",
        "GET /metrics",
        "lowbit's gateway has them; another server's are read as far as their names are known",
        "",
    ),
}
"""Checks of a gateway; its figures are judged by :data:`lowbit.ops.doctor.gateway.FIGURES` on top."""


def collect(
    table: Mapping[str, Diagnosis], check: str, findings: Iterable[tuple[str, str]], fine: str, **words: str
) -> list[Finding]:
    """One :class:`Finding` for each ``(where, detail)``, or that all is well: ``fine``."""
    mend = table[check].mend.format(**words)
    found = [Finding(check, "finding", where, detail, mend) for where, detail in findings]
    return found or [Finding(check, "ok", "", fine)]
