"""Whether a restored model still works: every tensor verified, and one prompt answered."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint.location import locate
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["smoke_test"]

PROMPT = "The capital of France is"
_TOKENS = 8


def smoke_test(directory: Path) -> str:
    """Verify the checkpoint in a directory and let it continue a prompt; returns a sentence on what was done.

    GGUF files answer through llama.cpp, other checkpoints through transformers' forward pass over the decoded weights,
    block by block. Raises :class:`CheckpointError` where verification finds damage, or the answer is not finite or
    empty.
    """
    from lowbit.evaluation.verify import verify_checkpoint

    models = sorted(directory.glob("*.gguf"))
    if not models and not (directory / "config.json").exists():
        return "no checkpoint (neither config.json nor GGUF), so no prompt was asked"
    path = locate(directory)
    result = verify_checkpoint(path)
    if not result.ok:
        first = next(finding for finding in result.findings if finding.severity == "error")
        raise CheckpointError(f"the restored model is damaged as it was kept: {first.where}: {first.message}")
    checked = f"{result.tensors} tensors verified"
    try:
        answer = _through_llama_cpp(path) if path.suffix == ".gguf" else _through_transformers(path)
    except UnsupportedError as error:
        return f"{checked}; no prompt was asked: {error}"
    return f"{checked}; {answer}"


def _through_llama_cpp(path: Path) -> str:
    from lowbit.engines.llama_cpp import LlamaCpp, Sampling

    with LlamaCpp(path, context=256) as model:
        result = model.generate(PROMPT, max_tokens=_TOKENS, sampling=Sampling(0.0))
    if not result.tokens:
        raise CheckpointError(f"{path.name}: the restored model loads but answers {PROMPT!r} with nothing")
    return f"llama.cpp continued {PROMPT!r} with {result.text!r}"


def _through_transformers(path: Path) -> str:
    """The next token after the prompt, one block in memory at a time."""
    import torch

    from lowbit.calibration import encode_text, load_tokenizer
    from lowbit.codecs import open_model
    from lowbit.pipeline.streamed import StreamedModel

    with open_model(path) as checkpoint, torch.no_grad():
        if not checkpoint.has_tokenizer:
            raise UnsupportedError("the checkpoint has no tokenizer to read a prompt with")
        tokenizer = load_tokenizer(path)
        model = StreamedModel(checkpoint)
        hidden = model.embed(encode_text(PROMPT, "prompt", tokenizer).ids[None])
        for index in range(len(model.block_names)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        logits = model.logits(hidden)[0, -1]
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"{path.name}: the restored model loads but its answer to {PROMPT!r} is not finite")
        return (
            f"transformers' forward pass over it continued {PROMPT!r} with {tokenizer.decode([int(logits.argmax())])!r}"
        )
