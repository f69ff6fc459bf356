"""``lowbit chat``: a conversation with a GGUF model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from lowbit.cli.generate import show
from lowbit.cli.options import add_generation_arguments

if TYPE_CHECKING:
    from lowbit.engines.llama_cpp import Generation, LlamaCpp, Sampling

HELP = "talk with a GGUF model, through llama.cpp and the model's chat template"
EXAMPLES = """\
  lowbit chat model-Q4_K_M.gguf
  lowbit chat model.gguf --system "Answer in one sentence." --temperature 0.2"""

_COMMANDS = "/exit ends, /clear forgets the conversation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a .gguf file (of a split model, any part)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_generation_arguments(parser, max_tokens=1024)


def run(arguments: argparse.Namespace) -> int:
    """Read messages from stdin, a line each, and stream the answers to stdout until /exit or the end of input."""
    from lowbit.engines.llama_cpp import LlamaCpp, Sampling

    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    sampling.request()
    with LlamaCpp(arguments.model, context=arguments.context, threads=arguments.threads) as model:
        if not model.has_chat_template:
            print("lowbit: this model has no chat template: it may not answer as in a conversation", file=sys.stderr)
        if sys.stdin.isatty():
            print(f"{_COMMANDS}; {model.context} tokens of context", file=sys.stderr)
        Conversation(model, sampling, arguments.max_tokens, arguments.system).run()
    return 0


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, model: LlamaCpp, sampling: Sampling, max_tokens: int, system: str | None) -> None:
        self.model = model
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Ask and answer until the user leaves."""
        while (line := _read_line()) is not None:
            if line == "/exit":
                return
            if line == "/clear":
                self.messages.clear()
            elif line:
                self.say(line)

    def say(self, text: str) -> None:
        """Answer one message. An interrupt ends the answer, not the conversation."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            result = self._answer(take)
            print(flush=True)
            print(f"[{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s]", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" [stopped]", flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _answer(self, take: Callable[[str], None]) -> Generation:
        """The next message; what no longer fits into the context is forgotten, oldest first."""
        from lowbit.engines.llama_cpp import ContextError

        while True:
            try:
                return self.model.chat(
                    [*self.opening, *self.messages], max_tokens=self.max_tokens, sampling=self.sampling, show=take
                )
            except ContextError:
                if len(self.messages) == 1:
                    raise
                del self.messages[:2]
                print("lowbit: the context is full: the oldest message is forgotten", file=sys.stderr)


def _read_line() -> str | None:
    """The next message without the spaces around it, or None at the end of input."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
