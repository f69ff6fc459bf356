"""llama.cpp, through the ``xllamacpp`` wheel: a GGUF file in, text, token ids and log-probabilities out.

The wheel runs llama-server inside this process. lowbit talks to it over its HTTP interface on the loopback device, at a
port of the system's choosing and with a key that nobody else has.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from lowbit.codecs.gguf.container import GgufFile, is_gguf, open_gguf
from lowbit.engines.server_log import errors_of
from lowbit.errors import CheckpointError, UnsupportedError, UsageError

__all__ = ["ContextError", "Generation", "LlamaCpp", "Sampling", "TokenLogprobs"]

DEFAULT_CONTEXT = 4096
"""Tokens of context where the caller names none and the model was trained on as many."""

_SILENT = -1


class ContextError(UsageError):
    """A prompt that does not fit into the context."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: the likeliest at ``temperature`` 0, else among the top ``top_p`` of probability."""

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None

    def request(self) -> dict[str, Any]:
        """These settings as llama-server calls them."""
        if not self.temperature >= 0:
            raise UsageError(f"temperature {self.temperature} is below zero")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not above 0 and at most 1")
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"temperature": self.temperature, "top_p": self.top_p, **seed}


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished text and its cost. ``stop`` is ``"eos"``, or ``"limit"`` when the tokens or the context ran out."""

    text: str
    stop: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of generation, the prompt left out."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A generated token, its natural log-probability under the model, and those of the likeliest tokens by id."""

    id: int
    logprob: float
    top: Mapping[int, float]


class LlamaCpp:
    """A GGUF model loaded into llama.cpp; close it, or use it as a context manager.

    ``context`` is in tokens (default: the model's own, at most :data:`DEFAULT_CONTEXT`), ``threads`` defaults to the
    physical cores this process may use, ``gpu_layers`` to what fits on a GPU. With ``precise`` keys and values are kept
    in float32 and attention is computed step by step, for comparisons.

    Raises :class:`UnsupportedError` when ``xllamacpp`` is not installed, the model is an encoder, or llama.cpp refuses
    it; :class:`CheckpointError` for a file that is missing, damaged or not GGUF.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
        precise: bool = False,
    ) -> None:
        _require_wheel()
        self.file = _open(Path(path))
        self.has_chat_template = "tokenizer.chat_template" in self.file.metadata
        self._key = secrets.token_hex(16)
        self._server: Any = _start(
            self.file, self._key, self._context(context), threads or physical_cores(), gpu_layers, precise=precise
        )
        self._address = urlsplit(self._server.listening_address)
        # Answered by the loop that runs the model: a server closed before its loop began waits for it for ever.
        self._call("GET", "/slots")
        settings = self._call("GET", "/props")["default_generation_settings"]
        self.context = int(settings["n_ctx"])
        """Tokens of prompt and answer together."""

    def _context(self, asked: int | None) -> int:
        if asked is not None:
            if asked < 1:
                raise UsageError(f"a context of {asked} tokens is too short")
            return asked
        trained = self.file.metadata.get(f"{self.file.metadata.get('general.architecture')}.context_length")
        return min(trained, DEFAULT_CONTEXT) if isinstance(trained, int) and trained > 0 else DEFAULT_CONTEXT

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``, special tokens in it recognised; ``special`` adds BOS and EOS as the model says."""
        request = {"content": text, "add_special": special, "parse_special": True}
        ids: list[int] = self._call("POST", "/tokenize", request)["tokens"]
        return ids

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        show: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue ``prompt`` (text, or token ids); ``show`` is given each piece of text as it comes.

        Raises :class:`UsageError` for an empty prompt and :class:`ContextError` for one that leaves no room.
        """
        tokens = self._checked(prompt)
        request = {"prompt": tokens, "n_predict": max_tokens, **(sampling or Sampling()).request()}
        text = ""
        last: Mapping[str, Any] = {}
        for event in self._stream("/completion", request):
            piece = event.get("content") or ""
            text += piece
            if piece and show is not None:
                show(piece)
            last = event
        return _generation(text, "eos" if last.get("stop_type") == "eos" else "limit", len(tokens), last)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        show: Callable[[str], None] | None = None,
    ) -> Generation:
        """The next message of a conversation (``role``, ``content``), through the model's chat template.

        Raises :class:`ContextError` when the conversation leaves no room for an answer.
        """
        request = {"messages": list(messages), "max_tokens": max_tokens, **(sampling or Sampling()).request()}
        text = ""
        stop = "limit"
        timed: Mapping[str, Any] = {}
        for event in self._stream("/v1/chat/completions", request):
            timed = event if "timings" in event else timed
            for choice in event.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                text += piece
                if piece and show is not None:
                    show(piece)
                if choice["finish_reason"] is not None:
                    stop = "limit" if choice["finish_reason"] == "length" else "eos"
        return _generation(text, stop, 0, timed)

    def greedy(self, prompt: Sequence[int], count: int, *, top: int = 1) -> list[TokenLogprobs]:
        """``count`` tokens after ``prompt``, the likeliest each time, past any end of text, with log-probabilities.

        They are those of the whole vocabulary's softmax, before any sampling; ``top`` likeliest ones come with each.
        """
        request = {
            "prompt": self._checked(prompt),
            "n_predict": count,
            "temperature": 0.0,
            "n_probs": max(top, 1),
            "post_sampling_probs": False,
            "ignore_eos": False,
            "return_tokens": True,
            "cache_prompt": False,
            "stream": False,
        }
        found: list[TokenLogprobs] = []
        while len(found) < count:
            answer = self._call("POST", "/completion", {**request, "n_predict": count - len(found)})
            new = [_token_logprobs(entry) for entry in answer["completion_probabilities"]]
            if not new:
                break
            found += new
            request["prompt"] = [*prompt, *(token.id for token in found)]
            if len(prompt) + len(found) >= self.context:
                break
        return found

    def _checked(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens or (isinstance(prompt, str) and not prompt):
            raise UsageError("the prompt is empty")
        if len(tokens) >= self.context:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens and the context {self.context}: shorten it or raise --context"
            )
        return tokens

    def _open_request(self, method: str, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        if self._server is None:
            raise UsageError(f"{self.file.path}: the model was closed")
        connection = HTTPConnection(self._address.hostname or "127.0.0.1", self._address.port)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _refusal(response.read())
        return response

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            with self._open_request(method, path, body) as response:
                return json.loads(response.read())
        except HTTPException as error:
            raise UnsupportedError(f"{self.file.path}: llama.cpp stopped answering ({type(error).__name__})") from error

    def _stream(self, path: str, body: Mapping[str, Any]) -> Any:
        """The events of a streamed answer; closing the iterator makes the server stop."""
        with self._open_request("POST", path, {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    if line.startswith(b"error: "):
                        raise _refusal(b'{"error": ' + line[7:] + b"}")
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise _refusal(line[6:])
                yield event


def physical_cores() -> int:
    """Physical cores, at most as many as the processors that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def _require_wheel() -> None:
    try:
        import xllamacpp  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"running GGUF models needs llama.cpp, which is not installed ({error}): pip install 'lowbit[llama-cpp]'"
        ) from error


