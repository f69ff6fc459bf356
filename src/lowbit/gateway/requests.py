"""The requests that clients may send, checked before an engine sees them.

Known fields are typed and bounded; unknown ones pass through to the engine, which knows its own extensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from lowbit.gateway.refusal import Refusal
from lowbit.gateway.schema import check_schema

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "LowbitOptions",
    "RerankRequest",
    "ResponsesRequest",
    "TokenizeRequest",
    "parse_json",
    "validate",
]

MAX_DEPTH = 128
"""Levels of nesting in a body: well under where Python or an engine would run out of stack."""


def _whole(value: object) -> object:
    """JSON has one kind of number: 7.0 is an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and any(isinstance(each, float) for each in value):
        value[:] = [_whole(each) for each in value]  # in the body, too: that is what the engine gets
    return value


WHOLE = BeforeValidator(_whole)
NonEmpty = Annotated[str, Field(min_length=1)]
Temperature: TypeAlias = Annotated[float, Field(ge=0, le=10)] | None
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)] | None
TopK: TypeAlias = Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None
RepetitionPenalty: TypeAlias = Annotated[float, Field(gt=0, le=100)] | None
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)] | None
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**64), WHOLE] | None
Positive = Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE]
Stop: TypeAlias = NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], WHOLE]
Texts = Annotated[list[str], Field(min_length=1)]
SomeTokenIds = Annotated[TokenIds, Field(min_length=1)]
Prompt: TypeAlias = str | Texts | SomeTokenIds | Annotated[list[SomeTokenIds], Field(min_length=1)]


class Strict(BaseModel):
    """Exact types, as JSON has them."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


def _needs(one_of: Mapping[str, Any]) -> ConfigDict:
    """For the description: a condition that a validator checks, as JSON schema says it."""
    return ConfigDict(json_schema_extra=dict(one_of))


def _given(name: str, kind: str = "object") -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": kind}}}


def _absent(name: str) -> dict[str, Any]:
    return {"properties": {name: {"type": "null"}}}


_STREAMED = {"anyOf": [_absent("stream_options"), {"required": ["stream"], "properties": {"stream": {"const": True}}}]}
_LOGGED = {
    "anyOf": [
        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
        {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
    ]
}
_TOOLED = {
    "anyOf": [
        {"properties": {"tool_choice": {"enum": [None, "none", "auto"]}}},
        {
            "required": ["tools"],
            "properties": {"tool_choice": {"const": "required"}, "tools": {"type": "array", "minItems": 1}},
        },
        {"required": ["tools"], "properties": {"tool_choice": {"type": "object"}}},
    ]
}
_CONTENT = {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}}


class LowbitOptions(BaseModel):
    """The field ``lowbit`` of a request (``extra_body`` in the openai client): what the client asks of the gateway."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tier: NonEmpty | None = Field(default=None, description="name of a tier, like model@tier")
    precision: Literal["high", "medium", "low"] | None = Field(default=None, description="16 bit, 8 bit or 4 bit")
    memory: Annotated[int, Field(gt=0), WHOLE] | None = Field(
        default=None, description="most bytes that the tier may take"
    )
    speed: bool = Field(default=False, description="the fastest tier that fits rather than the most exact")
    priority: Annotated[int, Field(ge=-10, le=10), WHOLE] = Field(
        default=0, description="higher goes first among one key's requests"
    )
    deadline: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        default=None, description="seconds until it is too late"
    )


class StreamOptions(Strict):
    """Extras of a stream."""

    include_usage: bool | None = None


class Sampling(Strict):
    """What every generation may ask of the sampler."""

    temperature: Temperature = None
    top_p: Share = None
    top_k: TopK = None
    min_p: Share = None
    repetition_penalty: RepetitionPenalty = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    seed: Seed = None
    stop: Stop = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    max_tokens: Positive | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    use_beam_search: bool | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class ImageUrl(Strict):
    """Where an image is: a ``data:`` url, or an address if the gateway allows that."""

    url: Annotated[str, Field(min_length=1, json_schema_extra={"pattern": "^data:"})]


class ContentPart(Strict):
    """A piece of a message: text, image, audio."""

    type: NonEmpty
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_its_field(self) -> ContentPart:
        if self.type in ("text", "image_url") and getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}")
        return self


class Message(Strict):
    """One message of a conversation."""

    model_config = _needs({"anyOf": [{"properties": {"role": {"const": "assistant"}}}, _CONTENT]})

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self


