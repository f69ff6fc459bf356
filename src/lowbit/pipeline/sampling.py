"""Text sampled from the model itself, for calibration when no other text is at hand."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.calibration import Generate
from lowbit.errors import ResourceError
from lowbit.pipeline.streamed import StreamedModel

BATCH = 32


def sample_from(streamed: StreamedModel, memory: int) -> Generate:
    """A generator of calibration text that holds the whole model in memory while it runs.

    The generator raises :class:`ResourceError` when the blocks need more than ``memory`` bytes.
    """

    def generate(samples: int, seq_len: int, seed: int) -> torch.Tensor:
        count = len(streamed.block_names)
        needed = sum(p.numel() for i in range(count) for p in streamed.empty_block(i).parameters())
        needed *= streamed.dtype.itemsize
        if needed > memory:
            raise ResourceError(
                f"{streamed.checkpoint.path}: sampling calibration text from the model itself needs "
                f"{needed / 2**30:.1f} GiB, {memory / 2**30:.1f} GiB are allowed: pass --calibration FILE"
            )
        config = streamed.config
        start = next((t for t in (config.bos_token_id, config.eos_token_id) if isinstance(t, int)), 0)
        with streamed.with_blocks([streamed.load_block(i) for i in range(count)]) as model:
            return sample_text(model, start, samples, seq_len, seed)

    return generate


@torch.no_grad()
def sample_text(model: Any, start: int, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """int64 ``[samples, seq_len]`` drawn at temperature 1, each led by token ``start``; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for first in range(0, samples, BATCH):
        count = min(BATCH, samples - first)
        ids = torch.full((count, 1), start, dtype=torch.long)
        step, cache = ids, None
        while ids.shape[1] < seq_len:
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float().cpu(), dim=-1)
            step = torch.multinomial(chances, 1, generator=generator)
            ids = torch.cat([ids, step], dim=1)
        rows.append(ids)
    return torch.cat(rows)
