"""Quantize a model in every format and method, and write what engines must answer; run in the project's environment.

    python tests/engines/make_checkpoints.py OUT [--model demo|DIR|tiny] [--only NAME ...]

Each case becomes `OUT/<name>/` with `OUT/<name>.expected.json` beside it (see `expectations.py`). The answers are
those of plain transformers in float32 over the checkpoint converted to `dense`, so they owe nothing to lowbit's
streaming evaluation, which is compared with them here. Where inputs are quantized too, no dense model stands for the
checkpoint: the answers are then those of lowbit's own simulation, and the dense weights are kept as `OUT/<name>.dense`
for `package_rules.py`, as are those of bitsandbytes checkpoints.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from expectations import Expected, Prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lowbit
from lowbit.checkpoint.checkpoint import open_checkpoint
from lowbit.codecs import StoredGrid
from lowbit.pipeline.streamed import StreamedModel

OWN_TOLERANCE = 2e-3
"""Largest difference in nats between lowbit's streamed log-probabilities and transformers', both in float32."""

PROMPTS, GREEDY_TOKENS, PROMPT_TOKENS, CANDIDATES = 4, 12, 24, 24


@dataclass(frozen=True)
class Case:
    """One checkpoint to make."""

    format: str
    method: str
    scheme: str = "W4A16"

    @property
    def name(self) -> str:
        return f"{self.format}-{self.method}-{self.scheme}".lower()


CASES = (
    *(Case(f, m) for f in ("compressed-tensors", "gptq", "awq") for m in ("rtn", "gptq", "awq")),
    Case("compressed-tensors", "gptq", "W4A16_ASYM"),
    Case("awq", "awq", "W4A16_ASYM"),
    Case("compressed-tensors", "gptq", "W8A16"),
    Case("compressed-tensors", "gptq", "W3A16"),
    Case("gptq", "gptq", "W8A16"),
    *(Case("compressed-tensors", "gptq", scheme) for scheme in ("W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC")),
    *(Case("compressed-tensors", "rtn", scheme) for scheme in ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16")),
    *(Case("bitsandbytes", "rtn", scheme) for scheme in ("NF4", "NF4_DQ", "FP4", "FP4_DQ", "LLM_INT8")),
    *(Case("hqq", "hqq", f"int{bits}-g64-affine") for bits in (8, 4, 3, 2)),
)


def main() -> None:
    """Make the cases named by --only, or all, and a dense one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    parser.add_argument("--model", default="demo", help="`demo`, a checkpoint directory, or `tiny` (random, instant)")
    parser.add_argument("--only", nargs="*", help="names of cases; default all")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.model == "tiny":
        _write_tiny(out / "tiny-source")
    source = str(out / "tiny-source") if options.model == "tiny" else options.model
    with open_checkpoint(source) as checkpoint:
        shutil.copytree(checkpoint.path, out / "dense", dirs_exist_ok=True)
    calibration = out / "calibration.txt"
    calibration.write_text(_library_text())
    _expect(out / "dense", Case("dense", "none", "bf16"))
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        target = out / case.name
        lowbit.quantize(
            source, target, scheme=case.scheme, method=case.method, format=case.format, calibration=calibration,
            samples=options.samples, seq_len=options.seq_len, overwrite=True,
        )  # fmt: skip
        _expect(target, case)


def _expect(target: Path, case: Case) -> None:
    """Write `<target>.expected.json` from the dense weights of `target`, and hold lowbit's own evaluation to it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        dense = target
        if case.format != "dense":
            dense = Path(scratch) / "dense"
            lowbit.convert(target, dense, "dense", dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(target)
        with _simulated(target) as simulated:
            if simulated is not None or case.format == "bitsandbytes":
                shutil.copytree(dense, target.parent / f"{target.name}.dense", dirs_exist_ok=True)
            model = simulated or AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
            prompts = sorted(_candidates(model, tokenizer), key=lambda p: -min(p.margins))[:PROMPTS]
    own = max(_own_difference(target, prompt) for prompt in prompts)
    expected = Expected(format=case.format, scheme=case.scheme, method=case.method, prompts=tuple(prompts))
    expected.write(target.parent / f"{target.name}.expected.json")
    margin = min(min(p.margins) for p in prompts)
    print(json.dumps({"case": target.name, "own_difference_nats": own, "smallest_margin_nats": margin}), flush=True)
    if own > OWN_TOLERANCE:
        raise SystemExit(f"{target.name}: lowbit's own evaluation differs from transformers by {own:.2g} nats")


@contextmanager
def _simulated(target: Path) -> Iterator[torch.nn.Module | None]:
    """The transformers model whose linears round their inputs, as lowbit does it; None where no inputs are rounded."""
    with open_checkpoint(target) as checkpoint:
        streamed = StreamedModel(checkpoint)
        if not any(isinstance(entry, StoredGrid) and entry.inputs for entry in streamed.plan.values()):
            yield None
            return
        with streamed.with_blocks([streamed.load_block(i) for i in range(len(streamed.block_names))]) as model:
            yield model


@torch.no_grad()
def _candidates(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> Iterator[Prompt]:
    """Prompts from the library's text with their greedy continuation and its smallest top-1 to top-2 gap.

    Only decisive prompts can ask an engine that computes in 16 bits for the very same tokens.
    """
    ids = tokenizer(_library_text(), verbose=False)["input_ids"]
    step = max(1, (len(ids) - PROMPT_TOKENS) // CANDIDATES)
    for start in range(0, step * CANDIDATES, step):
        prompt = ids[start : start + PROMPT_TOKENS]
        tokens = torch.tensor([prompt])
        margins = []
        for _ in range(GREEDY_TOKENS):
            best = model(tokens).logits[0, -1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens = torch.cat([tokens, best.indices[:1].view(1, 1)], dim=1)
        logprobs = torch.log_softmax(model(tokens).logits[0].double(), dim=-1)
        chosen = logprobs[:-1].gather(1, tokens[0, 1:, None]).flatten().tolist()
        yield Prompt(
            prompt_ids=tuple(prompt),
            greedy_ids=tuple(tokens[0, len(prompt) :].tolist()),
            prompt_logprobs=tuple(chosen[: len(prompt) - 1]),
            greedy_logprobs=tuple(chosen[len(prompt) - 1 :]),
            margins=tuple(margins),
        )


@torch.no_grad()
def _own_difference(target: Path, prompt: Prompt) -> float:
    tokens = torch.tensor([[*prompt.prompt_ids, *prompt.greedy_ids]])
    with open_checkpoint(target) as checkpoint:
        model = StreamedModel(checkpoint)
        hidden = model.embed(tokens)
        for index in range(len(model.block_names)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        logprobs = torch.log_softmax(model.logits(hidden)[0].double(), dim=-1)
    chosen = logprobs[:-1].gather(1, tokens[0, 1:, None]).flatten()
    wanted = torch.tensor([*prompt.prompt_logprobs, *prompt.greedy_logprobs], dtype=torch.float64)
    return float((chosen - wanted).abs().max())


def _library_text() -> str:
    """Source text that every machine has, and prose enough for a tokenizer of either kind."""
    import argparse as first
    import inspect as second
    import textwrap as third

    return "\n".join(Path(str(module.__file__)).read_text() for module in (first, second, third))


def _write_tiny(path: Path) -> None:
    """A random Llama whose logits have some spread, with a byte-level tokenizer: enough to exercise every engine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=2048, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, {"embed_tokens": 0.7, "lm_head": 0.2}.get(name.split(".")[-2], 0.09))
    model.to(torch.bfloat16).save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)


if __name__ == "__main__":
    main()
