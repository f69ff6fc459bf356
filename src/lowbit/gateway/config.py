"""The configuration of ``lowbit serve``: strict models of a YAML file. A key that means nothing is an error with its
line and a suggestion.

::

    host: 127.0.0.1
    port: 8000
    api_keys: [env:LOWBIT_KEY]          # or sha256:<64 hex digits>, of `lowbit serve --hash-key`
    memory: 12GiB                       # of the host; gpu_memory: of each GPU
    models:
      assistant:
        policy: {ttft: 2s, failures: 3}
        tiers:
          - {name: bf16, path: ./Qwen3-8B}
          - {name: int4, path: ./Qwen3-8B-Q4_K_M.gguf, context: 8192}
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from lowbit.engines.nodes import check_nodes
from lowbit.errors import UsageError
from lowbit.gateway.config_file import Lines, explain, read_yaml
from lowbit.gateway.policy import Settings

__all__ = [
    "EngineName",
    "FlagsConfig",
    "ImagesConfig",
    "LimitsConfig",
    "ModelConfig",
    "PolicyConfig",
    "ReplicasConfig",
    "ServeConfig",
    "TierConfig",
    "config_for_model",
    "kind_of",
    "load_config",
    "parse_config",
]

EngineName: TypeAlias = Literal[
    "auto", "llama.cpp", "vllm", "encoder", "openai", "sglang", "lmdeploy", "tensorrt-llm", "tgi", "ollama",
    "mistral.rs", "mlc",
]  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/\-]*")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE)
_TIME = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|min|h|d)?")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BITS = re.compile(r"(?:(?:bf|fp|f)(?P<float>\d+))|(?:(?:int|w|q|iq)(?P<int>\d+))", re.IGNORECASE)


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("is not a size: write e.g. 12GiB or 800MiB")
    power = " KMGT".index(match["unit"].upper() or " ")
    decimal = power > 0 and value.strip().upper().endswith("B") and not match["binary"]
    return int(float(match["number"]) * (1000 if decimal else 1024) ** power)


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise ValueError("is not a time: write e.g. 500ms, 30s or 10m")
    return float(match["number"]) * _SECONDS[match["unit"] or "s"]


def _one_or_more(value: object) -> object:
    return value if isinstance(value, list) or value is None else [value]


Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
GpuNumber = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """No unknown keys, no silent conversions, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FlagsConfig(Strict):
    """What an engine may be told, in one vocabulary; :mod:`lowbit.engines.flags` maps it and refuses what cannot be.

    ``kv_offload`` and ``cpu_offload`` are bytes of host memory; ``speculative`` is a draft model and the tokens it
    drafts; ``extra`` goes to the engine's command line as it is.
    """

    prefix_caching: bool | None = None
    kv_offload: Bytes | None = None
    cpu_offload: Bytes | None = None
    tensor_parallel: Count | None = None
    pipeline_parallel: Count | None = None
    draft_model: str | None = None
    draft_tokens: Count | None = None
    gpu_layers: int | None = None
    gpu_memory: Annotated[float, Field(gt=0, le=1)] | None = None
    threads: Count | None = None
    threads_batch: Count | None = None
    batch: Count | None = None
    ubatch: Count | None = None
    flash_attention: bool | None = None
    cache_reuse: Count | None = None
    ngram_draft: Count | None = None
    ngram_match: Count | None = None
    mmproj: str | None = None
    extra: list[str] = []


