"""Properties of packing, codecs, re-gridding and name patterns over random cases."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.codecs import CODECS, fit, fitting_spec
from lowbit.codecs.names import patterns
from lowbit.errors import UnsupportedError
from lowbit.formats import IntSpec, QuantizedTensor
from lowbit.formats.bits import pack, pack_sparse, unpack, unpack_sparse

FEW = settings(max_examples=60, deadline=None)


@st.composite
def quantized(draw: st.DrawFn) -> QuantizedTensor:
    spec = IntSpec(
        draw(st.integers(2, 8)),
        draw(st.sampled_from((-1, 0, 16, 32, 48, 128))),
        draw(st.booleans()),
        draw(st.sampled_from((torch.float16, torch.bfloat16))),
    )
    rows, columns = draw(st.sampled_from((8, 24, 32, 64))), draw(st.sampled_from((32, 48, 96, 128, 256)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (1, 1) if spec.group_size == 0 else (rows, spec.groups(columns))
    zeros = None
    if not spec.symmetric and draw(st.booleans()):
        zeros = torch.full(shape, spec.midpoint, dtype=torch.uint8)
    elif not spec.symmetric:
        zeros = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(
        spec,
        torch.randint(0, spec.levels, (rows, columns), dtype=torch.uint8, generator=generator),
        (torch.rand(shape, generator=generator) + 0.01).to(spec.scale_dtype),
        zeros,
    )


@FEW
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 140), st.integers(0, 2**31), st.sampled_from((0, 1)))
def test_packing_round_trips(bits: int, rows: int, columns: int, seed: int, dim: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(unpack(pack(codes, bits, dim), bits, codes.shape[dim], dim), codes)
    assert torch.equal(unpack_sparse(pack_sparse(codes, bits, dim), bits, codes.shape[dim], dim), codes)


@FEW
@given(quantized(), st.sampled_from(("gptq", "gptq_v2", "awq", "compressed-tensors")))
def test_what_is_supported_round_trips_and_the_rest_is_refused(q: QuantizedTensor, name: str) -> None:
    codec = CODECS[name]
    if codec.supports(q.spec, q.shape):
        with pytest.raises(UnsupportedError) as raised:
            codec.encode(q)
        assert raised.value.reasons == tuple(codec.supports(q.spec, q.shape))
        return
    tensors = codec.encode(q)
    assert tensors.keys() == codec.local_names(q.spec)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    headers = {f"model.layers.0.up.{local}": tensor for local, tensor in tensors.items()}
    entry = codec.read_plan(codec.config({"model.layers.0.up": q.spec}, ["lm_head"]), headers)["model.layers.0.up"]
    assert (entry.codec.name, entry.shape) == (name, q.shape)
    back = entry.codec.decode(tensors, entry.spec, entry.shape)
    back.validate("up")
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    if name != "awq":
        assert entry.spec == q.spec


@FEW
@given(quantized(), st.sampled_from(("gptq", "gptq_v2", "awq", "compressed-tensors")))
def test_fitting_keeps_every_weight(q: QuantizedTensor, name: str) -> None:
    codec = CODECS[name]
    try:
        fitted = fit(q, codec)
    except UnsupportedError:
        centred = q.zero_points is None or bool((q.zero_points == q.spec.midpoint).all())
        assert codec.supports(q.spec, q.shape) or centred
        assert codec.supports(IntSpec(q.spec.bits, q.spec.group_size, centred, q.spec.scale_dtype), q.shape)
        return
    assert codec.supports(fitted.spec, fitted.shape) == []
    fitted.validate("fitted")
    assert torch.equal(fitted.dequantize(), q.dequantize())
    assert fitting_spec(fitted.spec, q.shape, codec, centred=fitted.spec.symmetric) == fitted.spec


NAMES = st.lists(
    st.builds(
        "model.layers.{}.{}".format,
        st.integers(0, 12),
        st.sampled_from(("q", "gate", "gate_proj", "x.y", "experts.0.w1", "experts.1.w1", "experts.11.w1", "w1+")),
    )
    | st.sampled_from(("lm_head", "model.embed", "0", "h.1")),
    unique=True,
    max_size=40,
)


@FEW
@given(NAMES, st.randoms(use_true_random=False))
def test_patterns_tell_members_from_others(names: list[str], random: object) -> None:
    members = [name for name in names if random.random() < 0.6]  # type: ignore[attr-defined]
    others = [name for name in names if name not in members]
    found = patterns(members, others)
    for name in members:
        assert sum(bool(re.match(pattern, name)) for pattern in found) == 1
    for name in others:
        assert not any(re.match(pattern, name) for pattern in found)
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern in found)
