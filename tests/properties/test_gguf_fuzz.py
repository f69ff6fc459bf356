"""Damaged GGUF files: whatever the bytes, a typed error or a valid header, in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.gguf.container import TensorHeader, read_blocks, read_gguf, write_gguf
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.ggml import GGML_TYPES

HUGE = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
WIDTH, FFN, VOCABULARY = 64, 64, 32


METADATA: dict[str, MetadataValue] = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.block_count": 1,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 16,
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 2.0,
    "llama.rope.scaling.original_context_length": 64,
    "llama.rope.scaling.attn_factor": 1.0,
    "tokenizer.ggml.tokens": [f"token{i}" for i in range(VOCABULARY)],
    "tokenizer.ggml.scores": [float(i) for i in range(VOCABULARY)],
    "tokenizer.ggml.token_type": [1] * VOCABULARY,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    **{f"test.{kind}": Typed(kind, 1) for kind in ("u8", "i8", "u16", "i16", "i32", "u64", "i64", "f64")},
    "test.flags": [True, False],
}


def model_file(path: Path, **changes: MetadataValue) -> bytes:
    """The bytes of a whole tiny model: metadata of every kind, a vocabulary, float and quantized tensors."""
    float32, q8 = GGML_TYPES["F32"], GGML_TYPES["Q8_0"]
    shapes = {
        "token_embd.weight": (q8, (VOCABULARY, WIDTH)),
        "output_norm.weight": (float32, (WIDTH,)),
        "blk.0.attn_norm.weight": (float32, (WIDTH,)),
        "blk.0.ffn_norm.weight": (float32, (WIDTH,)),
        "blk.0.attn_q.weight": (q8, (WIDTH, WIDTH)),
        "blk.0.attn_k.weight": (q8, (WIDTH // 2, WIDTH)),
        "blk.0.attn_v.weight": (q8, (WIDTH // 2, WIDTH)),
        "blk.0.attn_output.weight": (q8, (WIDTH, WIDTH)),
        "blk.0.ffn_gate.weight": (q8, (FFN, WIDTH)),
        "blk.0.ffn_up.weight": (q8, (FFN, WIDTH)),
        "blk.0.ffn_down.weight": (q8, (WIDTH, FFN)),
    }
    metadata = METADATA | changes
    headers = [TensorHeader(name, kind, shape) for name, (kind, shape) in shapes.items()]
    data = (np.ones(header.nbytes, np.uint8) for header in headers)
    write_gguf(path, metadata, headers, data, overwrite=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return model_file(tmp_path_factory.mktemp("gguf") / "model.gguf")


def attempt(path: Path, data: bytes) -> bool:
    """Read the file and everything it promises; whether it was accepted. Only typed errors pass."""
    path.write_bytes(data)
    try:
        file = read_gguf(path)
    except CheckpointError:
        return False
    for item in file.tensors.values():
        assert 24 <= item.start <= item.start + item.nbytes <= len(data)
        assert read_blocks(item).nbytes == item.nbytes
    with suppress(CheckpointError, UnsupportedError):
        checkpoint = GgufCheckpoint(file)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    return True


def header_length(data: bytes) -> int:
    return data.index(b"blk.0.ffn_down.weight") + 64


def flip(rng: random.Random, data: bytearray, end: int) -> None:
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(end)] = rng.randrange(256)


def splice(rng: random.Random, data: bytearray, end: int) -> None:
    """A huge number where some field may be."""
    width, layout = rng.choice([(4, "<I"), (8, "<Q")])
    where = rng.randrange(end - width)
    data[where : where + width] = struct.pack(layout, rng.choice(HUGE) % 2 ** (8 * width))


def truncate(rng: random.Random, data: bytearray, end: int) -> None:
    del data[rng.randrange(len(data)) :]


def remove(rng: random.Random, data: bytearray, end: int) -> None:
    where = rng.randrange(end)
    del data[where : where + rng.randint(1, 24)]


def repeat(rng: random.Random, data: bytearray, end: int) -> None:
    where, length = rng.randrange(end), rng.randint(1, 80)
    data[where:where] = data[where : where + length]


def text(rng: random.Random, data: bytearray, end: int) -> None:
    where = rng.randrange(end)
    data[where : where + 4] = rng.choice([b"\xff\xfe\xfd\xfc", b"\xed\xa0\x80\x80", b"\xc3\x28\xa0\xa1", bytes(4)])


MUTATIONS: list[Callable[[random.Random, bytearray, int], None]] = [flip, splice, truncate, remove, repeat, text]


def test_the_undamaged_file_is_read(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert attempt(path, model)
    checkpoint = GgufCheckpoint(read_gguf(path))
    assert len(checkpoint.tensors) == len(checkpoint.gguf.tensors)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda item: item.__name__)
def test_mutated_files(model: bytes, tmp_path: Path, mutation: Callable[..., None]) -> None:
    rng = random.Random(mutation.__name__)
    path = tmp_path / "model.gguf"
    end = header_length(model)
    accepted = 0
    for _ in range(800):
        data = bytearray(model)
        mutation(rng, data, end)
        accepted += attempt(path, bytes(data))
    assert accepted < 800


ODD: list[MetadataValue] = [
    0,
    1,
    3,
    2**31,
    2**32 - 1,
    2**62,
    -1,
    True,
    "",
    "llama",
    1.5,
    float("nan"),
    float("inf"),
    [1, 2],
    [True],
    ["a"],
    Typed("u32", []),
]
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen2moe",
    "qwen3moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gptneox",
    "bert",
)


@pytest.mark.parametrize("key", [key for key in METADATA if key.startswith(("llama", "general", "tokenizer"))])
def test_odd_values(key: str, tmp_path: Path) -> None:
    for value in ODD:
        if key == "general.alignment" and value not in (64, 128):
            continue
        attempt(tmp_path / "model.gguf", model_file(tmp_path / "model.gguf", **{key: value}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_wrong_architecture(architecture: str, tmp_path: Path) -> None:
    changes = {key.replace("llama", architecture): value for key, value in METADATA.items() if key.startswith("llama")}
    changes |= {"general.architecture": architecture, f"{architecture}.attention.sliding_window": 32}
    changes |= {f"{architecture}.expert_count": 2**31, f"{architecture}.expert_used_count": 2}
    attempt(tmp_path / "model.gguf", model_file(tmp_path / "model.gguf", **changes))


def test_memory_is_bounded(model: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "model.gguf"
    end = header_length(model)
    tracemalloc.start()
    for _ in range(300):
        data = bytearray(model)
        splice(rng, data, end)
        attempt(path, bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.binary(max_size=200), rest=st.binary(max_size=400))
def test_random_bytes(tmp_path: Path, start: bytes, rest: bytes) -> None:
    attempt(tmp_path / "a.gguf", start)
    attempt(tmp_path / "b.gguf", b"GGUF" + struct.pack("<IQQ", 3, len(start) % 4, len(rest) % 4) + rest)


PADDING = bytes(4096)


def header(*, tensors: Sequence[bytes] = (), entries: Sequence[bytes] = (), version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(entries))
    return b"GGUF" + counts + b"".join(entries) + b"".join(tensors) + PADDING


def string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    rank = len(dims) if rank is None else rank
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


def entry(layout: str, *values: int, key: bytes = b"k") -> bytes:
    return string(key) + struct.pack(layout, *values)


def one(**fields: Any) -> bytes:
    return header(tensors=[tensor(**fields)])


def alignment(layout: str, *values: int) -> bytes:
    return header(entries=[entry(layout, *values, key=b"general.alignment")])


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big endian": (header(version=3 << 24), "big-endian"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + PADDING, "do not fit"),
    "entry count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + PADDING, "do not fit"),
    "rank 5": (one(dims=(1, 1, 1, 1, 1)), "5 dimensions"),
    "rank 0": (one(dims=()), "0 dimensions"),
    "rank huge": (one(rank=2**32 - 1), "dimensions"),
    "overflow": (one(dims=(2**32, 2**32)), "overflows"),
    "overflow to little": (one(dims=(2**62, 4, 2)), "overflows"),
    "empty tensor": (one(dims=(32, 0)), "empty"),
    "type": (one(kind=999), "tensor type 999"),
    "ragged blocks": (one(dims=(33,), kind=8), "no whole blocks of 32"),
    "offset unaligned": (one(offset=4), "not aligned"),
    "offset beyond": (one(offset=2**40), "truncated"),
    "offset overflow": (one(offset=2**64 - 32), "overflows"),
    "truncated data": (one(dims=(4096,)), "truncated"),
    "overlap": (header(tensors=[tensor(b"a", (64,)), tensor(b"b", (64,), offset=32)]), "overlap"),
    "same place": (header(tensors=[tensor(b"a"), tensor(b"b")]), "overlap"),
    "tensor twice": (header(tensors=[tensor(), tensor(offset=128)]), "appears twice"),
    "long name": (one(name=b"x" * 64), "1 to 63 bytes"),
    "no name": (one(name=b""), "1 to 63 bytes"),
    "name not UTF-8": (one(name=b"\xff\xfe"), "not valid UTF-8"),
    "key not UTF-8": (header(entries=[entry("<II", 4, 1, key=b"\xff")]), "UTF-8"),
    "text not UTF-8": (header(entries=[entry("<IQB", 8, 1, 255)]), "UTF-8"),
    "texts not UTF-8": (header(entries=[entry("<IIQQB", 9, 8, 1, 1, 255)]), "UTF-8"),
    "key twice": (header(entries=2 * [entry("<II", 4, 1)]), "twice"),
    "value type": (header(entries=[entry("<II", 13, 1)]), "value type 13"),
    "bool": (header(entries=[entry("<IB", 7, 2)]), "other than 0 and 1"),
    "string length": (header(entries=[entry("<IQ", 8, 2**60)]), "bytes long"),
    "array length": (header(entries=[entry("<IIQ", 9, 4, 2**62)]), "are left"),
    "array of strings": (header(entries=[entry("<IIQ", 9, 8, 2**40)]), "do not fit"),
    "array of arrays": (header(entries=[entry("<IIQ", 9, 9, 1)]), "array of arrays"),
    "alignment 0": (alignment("<II", 4, 0), "alignment"),
    "alignment 48": (alignment("<II", 4, 48), "alignment"),
    "alignment huge": (alignment("<II", 4, 2**31), "alignment"),
    "alignment text": (alignment("<IQH", 8, 2, 0x3233), "alignment"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_each_damage_is_named(name: str, tmp_path: Path) -> None:
    data, expected = DAMAGED[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
