"""bitsandbytes tensors against a byte-by-byte reading of the layout; `make test-bitsandbytes` runs the library."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.codecs import BitsAndBytesCodec, open_model
from lowbit.codecs.names import owner
from lowbit.codecs.reading import module_plan, read_dense
from lowbit.errors import CheckpointError, LowbitError, UnsupportedError
from lowbit.evaluation.footprint import measure
from lowbit.formats import ActivationSpec, CodebookSpec, FloatSpec, IntSpec, parse_scheme
from lowbit.formats.codebook import CODEBOOKS, quantize
from lowbit.formats.spec import PER_CHANNEL
from lowbit.quant import METHODS
from lowbit.quant.rtn import RtnOptions

CODEC = BitsAndBytesCodec()
INT8 = IntSpec(8, PER_CHANNEL, scale_dtype=torch.float32)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def naive(t: dict[str, torch.Tensor], table: str) -> torch.Tensor:
    """The first code of a byte is in its high nibble; blocks run on over the ends of rows."""
    state = json.loads(bytes(t[f"weight.quant_state.bitsandbytes__{table}"].tolist()))
    rows, columns = state["shape"]
    flat = []
    for i in range(rows * columns):
        byte = int(t["weight"].flatten()[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        block = i // state["blocksize"]
        if "nested_offset" in state:
            inner = t["weight.nested_quant_map"][int(t["weight.absmax"][block])]
            outer = t["weight.nested_absmax"][block // state["nested_blocksize"]]
            largest = float(inner * outer) + state["nested_offset"]
        else:
            largest = float(t["weight.absmax"][block])
        flat.append(float(t["weight.quant_map"][code]) * largest)
    return torch.tensor(flat).view(rows, columns)


@pytest.mark.parametrize("shape", [(8, 96), (5, 51)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_layout_of_4_bits(table: Any, nested: bool, shape: tuple[int, int]) -> None:
    spec = CodebookSpec(table, double_quant=nested)
    q = quantize(weights(*shape), spec)
    tensors = CODEC.encode(q)
    blocks = spec.blocks(*shape)
    assert tensors["weight"].dtype == torch.uint8
    assert tensors["weight"].shape == (-(-shape[0] * shape[1] // 2), 1)
    assert tensors["weight.absmax"].shape == (blocks,)
    assert tensors["weight.absmax"].dtype == (torch.uint8 if nested else torch.float32)
    assert tensors["weight.quant_map"].tolist() == pytest.approx(CODEBOOKS[table], rel=1e-7)
    assert tensors.keys() == CODEC.local_names(spec)
    assert torch.allclose(naive(tensors, table), q.dequantize(), atol=1e-6)
    back = CODEC.decode(tensors, spec, shape)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_layout_of_8_bits() -> None:
    """Rows under their largest magnitude, which is code 127 of bitsandbytes' own rule."""
    weight = weights(6, 40)
    solution = METHODS["rtn"].solve(weight, None, INT8, RtnOptions("absmax"))
    tensors = CODEC.encode(solution.tensor)
    assert torch.allclose(tensors["SCB"], weight.abs().amax(1), rtol=1e-6)
    exact = weight.double() * 127 / weight.double().abs().amax(1, keepdim=True)
    near = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert torch.equal(tensors["weight"].double()[~near], exact.round()[~near])
    assert int(tensors["weight"].abs().max()) == 127
    assert int(tensors["weight_format"]) == 0
    back = CODEC.decode(tensors, INT8, (6, 40))
    naive8 = tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127
    assert torch.allclose(back.dequantize().double(), naive8, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["NF4", "NF4_DQ", "FP4", "LLM_INT8"])