def _open(path: Path) -> GgufFile:
    if path.is_dir():
        raise UsageError(
            f"{path} is a directory, not a .gguf file: make one with lowbit convert {path} {path.name}.gguf "
            f"(or smaller: lowbit quantize {path} {path.name}.gguf --scheme Q4_K_M)"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not is_gguf(path):
        raise CheckpointError(f"{path}: not a GGUF file (it does not begin with GGUF)")
    file = open_gguf(path)
    architecture = str(file.metadata.get("general.architecture", ""))
    if "bert" in architecture or architecture == "t5encoder":
        raise UnsupportedError(f"{path}: {architecture} models embed text and cannot generate it")
    return file


def _start(file: GgufFile, key: str, context: int, threads: int, gpu_layers: int | None, *, precise: bool) -> Any:
    import xllamacpp

    def parameters(verbosity: int) -> Any:
        found = xllamacpp.CommonParams()
        found.model.path = str(file.path)
        found.n_ctx = context
        found.n_parallel = 1
        found.cpuparams.n_threads = threads
        found.cpuparams_batch.n_threads = threads
        if gpu_layers is not None:
            found.n_gpu_layers = gpu_layers
            found.fit_params = False
        if precise:
            found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        found.warmup = False
        found.verbosity = verbosity
        found.port = 0
        found.api_keys = [key]
        found.n_threads_http = 2
        found.cache_ram_mib = 0
        found.cache_idle_slots = False
        found.endpoint_slots = True
        found.ui = False
        found.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        return found

    try:
        return xllamacpp.Server(parameters(_SILENT))
    except RuntimeError as error:
        # A second attempt, only to hear why: silence is for users, but the reason is in the log alone.
        reason = errors_of(lambda: xllamacpp.Server(parameters(verbosity=1)))
        raise UnsupportedError(f"{file.path}: llama.cpp cannot load it: {reason or error}") from error


def _refusal(answer: bytes) -> UsageError:
    """The server's error as one of lowbit's."""
    try:
        error = json.loads(answer)["error"]
        kind, message = str(error.get("type", "")), str(error.get("message", ""))
    except (ValueError, KeyError, AttributeError):
        kind, message = "", answer.decode("utf-8", errors="replace")[:300]
    if kind == "exceed_context_size_error":
        return ContextError(f"llama.cpp: {message}; raise --context")
    return UsageError(f"llama.cpp: {message}")


def _generation(text: str, stop: str, prompt_tokens: int, event: Mapping[str, Any]) -> Generation:
    timings = event.get("timings", {})
    return Generation(
        text,
        stop,
        prompt_tokens or int(timings.get("prompt_n", 0)) + int(timings.get("cache_n", 0)),
        int(timings.get("predicted_n", 0)),
        float(timings.get("prompt_ms", 0.0)) / 1000,
        float(timings.get("predicted_ms", 0.0)) / 1000,
    )


def _token_logprobs(entry: Mapping[str, Any]) -> TokenLogprobs:
    top = {int(other["id"]): float(other["logprob"]) for other in entry["top_logprobs"]}
    return TokenLogprobs(int(entry["id"]), float(entry["logprob"]), top)
