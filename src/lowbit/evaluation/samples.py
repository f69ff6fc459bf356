"""What models write: continuations of the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.calibration import encode_text, load_tokenizer
from lowbit.codecs import open_model
from lowbit.pipeline.streamed import StreamedModel


def continuations(source: str | Path, prompts: Sequence[str], *, tokens: int = 64) -> list[str]:
    """What the model at ``source`` writes after each prompt: at most ``tokens`` tokens, greedily.

    All blocks are in memory at once, as float32: for models that fit.
    """
    with open_model(source) as checkpoint, torch.no_grad():
        tokenizer = load_tokenizer(checkpoint.path)
        streamed = StreamedModel(checkpoint)
        blocks = [streamed.load_block(index) for index in range(len(streamed.block_names))]
        stop = streamed.config.eos_token_id
        ends = set(stop) if isinstance(stop, list) else {stop}
        with streamed.with_blocks(blocks) as model:
            starts = [encode_text(prompt, "prompt", tokenizer).ids for prompt in prompts]
            return [tokenizer.decode(_greedy(model, ids, ends, tokens)) for ids in starts]


def _greedy(model: Any, ids: torch.Tensor, ends: set[int | None], tokens: int) -> list[int]:
    """The ids that follow ``ids`` int64 ``[n]``, up to the first of ``ends``."""
    step, cache, written = ids[None], None, list[int]()
    while len(written) < tokens:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        choice = int(output.logits[0, -1].argmax())
        if choice in ends:
            break
        written.append(choice)
        step = torch.tensor([[choice]])
    return written
