"""``lowbit generate``: continue a text with a GGUF model."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from lowbit.cli.options import add_generation_arguments
from lowbit.cli.output import write_json
from lowbit.errors import UsageError

HELP = "continue a text with a GGUF model, through llama.cpp"
EXAMPLES = """\
  lowbit generate model-Q4_K_M.gguf "The capital of France is"
  lowbit generate model.gguf "def fib(n):" --max-tokens 80 --temperature 0
  lowbit generate model.gguf - --seed 1 --json    # the prompt from stdin"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a .gguf file (of a split model, any part)")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue, or - to read it from stdin")
    add_generation_arguments(parser, max_tokens=128)
    parser.add_argument("--json", action="store_true", help="print text, token counts and speed as JSON when done")


def run(arguments: argparse.Namespace) -> int:
    """Write the prompt's continuation to stdout as it comes, and the speed to stderr."""
    from lowbit.engines.llama_cpp import LlamaCpp, Sampling

    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    sampling.request()
    prompt = _prompt(arguments.prompt)
    with LlamaCpp(arguments.model, context=arguments.context, threads=arguments.threads) as model:
        result = model.generate(
            prompt, max_tokens=arguments.max_tokens, sampling=sampling, show=None if arguments.json else show
        )
    if arguments.json:
        speed = {"tokens_per_second": result.tokens_per_second}
        write_json({"model": str(arguments.model), "prompt": prompt, **dataclasses.asdict(result), **speed})
    else:
        print(flush=True)
        print(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s", file=sys.stderr)
    return 0


def show(text: str) -> None:
    """Write a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt(text: str) -> str:
    if text == "-":
        text = sys.stdin.read()
    if not text.strip():
        raise UsageError("the prompt is empty: give a text to continue")
    return text