def test_a_checkpoint_is_read_back(tiny_llama: Path, tmp_path: Path, scheme: str) -> None:
    lowbit.quantize(
        tiny_llama, tmp_path / "q", scheme=scheme, method="rtn", format="bitsandbytes", certify_tokens=0
    )  # fmt: skip
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] == (scheme == "LLM_INT8")
    assert "lm_head" in config["llm_int8_skip_modules"]
    with open_model(tmp_path / "q") as checkpoint, open_model(tiny_llama) as source:
        plan = module_plan(checkpoint)
        wanted = parse_scheme(scheme)
        for module, entry in plan.items():
            original = source.read(f"{module}.weight").float()
            assert entry.shape == tuple(original.shape)
            assert str(entry.spec) == str(wanted.weights)
            assert entry.inputs == wanted.inputs  # type: ignore[union-attr]
            error = (read_dense(checkpoint, plan, f"{module}.weight") - original).norm() / original.norm()
            assert 0 < float(error) < (0.02 if scheme == "LLM_INT8" else 0.2)
    assert lowbit.verify(tmp_path / "q").ok


def test_block_maxima_count_and_do_not_stay_behind(tiny_llama: Path, tmp_path: Path) -> None:
    """Tensors with two-part local names (weight.absmax) belong to their module too."""
    lowbit.quantize(tiny_llama, tmp_path / "q", scheme="NF4", certify_tokens=0)
    with open_model(tmp_path / "q") as checkpoint:
        plan = module_plan(checkpoint)
        linear = measure(checkpoint.tensors, plan).linear
        stored = sum(info.end - info.start for name, info in checkpoint.tensors.items() if owner(name, plan))
    assert linear.bytes == stored
    assert 4.5 < linear.bits_per_weight < 4.9
    lowbit.quantize(tmp_path / "q", tmp_path / "again", scheme="int8-channel-sym", method="rtn", certify_tokens=0)
    with open_model(tmp_path / "again") as checkpoint:
        assert not [name for name in checkpoint.tensors if "absmax" in name or "quant_" in name]


def test_what_is_refused() -> None:
    assert CODEC.supports(CodebookSpec(), (3, 7)) == []
    assert CODEC.supports(INT8, (3, 7)) == []
    for spec in (IntSpec(4), IntSpec(8, 128), IntSpec(8, PER_CHANNEL, False), FloatSpec()):
        assert "NF4" in CODEC.supports(spec, (8, 128))[0]
    assert "4 bits" in CODEC.supports_inputs(CodebookSpec(), ActivationSpec("int8"))[0]
    assert "LLM_INT8" in CODEC.supports_inputs(INT8, ActivationSpec("e4m3"))[0]
    with pytest.raises(UnsupportedError, match="one format"):
        CODEC.config({"a": CodebookSpec("nf4"), "b": CodebookSpec("fp4")}, [])
    with pytest.raises(UnsupportedError, match="contains the name"):
        CODEC.config({"layers.1.up_proj": CodebookSpec()}, ["up_proj"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight.absmax"), "absmax is missing"),
        (lambda t: t.update({"weight.quant_map": torch.zeros(16)}), "not the table"),
        (lambda t: t.update(weight=t["weight"][:-5]), "codes, expected"),
        (lambda t: t.update({"weight.absmax": t["weight.absmax"].float()}), "expected uint8"),
    ],
)
def test_damage_is_named(change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    spec = CodebookSpec(double_quant=True)
    tensors = CODEC.encode(quantize(weights(4, 64), spec))
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        CODEC.decode(tensors, spec, (4, 64))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["quant_type", "blocksize", "shape", "nested_offset"]), _VALUES),
    st.binary(max_size=40) | st.none(),
)
def test_a_state_from_anywhere_is_refused_or_read(values: dict[str, Any], raw: bytes | None) -> None:
    """Whatever the JSON says, described() answers with an entry that fits the packed weight, or with an error."""
    spec = CodebookSpec()
    tensors = CODEC.encode(quantize(weights(4, 64), spec))
    name = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | values
    text = raw if raw is not None else json.dumps(state).encode()
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    entry = CODEC.read_plan({}, {f"m.{local}": tensor for local, tensor in tensors.items()})["m"]
    with contextlib.suppress(LowbitError):
        found = CODEC.described(entry, tensors)
        assert 240 <= found.shape[0] * found.shape[1] <= 256
        CODEC.decode(tensors, found.spec, found.shape)
