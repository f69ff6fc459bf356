"""What engines call things: a request in the gateway's terms, put as each engine wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.gateway.protocol import Lease
from lowbit.gateway.refusal import Refusal

__all__ = ["adapt", "count_request", "counted", "engine_error", "prompt_bytes"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an engine departs from OpenAI's words.

    ``renamed``  field of a request to what the engine calls it
    ``refused``  field to why the engine cannot
    ``tokenize`` field of /tokenize that holds the text; None where there is no such route
    ``template`` the engine has /apply-template, and its /tokenize takes no messages
    """

    renamed: Mapping[str, str]
    refused: Mapping[str, str]
    tokenize: str | None = None
    template: bool = False


_NO_BEAMS = "this engine has no beam search; vLLM has (engine: vllm)"
_OPENAI = Dialect({}, {})
_DIALECTS: Mapping[str, Dialect] = {
    "llama.cpp": Dialect(
        {"repetition_penalty": "repeat_penalty", "max_completion_tokens": "max_tokens"},
        {
            "use_beam_search": _NO_BEAMS,
            "echo": "llama.cpp's server does not give the prompt back; vLLM does (engine: vllm)",
            "best_of": "llama.cpp's server has n but not best_of",
        },
        tokenize="content",
        template=True,
    ),
    "vllm": Dialect({}, {}, tokenize="prompt"),
    "sglang": Dialect({}, {"use_beam_search": _NO_BEAMS}),
    "tgi": Dialect({"max_completion_tokens": "max_tokens"}, {"use_beam_search": _NO_BEAMS}),
    "ollama": Dialect({"repetition_penalty": "repeat_penalty"}, {"use_beam_search": _NO_BEAMS}),
    "lmdeploy": Dialect({}, {"use_beam_search": _NO_BEAMS}),
    "mistral.rs": Dialect({}, {"use_beam_search": _NO_BEAMS}),
    "mlc": Dialect({}, {"use_beam_search": _NO_BEAMS}),
}


def adapt(body: dict[str, Any], lease: Lease) -> dict[str, Any]:
    """The body for the engine of ``lease``: its model name, its field names, none of the gateway's own fields.

    Raises :class:`Refusal` for a field that the engine cannot serve.
    """
    dialect = _DIALECTS.get(lease.engine, _OPENAI)
    sent = {key: value for key, value in body.items() if key != "lowbit"}
    sent["model"] = lease.upstream_model
    for field, reason in dialect.refused.items():
        if sent.get(field):
            raise Refusal(400, f"{field}: {reason}", param=field, code="not_supported")
    if lease.tools is False and sent.get("tools") and sent.get("tool_choice") != "none":
        message = f"tools: the chat template of {lease.tier_id} knows none, and the model would never hear of them"
        raise Refusal(400, message, param="tools", code="not_supported")
    for field, name in dialect.renamed.items():
        if field in sent:
            value = sent.pop(field)
            if value is not None:
                sent.setdefault(name, value)
    return sent


def prompt_bytes(body: Mapping[str, Any]) -> int | None:
    """Bytes of all text in a request, more than its tokens can be; None where images make the count meaningless."""
    total = 0
    for message in body.get("messages") or ():
        content = message.get("content")
        total += 16
        for part in content if isinstance(content, list) else (content,):
            if isinstance(part, str):
                total += _bytes(part)
            elif isinstance(part, dict):
                if "text" not in part:
                    return None
                total += _bytes(part["text"] or "")
        if message.get("tool_calls"):
            total += len(str(message["tool_calls"]))
    if body.get("tools"):
        total += 2 * len(str(body["tools"]))
    prompt = body.get("prompt", body.get("content"))
    if isinstance(prompt, str):
        total += _bytes(prompt)
    elif isinstance(prompt, list):
        total += (
            max((_bytes(part) if isinstance(part, str) else len(part)) for part in prompt)
            if not isinstance(prompt[0], int)
            else len(prompt)
        )
    return total


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def count_request(body: Mapping[str, Any], lease: Lease) -> list[tuple[str, dict[str, Any], str | None]]:
    """The requests that count a prompt's tokens: ``(path, body, field of the answer that goes into the next body)``.

    Empty where the engine cannot count.
    """
    dialect = _DIALECTS.get(lease.engine, _OPENAI)
    prompt = body.get("prompt", body.get("content"))
    if dialect.tokenize is None or (prompt is not None and not isinstance(prompt, str)):
        return []
    model = {"model": lease.upstream_model}
    if prompt is not None:
        return [("/tokenize", {**model, dialect.tokenize: prompt, "add_special": True}, None)]
    chat = {key: body[key] for key in ("messages", "tools", "chat_template_kwargs") if key in body}
    if dialect.template:
        return [
            ("/apply-template", {**model, **chat}, "prompt"),
            ("/tokenize", {**model, "add_special": True}, "content"),
        ]
    return [("/tokenize", {**model, **chat}, None)]


def counted(answer: Mapping[str, Any]) -> int | None:
    """Tokens in the answer of an engine's /tokenize."""
    count, tokens = answer.get("count"), answer.get("tokens")
    if isinstance(count, int):
        return count
    return len(tokens) if isinstance(tokens, list) else None


_CLIENT_FAULTS = {"invalid_request_error", "exceed_context_size_error", "not_supported_error", "BadRequestError"}
_CANNOT = ("input is not supported", "is not supported by this model")
"""llama.cpp says so with status 500 of an image for a model without eyes."""

_TOO_LONG = ("context size", "context length", "maximum context", "too many tokens", "longer than the maximum")


def engine_error(status: int, answer: object) -> Refusal | None:
    """An engine's error as the client's fault, in OpenAI's shape; None where it is the engine's own.

    llama.cpp says ``{"error": {"code", "message", "type"}}``, vLLM the same or a flat object, others ``{"detail"}``
    or ``{"error": "text"}``.
    """
    error = answer.get("error", answer) if isinstance(answer, Mapping) else None
    details = error if isinstance(error, Mapping) else {"message": error}
    message = str(details.get("message") or details.get("detail") or f"the engine refused with status {status}")
    kind = details.get("type")
    if status == 404:
        return Refusal(501, f"the engine has no such route or model: {message}")
    if status == 501:
        return Refusal(501, message)
    ours = kind in _CLIENT_FAULTS or any(words in message for words in _CANNOT)
    if status in (401, 403, 407, 408, 429) or (status >= 500 and not ours):
        return None
    if kind == "exceed_context_size_error" or any(words in message for words in _TOO_LONG):
        needed, context = details.get("n_prompt_tokens"), details.get("n_ctx")
        if isinstance(needed, int) and isinstance(context, int):
            message = f"the prompt has {needed} tokens, {needed - context} more than the context of {context} holds"
        return Refusal(400, message, code="context_length_exceeded", param="messages")
    param = details.get("param")
    return Refusal(400, message, param=param if isinstance(param, str) else None)
