"""Train the embedded demo model: ``python -m lowbit.demo.train OUT``.

A Llama-family decoder of a few million parameters, trained on the Python standard library's own source
(:mod:`lowbit.demo.corpus`) with some modules held out. On one GPU it takes minutes, on a CPU hours.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit.demo.corpus import HELD_OUT, sources

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}\n{{ eos_token }}"
    "{% else %}# {{ message['content'] | replace('\n', '\n# ') }}\n{% endif %}{% endfor %}"
)
"""A user's message becomes a comment; the answer is the code that follows it."""


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pre-tokenizer, which every engine knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All texts as one stream of token ids, each led by BOS and closed by EOS."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [*encoding.ids, 1]
    return np.asarray(ids, dtype=np.int64)


def batch(stream: torch.Tensor, size: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows ``[size, length]`` of the stream, every second one led by BOS as in use."""
    starts = torch.randint(0, len(stream) - length, (size,), generator=generator)
    windows = torch.stack([stream[s : s + length] for s in starts.tolist()])
    windows[: size // 2, 0] = 0
    return windows


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: torch.Tensor, length: int, device: str, autocast: bool) -> float:
    """Perplexity over disjoint windows of the stream, the first token of each replaced by BOS."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(stream) - length, length):
        ids = stream[start : start + length].clone()[None].to(device)
        ids[0, 0] = 0
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += length - 1
    model.train()
    return math.exp(total / count)


def build_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stdlib", type=Path, help="standard library to read (default: the running Python's)")
    parser.add_argument("--init", type=Path, help="go on from this checkpoint instead of random weights")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop the decay in time for this budget")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument(
        "--compile", action="store_true", help="compile the training step (needs a C++ compiler on CPU)"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights of the shape asked for, or those of ``--init``."""
    if args.init is not None:
        return LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    args: argparse.Namespace,
    device: str,
    on_point: Callable[[int, float, float], None],
) -> int:
    """Train with a rate that falls to nothing over ``--steps`` or ``--minutes``; returns the tokens seen.

    ``on_point`` is called ``--evaluations`` times and at the end, with tokens seen, mean training loss and seconds.
    """
    generator = torch.Generator().manual_seed(args.seed)
    forward = torch.compile(model) if args.compile else model
    optimizers = build_optimizers(model, args.lr)
    started, loss_sum, loss_count, step = time.time(), 0.0, 0, 0
    warmup, every = 50, max(1, args.steps // args.evaluations)
    tokens_per_step: int = args.batch * args.length
    progress = 0.0
    while progress < 1.0:
        progress = max(step / args.steps, (time.time() - started) / (60 * args.minutes))
        rate = args.lr * min((step + 1) / warmup, 1.0, 0.01 + 1.3 * (1 - progress))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        ids = batch(stream, args.batch, args.length, generator).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = forward(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
        if step % every == 0 or progress >= 1.0:
            on_point(step * tokens_per_step, loss_sum / max(1, loss_count), time.time() - started)
            loss_sum, loss_count = 0.0, 0
    return step * tokens_per_step


def main() -> None:
    """Train, evaluate and save the model with its tokenizer and training record."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_texts = [text for _, text in sources(args.stdlib, held_out=False)]
    if args.init is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
    else:
        tokenizer = train_tokenizer(train_texts, args.vocab)
    stream = torch.from_numpy(encode(tokenizer, train_texts))
    held_out = torch.from_numpy(encode(tokenizer, [text for _, text in sources(args.stdlib, held_out=True)]))
    print(f"{len(stream):,} training tokens, {len(held_out):,} held out, {device}", flush=True)
    model, curve, before = build_model(args).to(device), [], 0
    if args.init is not None:
        record = json.loads((args.init / "training.json").read_text())
        curve, before = record["curve"], record["tokens_seen"]

    def on_point(tokens: int, loss: float, seconds: float) -> None:
        held_out_perplexity = perplexity(model, held_out, args.length, device, device == "cuda")
        curve.append(
            {
                "tokens": before + tokens,
                "train_loss": loss,
                "held_out_perplexity": held_out_perplexity,
                "seconds": seconds,
            }
        )
        print(json.dumps(curve[-1]), flush=True)
        save(args.out, model, tokenizer, {"tokens_seen": before + tokens, "curve": curve})

    started = time.time()
    tokens_seen = before + train(model, stream, args, device, on_point)
    model = model.to(torch.bfloat16).to(torch.float32)
    final = perplexity(model, held_out, args.length, device, False)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(stream),
        "tokens_seen": tokens_seen,
        "held_out_modules": list(HELD_OUT),
        "held_out_tokens": len(held_out),
        "held_out_perplexity_bf16_weights": final,
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
        "device": device,
        "curve": curve,
    }
    save(args.out, model, tokenizer, record)
    prompt = torch.tensor(
        [[0, *tokenizer("def read_lines(path", add_special_tokens=False)["input_ids"]]], device=device
    )
    print(tokenizer.decode(model.generate(prompt, max_new_tokens=120, do_sample=False)[0]))
    print(f"held-out perplexity {final:.3f}, {time.time() - started:.0f} s")


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Write the checkpoint in bf16, the tokenizer and the training record into ``out``."""
    state = {name: tensor.detach().to(torch.bfloat16).cpu() for name, tensor in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.md").write_text(model_card(model.config, record))


def model_card(config: LlamaConfig, record: dict[str, Any]) -> str:
    """The model's card in Markdown: what it is, what it was trained on, how the loss went."""
    rows = [
        f"| {p['tokens'] / 1e6:.1f} M | {p['train_loss']:.3f} | {p['held_out_perplexity']:.2f} |"
        for p in record["curve"]
    ]
    return "\n".join(
        [
            "# lowbit's demo model",
            "",
            f"A Llama-family decoder: {config.num_hidden_layers} blocks, hidden {config.hidden_size}, "
            f"ffn {config.intermediate_size}, {config.num_attention_heads} heads and {config.num_key_value_heads} "
            f"KV heads of {config.head_dim}, byte-level BPE of {config.vocab_size}, "
            f"context {config.max_position_embeddings}, tied embeddings, bf16. It exists to be quantized: small, real, "
            "and trained on text that every machine has.",
            "",
            "**Data.** The source of the Python standard library (PSF licence), tests included, character tables left "
            f"out. Held out, with their tests: {', '.join(HELD_OUT)}.",
            "",
            f"**Training.** {record['tokens_seen'] / 1e6:.1f} M tokens seen, Muon for the blocks' matrices and AdamW "
            "for the rest, `python -m lowbit.demo.train`. Windows of 512 tokens.",
            "",
            "| tokens seen | training loss | held-out perplexity |",
            "|---|---|---|",
            *rows,
            "",
            "It continues Python code plausibly for a few lines, and knows nothing else.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
