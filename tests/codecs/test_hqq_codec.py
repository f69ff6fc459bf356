"""HQQ tensors against a code-by-code reading of the layout; `make test-hqq` has the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.codecs import HqqCodec, open_model
from lowbit.codecs.codec import StoredGrid
from lowbit.codecs.reading import module_plan, read_dense
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import CodebookSpec, IntSpec, QuantizedTensor, parse_scheme

CODEC = HqqCodec()


def affine(bits: int, group_size: int) -> IntSpec:
    return IntSpec(bits, group_size, False, zero_dtype=torch.float16)


def make(spec: IntSpec, rows: int, columns: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(spec.bits)
    shape = (rows, spec.groups(columns))
    codes = torch.randint(0, spec.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).half()
    zeros = ((torch.rand(shape, generator=generator) * 1.5 - 0.2) * spec.levels).half()
    return QuantizedTensor(spec, codes, scales, zeros)


def naive(t: dict[str, torch.Tensor]) -> torch.Tensor:
    """Group ``g`` of code ``j``: word row ``g % rows``, place ``g // rows`` counted from the high bits."""
    bits, size = int(t["nbits"]), int(t["group_size"])
    rows, columns = t["shape"].tolist()
    together = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4}[bits]
    words, groups = t["W_q"].shape[0], rows * columns // size
    out = torch.empty(groups, size)
    for g in range(groups):
        shift = 0 if together == 1 else bits * (together - 1 - g // words)
        for j in range(size):
            code = (int(t["W_q"][g % words, j]) >> shift) & ((1 << bits) - 1)
            out[g, j] = (code - float(t["zero"][g])) * float(t["scale"][g])
    return out.view(rows, columns)


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_layout(bits: int, group_size: int) -> None:
    q = make(affine(bits, group_size), 12, 48)
    tensors = CODEC.encode(q)
    assert tensors["W_q"].dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert tensors.keys() == CODEC.local_names(q.spec)
    assert torch.allclose(naive(tensors), q.dequantize(), atol=1e-6)
    entry = CODEC.read_plan(
        CODEC.config({"m": q.spec}, ["lm_head"]), {f"m.{local}": tensor for local, tensor in tensors.items()}
    )["m"]
    found = CODEC.described(entry, tensors)
    assert found.shape == (12, 48)
    back = found.decode(tensors)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_text_of_the_scalars_is_what_a_reader_evaluates() -> None:
    tensors = CODEC.encode(make(affine(3, 16), 12, 48))
    texts = {name: bytes(tensors[name].tolist()).decode() for name in ("packing", "unpack_view_dtype", "compute_dtype")}
    assert texts == {"packing": "3bit_32", "unpack_view_dtype": "torch.int32", "compute_dtype": "torch.float16"}


@pytest.mark.parametrize("scheme", ["int4-g64-affine", "int3-g32-affine"])
def test_a_checkpoint_is_read_back(tiny_llama: Path, tmp_path: Path, scheme: str) -> None:
    lowbit.quantize(tiny_llama, tmp_path / "q", scheme=scheme, method="hqq", format="hqq", certify_tokens=0)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["skip_modules"]
    with open_model(tmp_path / "q") as checkpoint, open_model(tiny_llama) as source:
        plan = module_plan(checkpoint)
        assert plan
        for module, entry in plan.items():
            original = source.read(f"{module}.weight").float()
            assert entry.shape == tuple(original.shape)
            assert entry.spec == parse_scheme(scheme).weights
            error = (read_dense(checkpoint, plan, f"{module}.weight") - original).norm() / original.norm()
            assert float(error) < 0.3
    assert lowbit.verify(tmp_path / "q").ok


def test_what_is_refused() -> None:
    assert "int4-g64-affine" in CODEC.supports(IntSpec(4, 64), (8, 128))[0]
    assert "int4-g64-affine" in CODEC.supports(CodebookSpec(), (8, 128))[0]
    assert "7" in CODEC.supports(affine(7, 64), (8, 128))[0]
    assert "does not divide" in CODEC.supports(affine(4, 64), (8, 96))[0]
    assert "together" in CODEC.supports(affine(2, 64), (3, 64))[0]
    with pytest.raises(UnsupportedError, match="contains the name"):
        CODEC.config({"layers.1.up_proj": affine(4, 64)}, ["up_proj"])
    with pytest.raises(UnsupportedError, match="1 bits"):
        CODEC.read_plan({"quant_config": {"weight_quant_params": {"nbits": 1}}}, {})
    with pytest.raises(CheckpointError, match="weight_quant_params"):
        CODEC.read_plan({}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": torch.tensor(0)}, "axis 0"),
        ({"view_as_float": torch.tensor(1)}, "floats"),
        ({"shape": torch.tensor([12, 47])}, "do not go together"),
        ({"shape": torch.tensor([24, 48])}, "does not fit"),
        ({"nbits": torch.tensor(-3)}, "do not go together"),
        ({"group_size": torch.tensor(0)}, "do not go together"),
        ({"shape": torch.tensor(3)}, "misshapen"),
        ({"nbits": torch.tensor(4.0)}, "misshapen"),
    ],
)
def test_damage_is_named(change: dict[str, Any], message: str) -> None:
    q = make(affine(4, 16), 12, 48)
    tensors = CODEC.encode(q)
    entry = StoredGrid(CODEC, q.spec, (36, 16))
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        CODEC.described(entry, tensors | change)


@pytest.mark.parametrize("name", ["W_q", "scale", "zero"])
def test_missing_tensors_are_named(name: str) -> None:
    q = make(affine(4, 16), 12, 48)
    tensors = CODEC.encode(q)
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        CODEC.decode(tensors, q.spec, q.shape)
