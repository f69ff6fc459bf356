"""What every system of `benchmarks/quantize.py` works on; run in the project's environment.

python benchmarks/peers/workload.py checkpoint DIR --shape 1.1b --layers 2 --dtype float32
python benchmarks/peers/workload.py tokens DIR --text FILE --samples 32 --seq-len 512 --out IDS.npy
python benchmarks/peers/workload.py machine --threads 2
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "start-up": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 32000,
    },
    "0.1b": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
    },
}
"""Llama shapes; the last one only to see that a system works, `start-up` for what is the same for all sizes."""

STD = 0.02


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint")
    checkpoint.add_argument("directory", type=Path)
    checkpoint.add_argument("--shape", choices=sorted(SHAPES), required=True)
    checkpoint.add_argument("--layers", type=int, help="default the whole model")
    checkpoint.add_argument("--dtype", default="float32")
    checkpoint.add_argument("--tokenizer", choices=["words", "pieces"], default="words", help="pieces: SentencePiece's")
    tokens = commands.add_parser("tokens")
    tokens.add_argument("directory", type=Path)
    tokens.add_argument("--text", type=Path, required=True)
    tokens.add_argument("--samples", type=int, required=True)
    tokens.add_argument("--seq-len", type=int, required=True)
    tokens.add_argument("--out", type=Path, required=True)
    shaken = commands.add_parser("shaken")
    shaken.add_argument("directory", type=Path)
    shaken.add_argument("--seed", type=int, required=True)
    machine = commands.add_parser("machine")
    machine.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    if options.command == "checkpoint":
        layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
        write_checkpoint(options.directory, options.shape, layers, options.dtype, pieces=options.tokenizer == "pieces")
    elif options.command == "tokens":
        print(write_tokens(options.directory, options.text, options.samples, options.seq_len, options.out))
    elif options.command == "shaken":
        write_shaken(options.directory, options.seed)
    else:
        print(json.dumps(measure_machine(options.threads)))


def write_checkpoint(directory: Path, shape: str, layers: int, dtype: str, *, pieces: bool = False) -> None:
    """A Llama of `shape` with Gaussian weights of a trained model's size, a shard per block, and a tokenizer.

    Its time and memory are those of a trained model of the same shape; its quality says nothing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{**SHAPES[shape], "num_hidden_layers": layers},
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {}
        for name, size in shapes.items():
            tensor = torch.ones(size) if len(size) == 1 else torch.empty(size).normal_(0, STD, generator=generator)
            tensors[name] = tensor.to(getattr(torch, dtype))
            total += tensors[name].nbytes
            weight_map[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})

    hidden, ffn = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    width = config.num_attention_heads * config.head_dim
    count = layers + 2
    embedding = (config.vocab_size, hidden)
    write(f"model-00001-of-{count:05}.safetensors", {"model.embed_tokens.weight": embedding})
    for layer in range(layers):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (width, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, width),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        names = {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
        write(f"model-{layer + 2:05}-of-{count:05}.safetensors", names)
    write(f"model-{count:05}-of-{count:05}.safetensors", {"model.norm.weight": (hidden,), "lm_head.weight": embedding})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if pieces:
        _write_pieces(directory, config.vocab_size)
    else:
        _write_tokenizer(directory, config.vocab_size)
    config.save_pretrained(directory)


def write_shaken(directory: Path, seed: int) -> None:
    """The embedded model in float32, every matrix with noise of 3 % of each row's standard deviation.

    It is as good a model, whose weights lie otherwise between the points of every grid: another draw for quantizers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    import lowbit.demo

    source = Path(lowbit.demo.__file__).parent / "model"
    shutil.copytree(source, directory)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor += 0.03 * tensor.std(dim=-1, keepdim=True) * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A word for each id: text in it covers the whole vocabulary, as a trained tokenizer's text does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


def _write_pieces(directory: Path, vocabulary: int) -> None:
    """SentencePiece's BPE form, which llama.cpp reads too: bytes, letters, and words grown by a letter at a time."""
    words = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    known = set(words)
    generator = random.Random(0)
    while len(words) < vocabulary - 260:
        word = generator.choice(words) + generator.choice(words[:26])
        if len(word) < 12 and word not in known:
            known.add(word)
            words.append(word)

    def field(number: int, payload: bytes) -> bytes:
        length, size = b"", len(payload)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + payload

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, field(1, text.encode()) + struct.pack("<Bf", 2 << 3 | 5, score) + bytes([3 << 3, kind]))

    data = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3)
    data += b"".join(piece(f"<0x{byte:02X}>", 0, 6) for byte in range(256))
    data += b"".join(piece(word, -float(rank), 1) for rank, word in enumerate(["▁", *words]))
    bpe, no_normalizer, byte_fallback = bytes([3 << 3, 2]), bytes([3 << 3, 1]), bytes([35 << 3 & 127 | 128, 2, 1])
    (directory / "tokenizer.model").write_bytes(data + field(2, bpe + byte_fallback) + field(3, no_normalizer))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tokens(directory: Path, text: Path, samples: int, seq_len: int, out: Path) -> str:
    """Write the calibration text and lowbit's own packing of it as int64 [samples, seq_len]; return their hash."""
    import numpy as np

    from lowbit.calibration import load_calibration, load_tokenizer

    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    generator = random.Random(0)
    lines = (
        " ".join(f"w{max(3, int(vocabulary ** generator.random()))}" for _ in range(seq_len))
        for _ in range(2 * samples)
    )
    text.write_text("\n\n".join(lines) + "\n")
    loaded = load_calibration(text, load_tokenizer(directory), samples=samples, seq_len=seq_len)
    np.save(out, loaded.ids.numpy())
    return loaded.sha256


def measure_machine(threads: int) -> dict[str, Any]:
    """The ceilings: float32 matrix products in FLOP/s, and memory traffic of a copy (read + written) in bytes/s."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(4096, 2048), torch.randn(2048, 2048)
    product = _best(lambda: torch.mm(left, right), repeats=8)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), repeats=8)
    return {
        "gemm_flops": 2 * 4096 * 2048 * 2048 / product,
        "copy_bytes_per_second": 2 * source.nbytes / copy,
        "threads": threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _best(call: Any, *, repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