class ReplicasConfig(Strict):
    """How many engines of a tier a cluster runs (``lowbit serve --ray``): between ``min`` and ``max``, one more when
    each has ``target`` requests under way (default: the tier's concurrency)."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Count = 1
    target: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.max < max(1, self.min):
            raise ValueError(f"max is {self.max}, less than min {self.min}")
        return self


class TierConfig(Strict):
    """One precision of a model: exactly one of ``path`` (a checkpoint or GGUF file), ``url`` (an engine that runs) and
    ``command`` (one to start; ``{port}`` and ``{host}`` are filled in).

    ``memory`` of the host and ``gpu_memory`` on each of its GPUs default to the planner's figures; ``gpus`` are numbers
    of this machine's, chosen where it is not given, none for ``[]``. ``kl`` defaults to the certificate in the
    checkpoint's manifest, ``bits`` to what the name says (int4, q8_0, bf16) or the checkpoint. ``api_key`` is for the
    engine behind ``url``: ``env:NAME``. ``python`` names an interpreter of another environment, for vLLM. ``replicas``
    is for a Ray cluster. ``nodes`` are the addresses of the machines that one vLLM runs over, this one first; what the
    others run, ``--print-command`` shows. ``tuned`` is what ``lowbit tune`` measured; it means nothing to serving.
    """

    name: str
    path: str | None = None
    url: str | None = None
    command: list[str] | None = None
    engine: EngineName = "auto"
    upstream_model: str | None = None
    api_key: str | None = None
    python: str | None = None
    quantize: str | None = None
    context: Count | None = None
    concurrency: Count = 4
    kv_dtype: str | None = None
    flags: FlagsConfig = FlagsConfig()
    env: dict[str, str] = {}
    memory: Bytes | None = None
    gpu_memory: Bytes | None = None
    gpus: list[GpuNumber] | None = None
    kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    pinned: bool = False
    ready_timeout: Seconds = 600.0
    hang_timeout: Seconds = 60.0
    tuned: dict[str, Any] = {}
    replicas: ReplicasConfig = ReplicasConfig()
    nodes: list[str] = []

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value) or "/" in value:
            raise ValueError("a tier's name has letters, digits, '.', '_', '-' only, e.g. int4")
        return value

    @field_validator("url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https?://[^/\s]+", value):
            raise ValueError("is not an http(s) url")
        return value.rstrip("/").removesuffix("/v1") if value else value

    @model_validator(mode="after")
    def _one_source(self) -> TierConfig:
        given = [key for key in ("path", "url", "command") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of path, url and command, not {' and '.join(given) or 'none'}")
        if self.command == []:
            raise ValueError("command is empty")
        if self.engine == "encoder" and self.path is None:
            raise ValueError(f"engine {self.engine} needs path")
        return self

    @model_validator(mode="after")
    def _batch_holds_all(self) -> TierConfig:
        least = max(2, self.concurrency)
        if self.flags.batch is not None and self.flags.batch < least:
            raise ValueError(
                f"flags.batch is {self.flags.batch}, and llama.cpp aborts below {least}: a batch has at least 2 tokens "
                f"and one of each of the {self.concurrency} requests at a time (concurrency)"
            )
        return self

    @model_validator(mode="after")
    def _gpus_once(self) -> TierConfig:
        if self.gpu_memory is not None and self.flags.gpu_memory is not None:
            raise ValueError("gpu_memory is given twice: as bytes, and in flags as a share")
        if self.gpus is not None and len(set(self.gpus)) < len(self.gpus):
            raise ValueError(f"gpus names one twice: {self.gpus}")
        return self

    @model_validator(mode="after")
    def _nodes_share_gpus(self) -> TierConfig:
        if self.nodes:
            if self.path is None or self.engine not in ("auto", "vllm"):
                raise ValueError("nodes are for a path that vLLM serves")
            reasons = check_nodes(self.nodes, self.flags.tensor_parallel or 1, self.flags.pipeline_parallel or 1)
            if reasons:
                raise ValueError("; ".join(reasons))
        return self

    def known_bits(self) -> float | None:
        """``bits``, or what the name says: 16 for bf16, 4 for int4 and q4_k_m; None where it says nothing."""
        if self.bits is not None:
            return self.bits
        match = _BITS.match(self.name)
        return float(match["float"] or match["int"]) if match else None


class PolicyConfig(Strict):
    """The numbers of :class:`lowbit.gateway.policy.Settings`, times as ``500ms``, ``30s``, ``10m`` or seconds."""

    failures: Count = 3
    cooldown: Seconds = 10.0
    max_cooldown: Seconds = 300.0
    ttft: Seconds | None = None
    itl: Seconds | None = None
    degrade_after: Seconds = 10.0
    recover_after: Seconds = 60.0
    dwell: Seconds = 30.0
    max_dwell: Seconds = 600.0
    margin: Annotated[float, Field(gt=0, le=1)] = 0.7
    idle_unload: Seconds | None = None
    patience: Seconds = 5.0
    grace: Seconds = 2.0
    attempts: Count = 3

    def settings(self) -> Settings:
        """The same numbers for the pure policy."""
        return Settings(**self.model_dump())


class ModelConfig(Strict):
    """A model: its tiers in order of preference (the first answers while all is well)."""

    tiers: Annotated[list[TierConfig], Field(min_length=1)]
    policy: PolicyConfig = PolicyConfig()
    aliases: list[str] = []
    pinned: bool = False
    kind: Literal["chat", "embedding", "rerank"] = "chat"

    @field_validator("tiers")
    @classmethod
    def _different_names(cls, value: list[TierConfig]) -> list[TierConfig]:
        names = [tier.name for tier in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tiers are called {name!r}")
        return value


class LimitsConfig(Strict):
    """What clients may ask: of one model's queue, of one key, of one request."""

    queue_requests: Count = 256
    queue_tokens: Count = 1_000_000
    key_requests_per_minute: Count | None = None
    key_concurrency: Count | None = None
    body_bytes: Bytes = 32 * 1024**2
    prompt_tokens: Count | None = None
    request_timeout: Seconds = 600.0
    queue_timeout: Seconds = 120.0
    first_byte_timeout: Seconds = 300.0


