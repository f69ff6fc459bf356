"""How many tokens requests cost: what engines say of answers, and a guess before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.gateway.dialects import prompt_bytes
from lowbit.gateway.wire import decode

__all__ = ["counts", "estimate", "tail_usage"]


def tail_usage(tail: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens as the end of a stream tells them: in the last event before ``[DONE]``."""
    end = tail.rfind(b"[DONE]")
    last = tail[: end if end >= 0 else len(tail)].removesuffix(b"data: ").rstrip()
    last = last[last.rfind(b"\n\n") + 1 :]
    if b'"usage"' not in last and b'"timings"' not in last:
        return None
    try:
        event = decode(last[last.index(b"{") :])
    except ValueError:
        return None
    usage, timings = event.get("usage") or (event.get("response") or {}).get("usage"), event.get("timings")
    if isinstance(usage, dict):
        return counts(usage)
    if isinstance(timings, dict):
        prompt = timings.get("prompt_n", 0) + (timings.get("cache_n") or 0)
        return int(prompt), int(timings.get("predicted_n", 0))
    return None


def counts(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt and completion tokens of a ``usage``, in OpenAI's older and newer words."""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    return prompt if isinstance(prompt, int) else 0, completion if isinstance(completion, int) else 0


def estimate(body: Mapping[str, Any]) -> int:
    """Tokens that a request may cost, for queues and fairness: a quarter of its bytes, and its answer."""
    answer = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens") or 256
    text = prompt_bytes(body)
    if "input" in body or "documents" in body:
        text, answer = len(str(body.get("input", body.get("documents")))), 0
    return (text or 1024) // 4 + int(answer) * int(body.get("n") or 1) + 1
