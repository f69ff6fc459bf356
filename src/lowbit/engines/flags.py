"""One vocabulary of engine settings, and what each engine calls them; what an engine cannot do is refused with reasons.

The engines themselves are in :mod:`lowbit.engines.presets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowbit.errors import UnsupportedError

__all__ = ["EngineFlags", "EngineProfile", "Option", "build_command", "kv_name"]

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """What an engine may be told; None leaves it to the engine.

    ``context`` tokens of one request and ``concurrency`` requests at a time; ``kv_dtype`` as ``f16``, ``bf16``,
    ``fp8``, ``int8`` … or the engine's own name; ``kv_offload`` and ``cpu_offload`` bytes of host memory for the cache
    and the weights; ``draft_model`` and ``draft_tokens`` for speculative decoding; ``gpu_memory`` the share of a GPU to
    fill; ``mmproj`` the image encoder of a GGUF model; ``threads`` of decoding and ``threads_batch`` of prompts;
    ``batch`` tokens that are computed together at most and ``ubatch`` in one piece; ``cache_reuse`` the fewest tokens
    of a passage that is moved within the cache rather than computed anew; ``ngram_draft`` tokens drafted from what
    followed the last ``ngram_match`` tokens before (prompt lookup); ``extra`` arguments that are passed on as they are.
    """

    context: int | None = None
    concurrency: int | None = None
    kv_dtype: str | None = None
    prefix_caching: bool | None = None
    kv_offload: int | None = None
    cpu_offload: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    draft_model: str | None = None
    draft_tokens: int | None = None
    gpu_layers: int | None = None
    gpu_memory: float | None = None
    threads: int | None = None
    threads_batch: int | None = None
    batch: int | None = None
    ubatch: int | None = None
    flash_attention: bool | None = None
    cache_reuse: int | None = None
    ngram_draft: int | None = None
    ngram_match: int | None = None
    mmproj: str | None = None
    extra: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """The settings that are set, ``extra`` left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        return {name: value for name, value in values.items() if value is not None}


Option = str | Callable[[Any], tuple[str, ...]]
"""The flag that takes the value, or a function from the value to arguments."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """How one engine is started and what it understands.

    ``launch`` is the command before the model, with ``{python}``, ``{model}``, ``{name}``, ``{host}`` and ``{port}``;
    ``options`` maps settings to flags, ``environment`` to variables, ``refused`` says why not; ``kv_dtypes`` maps the
    common names to the engine's (None: any is passed on). ``probe`` is a path that only a working engine answers.
    """

    name: str
    launch: tuple[str, ...]
    options: Mapping[str, Option]
    refused: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    kv_dtypes: Mapping[str, str] | None = None
    health: str = "/health"
    probe: str | None = None

    @property
    def takes_name(self) -> bool:
        """Whether the engine can be told what to call the model; else it goes by its path."""
        return any("{name}" in part for part in self.launch)


def gib(flag: str) -> Option:
    """``flag`` with bytes as GiB, rounded up to hundredths."""
    return lambda value: (flag, f"{math.ceil(100 * value / GIB) / 100:g}")


def mib(flag: str) -> Option:
    """``flag`` with bytes as whole MiB."""
    return lambda value: (flag, str(max(1, value // MIB)))


def switch(on: str | None, off: str | None) -> Option:
    """``on`` for true and ``off`` for false; None: that is the default and needs no flag."""
    return lambda value: tuple(flag for flag in ((on if value else off),) if flag is not None)


def kv_name(profile: EngineProfile, kv_dtype: str) -> str:
    """What the engine calls a number format of the KV cache. Raises :class:`UnsupportedError` naming what it has."""
    if profile.kv_dtypes is None:
        return kv_dtype
    wanted = kv_dtype.lower()
    if wanted in profile.kv_dtypes:
        return profile.kv_dtypes[wanted]
    if wanted in profile.kv_dtypes.values():
        return wanted
    known = ", ".join(sorted({*profile.kv_dtypes}))
    raise UnsupportedError(f"{profile.name} has no {kv_dtype} KV cache", [f"kv_dtype may be {known}"])


def build_command(
    profile: EngineProfile, model: str, name: str, flags: EngineFlags, python: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The command line, with ``{port}`` and ``{host}`` still in it, and the environment variables it needs.

    Raises :class:`UnsupportedError` with every setting that the engine cannot take.
    """
    reasons = [f"{key}: {profile.refused[key]}" for key in flags.given() if key in profile.refused]
    known = {*profile.options, *profile.environment, *profile.refused, "threads"}
    reasons += [f"{key}: {profile.name} has no such setting" for key in flags.given() if key not in known]
    if flags.draft_tokens is not None and flags.draft_model is None:
        reasons.append("draft_tokens: needs draft_model")
    if flags.ngram_match is not None and flags.ngram_draft is None:
        reasons.append("ngram_match: needs ngram_draft")
    if flags.ngram_draft is not None and flags.draft_model is not None:
        reasons.append("ngram_draft: one of it and draft_model")
    if reasons:
        raise UnsupportedError(f"engine {profile.name} cannot be run so", reasons)
    filled = {"python": python, "model": model, "name": name, "host": "{host}", "port": "{port}"}
    command = [part.format(**filled) for part in profile.launch]
    environment: dict[str, str] = {}
    for key, value in flags.given().items():
        text = kv_name(profile, value) if key == "kv_dtype" else value
        if key in profile.environment:
            environment[profile.environment[key]] = str(text)
        option = profile.options.get(key)
        if callable(option):
            command += option(text)
        elif option is not None:
            command += (option, str(text))
    return (*command, *flags.extra), environment