class ImagesConfig(Strict):
    """Remote images in vision messages: refused unless allowed, and never from private addresses."""

    remote: bool = False
    domains: list[str] = []
    bytes: Bytes = 20 * 1024**2


class ServeConfig(Strict):
    """The whole configuration. ``memory`` is the budget of all loaded tiers in the host's memory, ``gpu_memory`` that
    on each GPU (one size for all, or a list); default: 90 % of what is free."""

    models: Annotated[dict[str, ModelConfig], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: list[str] = []
    insecure: bool = False
    memory: Bytes | None = None
    gpu_memory: Annotated[list[Bytes] | None, BeforeValidator(_one_or_more)] = None
    threads: Count | None = None
    limits: LimitsConfig = LimitsConfig()
    images: ImagesConfig = ImagesConfig()
    logs: str | None = None
    cors_origins: list[str] = []

    @field_validator("api_keys")
    @classmethod
    def _no_plain_keys(cls, value: list[str]) -> list[str]:
        for key in value:
            if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}|env:[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError("a key is given as sha256:<64 hex digits> or env:NAME, never as it is")
        return value

    @model_validator(mode="after")
    def _unique_names(self) -> ServeConfig:
        seen: dict[str, str] = {}
        for name, model in self.models.items():
            for each in (name, *model.aliases):
                if not _NAME.fullmatch(each):
                    raise ValueError(f"{each!r} is no name: letters, digits and . _ : / - only")
                if each in seen:
                    raise ValueError(f"{each!r} names both {seen[each]!r} and {name!r}")
                seen[each] = name
        return self


def load_config(path: str | Path) -> ServeConfig:
    """Read a YAML file. Raises :class:`UsageError` naming the file, the line and the key."""
    content, lines = read_yaml(Path(path))
    return parse_config(content, where=str(path), lines=lines, base=Path(path).parent)


def parse_config(
    content: Any,
    *,
    where: str = "config",
    lines: Lines | None = None,
    base: Path | None = None,
) -> ServeConfig:
    """A configuration from plain values; a relative ``path`` that exists beside the file (``base``) is taken there."""
    try:
        config = ServeConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(explain(error, ServeConfig, where, lines or {})) from None
    return config if base is None else _beside(config, base)


def config_for_model(
    path: str,
    *,
    name: str | None = None,
    engine: EngineName = "auto",
    context: int | None = None,
    concurrency: int = 4,
    quantize: str | None = None,
    python: str | None = None,
    kind: str | None = None,
    **serve: Any,
) -> ServeConfig:
    """The configuration of ``lowbit serve MODEL``: one model, one tier, pinned; ``serve`` are fields of ServeConfig.

    ``kind`` is read from the checkpoint where it is not given.
    """
    model = name or re.sub(r"[^A-Za-z0-9._\-]", "-", Path(path).name.removesuffix(".gguf")) or "model"
    tier = {
        "name": quantize or "default",
        "path": path,
        "engine": engine,
        "context": context,
        "concurrency": concurrency,
        "quantize": quantize,
        "python": python,
        "pinned": True,
    }
    served = {"tiers": [tier], "kind": kind or kind_of(Path(path))}
    return parse_config({"models": {model: served}, **serve}, where="lowbit serve")


def kind_of(path: Path) -> str:
    """``embedding`` for a directory of sentence-transformers, ``rerank`` for a cross-encoder, else ``chat``."""
    try:
        architectures = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return "chat"
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return "rerank"
    return "embedding" if (path / "modules.json").is_file() else "chat"


def _beside(config: ServeConfig, base: Path) -> ServeConfig:
    """The same with relative paths of tiers taken from the file's directory, where something is there."""

    def move(tier: TierConfig) -> TierConfig:
        if tier.path is None or Path(tier.path).is_absolute() or not (base / tier.path).exists():
            return tier
        return tier.model_copy(update={"path": str(base / tier.path)})

    models = {
        name: model.model_copy(update={"tiers": [move(tier) for tier in model.tiers]})
        for name, model in config.models.items()
    }
    return config.model_copy(update={"models": models})