class FunctionSpec(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _sound(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            check_schema(value, "parameters")
        return value


class Tool(Strict):
    """A tool: always a function."""

    type: Literal["function"]
    function: FunctionSpec


class JsonSchema(Strict):
    """A schema with its name."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")

    @field_validator("schema_")
    @classmethod
    def _sound(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_schema(value, "schema")
        return value


class ResponseFormat(Strict):
    """Free text, any JSON, or JSON of a schema."""

    model_config = _needs(
        {"anyOf": [{"properties": {"type": {"enum": ["text", "json_object"]}}}, _given("json_schema")]}
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' needs the field 'json_schema'")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    model_config = _needs({"allOf": [_STREAMED, _LOGGED, _TOOLED]})

    model: NonEmpty
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    lowbit: LowbitOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, dict) and self.tools is not None:
            name = (self.tool_choice.get("function") or {}).get("name")
            if name not in (known := [tool.function.name for tool in self.tools]):
                raise ValueError(f"tool_choice names {name!r}; the tools are {', '.join(known)}")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    model_config = _needs(_STREAMED)

    model: NonEmpty
    prompt: Prompt
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    lowbit: LowbitOptions | None = None


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: NonEmpty
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    lowbit: LowbitOptions | None = None


class RerankRequest(Strict):
    """POST /v1/rerank and /rerank."""

    model: NonEmpty
    query: str
    documents: Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=4096)]
    top_n: Positive | None = None
    return_documents: bool | None = None
    lowbit: LowbitOptions | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses, passed to engines that have it."""

    model: NonEmpty
    input: str | list[dict[str, Any]]
    stream: bool | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    lowbit: LowbitOptions | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: ``content`` (llama.cpp), ``prompt`` or ``messages`` (vLLM)."""

    FIELDS: ClassVar[tuple[str, ...]] = ("content", "prompt", "messages")
    model_config = _needs(
        {
            "oneOf": [
                {
                    "required": [name],
                    "properties": {name: {"type": kind}} | {other: {"type": "null"} for other in others},
                }
                for name, kind, others in (
                    ("content", "string", ("prompt", "messages")),
                    ("prompt", "string", ("content", "messages")),
                    ("messages", "array", ("content", "prompt")),
                )
            ]
        }
    )

    model: NonEmpty | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special: bool | None = None
    lowbit: LowbitOptions | None = None

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if sum(getattr(self, name) is not None for name in self.FIELDS) != 1:
            raise ValueError(f"give one of {', '.join(self.FIELDS)}")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: NonEmpty | None = None
    tokens: TokenIds
    lowbit: LowbitOptions | None = None


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object in a request's body, or a :class:`Refusal` that says where it is broken."""
    try:
        value = _parse(raw)
        depth = _depth(value) if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH else 0
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not valid UTF-8 at byte {error.start}", code="invalid_json") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"the body is not valid JSON at {place}: {error.msg}", code="invalid_json") from None
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if depth > MAX_DEPTH:
        raise Refusal(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, not {_json_kind(value)}", code="invalid_json")
    return value


def _parse(raw: bytes) -> Any:
    """JSON without ``NaN``; where pydantic's fast parser gives up, the standard library says what is wrong."""
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json_kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _depth(value: object) -> int:
    """Levels of nesting, without recursion; stops counting past the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return depth


Request = TypeVar("Request", bound=Strict)


def validate(kind: type[Request], body: dict[str, Any]) -> Request:
    """``body`` as an instance of ``kind``, or a 400 that names the first field at fault."""
    try:
        parsed = kind.model_validate(body)
        for name, number in body.items():
            if type(number) is float and type(getattr(parsed, name, None)) is int:
                body[name] = int(number)
        return parsed
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False, include_context=False)
    first = items[0]
    param = _path(first["loc"])
    kinds = {item["msg"] for item in items if _path(item["loc"]) == param}
    message = first["msg"].removeprefix("Value error, ") if len(kinds) == 1 else " or ".join(sorted(kinds))
    raise Refusal(400, f"{param}: {message}" if param else message, param=param or None)


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].content`` from pydantic's location, without its names for the branches of a union."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "schema_" or (part.isidentifier() and part not in _BRANCHES):
            path += f".{part.rstrip('_')}" if path else part
    return path


_BRANCHES = {"str", "int", "float", "bool"}
"""How pydantic calls the plain branches of a union in a location; the others are no identifiers."""
