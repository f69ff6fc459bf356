"""int8, FP8, NVFP4, MXFP4 and MXFP8 as compressed-tensors stores them, against the installed package."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus

from lowbit.codecs import CompressedTensorsCodec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import PRESETS, ActivationSpec, FloatSpec, IntSpec, Scheme, fake_quantize
from lowbit.formats.activations import static_scale
from lowbit.formats.rounding import round_weight

CODEC = CompressedTensorsCodec()
SCHEMES = {
    name: scheme
    for name, scheme in PRESETS.items()
    if isinstance(scheme.weights, IntSpec | FloatSpec) and not (scheme.inputs and scheme.inputs.outliers)
}


def config_of(scheme: Scheme) -> dict[str, Any]:
    inputs = {} if scheme.inputs is None else {"model.layers.0.up": scheme.inputs}
    return json.loads(json.dumps(CODEC.config({"model.layers.0.up": scheme.weights}, [], inputs=inputs)))  # type: ignore[no-any-return]


def scheme_of(scheme: Scheme) -> QuantizationScheme:
    (group,) = config_of(scheme)["config_groups"].values()
    return QuantizationScheme.model_validate(group)


def a_weight(spec: Any, rows: int = 256, columns: int = 256) -> Any:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[1] = 0.0
    return round_weight(weight, spec)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "W8A8_STATIC"])  # which the package lacks
def test_presets_say_what_the_package_s_own_say(name: str) -> None:
    theirs, ours = preset_name_to_scheme(name, ["Linear"]), scheme_of(SCHEMES[name])
    QuantizationConfig.model_validate(config_of(SCHEMES[name]))
    for part in ("weights", "input_activations"):
        expected, found = getattr(theirs, part), getattr(ours, part)
        assert (expected is None) == (found is None)
        if expected is not None:
            for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure"):
                assert getattr(found, key) == getattr(expected, key), (part, key)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_package_decompresses_to_the_same_weights(name: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    spec = scheme.weights.with_scale_dtype(dtype)
    q = a_weight(spec)
    tensors = CODEC.encode(q, inputs=scheme.inputs)
    theirs = scheme_of(scheme)
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    expected = set(compressor.compression_param_names(theirs)) - {"input_global_scale"}
    assert expected == tensors.keys()
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    decompressed = compressor.decompress(state, theirs)["weight"]
    assert torch.allclose(decompressed.float(), q.dequantize(), rtol=1e-2, atol=1e-7)  # their products are in 16 bits
    if dtype == torch.float32 and not spec_is_packed_float(spec):
        assert torch.equal(decompressed.float(), q.dequantize())
    headers = {f"model.layers.0.up.{local}": tensor for local, tensor in tensors.items()}
    entry = CODEC.read_plan(config_of(scheme), headers)["model.layers.0.up"]
    assert (entry.spec, entry.shape, entry.inputs) == (spec, q.shape, scheme.inputs)
    assert entry.local_names() == tensors.keys()
    back = entry.decode(tensors)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    again = entry.codec.encode(back, inputs=scheme.inputs)
    assert all(torch.equal(again[local].view(torch.uint8), tensors[local].view(torch.uint8)) for local in tensors)


def spec_is_packed_float(spec: Any) -> bool:
    """NVFP4, MXFP4 and MXFP8 are decompressed in bfloat16."""
    return isinstance(spec, FloatSpec) and spec.scale != "float"


@pytest.mark.parametrize("name", [n for n in SCHEMES if isinstance(SCHEMES[n].weights, FloatSpec)])
def test_what_the_package_compresses_is_read(name: str) -> None:
    """Weights on the grid, compressed by the package under the same scales, have the codes that lowbit gives them."""
    scheme = SCHEMES[name]
    q = a_weight(scheme.weights)
    theirs = scheme_of(scheme)
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    scales = q.scales.float() if scheme.weights.scale != "e8m0" else torch.exp2(q.scales.float() - 127)
    state = {"weight": q.dequantize(), "weight_scale": scales.flatten() if scales.numel() == 1 else scales}
    if q.global_scale is not None:
        state["weight_global_scale"] = q.global_scale
    compressed = compressor.compress(state, theirs)
    ours = CODEC.encode(q, inputs=scheme.inputs)
    for local in ("weight", "weight_packed"):
        if local in ours:
            zero = ours[local].view(torch.uint8)
            same = compressed[local].view(torch.uint8) == zero
            # Minus zero is a code of its own, which only one of the two writes for a negative weight that vanishes.
            differing = CODEC.decode(compressed | {"weight_scale": ours["weight_scale"]}, scheme.weights, q.shape)
            assert torch.equal(differing.dequantize(), q.dequantize()) or bool(same.all())
    headers = {f"m.{local}": tensor for local, tensor in compressed.items()}
    entry = CODEC.read_plan({**config_of(scheme)}, headers)["m"]
    assert str(entry.spec) == str(scheme.weights)


INPUTS = {str(s.inputs): s.inputs for s in SCHEMES.values() if s.inputs is not None}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_simulated_as_the_package_does(name: str) -> None:
    """But for int8 by token, whose scale is a 127.5th of the largest value there and a 127th in engines."""
    inputs: ActivationSpec = INPUTS[name]
    scheme = next(s for s in SCHEMES.values() if s.inputs == inputs)
    args = scheme_of(scheme).input_activations
    x = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(5)) * 2
    x[0, 3, 17] = 40.0
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.FROZEN  # type: ignore[assignment]
    scale = None
    if inputs.needs_calibration:
        scale = static_scale(float(x.abs().max()), inputs)
        module.register_buffer("input_global_scale" if inputs.scale == "e4m3" else "input_scale", scale)
        if inputs.scale == "e4m3":
            # Written without it, for old readers refuse the key; without it the package rounds no group scale.
            args = args.model_copy(update={"scale_dtype": torch.float8_e4m3fn})
    theirs = forward_quantize(module, x, "input", args)
    ours = fake_quantize(x, inputs, scale)
    if name == "int8-token":
        assert float((ours - theirs).abs().max()) <= float(x.abs().max()) / 127
        largest = x.abs().amax(-1, keepdim=True) / 127.5
        assert torch.allclose(theirs, (x / largest).round().clamp(-128, 127) * largest, atol=1e-6)
    else:
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_static_scales_are_stored() -> None:
    for name, local in (("W8A8_STATIC", "input_scale"), ("FP8", "input_scale"), ("NVFP4", "input_global_scale")):
        scheme = SCHEMES[name]
        tensors = CODEC.encode(a_weight(scheme.weights), torch.tensor([0.25]), inputs=scheme.inputs)
        assert tensors[local].dtype == torch.float32
        assert tensors[local].tolist() == [0.25]
        assert len([t for t in tensors if t.startswith("input")]) == 1


def test_schemes_may_be_mixed() -> None:
    plan = {"model.layers.0.up": FloatSpec(), "model.layers.0.down": IntSpec(4, 128), "model.layers.1.up": FloatSpec()}
    inputs = {"model.layers.0.up": ActivationSpec("e4m3")}
    config = CODEC.config(plan, [], inputs=inputs)
    assert config["format"] == "mixed-precision"
    assert [g["format"] for g in config["config_groups"].values()] == [
        "float-quantized",
        "pack-quantized",
        "float-quantized",
    ]
    QuantizationConfig.model_validate(config)
    headers = {
        f"{name}.{local}": tensor
        for name, spec in plan.items()
        for local, tensor in CODEC.encode(a_weight(spec), inputs=inputs.get(name)).items()
    }
    found = CODEC.read_plan(config, headers)
    assert {name: entry.inputs for name, entry in found.items() if entry.inputs} == inputs
    assert {name: str(entry.spec) for name, entry in found.items()} == {name: str(spec) for name, spec in plan.items()}


REFUSED = [
    (IntSpec(8, -1, symmetric=False), ActivationSpec("int8"), "--sym"),
    (IntSpec(8, -1), ActivationSpec("e4m3"), "int8-token"),
    (FloatSpec(), ActivationSpec("int8"), "e4m3-token"),
    (FloatSpec("e2m1", 16, scale="e4m3"), ActivationSpec("e4m3"), "e2m1-g16"),
    (IntSpec(8, -1), ActivationSpec("int8", outliers=6.0), "outliers"),
]


@pytest.mark.parametrize(("weights", "inputs", "told"), REFUSED)
def test_pairs_that_no_engine_runs_are_refused(weights: Any, inputs: ActivationSpec, told: str) -> None:
    (reason,) = CODEC.supports_inputs(weights, inputs)
    assert told in reason


def test_shapes_that_do_not_fit_are_refused() -> None:
    for name, columns in (("nvfp4", 40), ("mxfp4", 48), ("fp8-block", 192)):
        spec = FloatSpec.parse(name)
        assert spec is not None
        (reason,) = CODEC.supports(spec, (64, columns))
        assert str(columns) in reason
        assert "--skip" in reason
    (reason,) = CODEC.supports(FloatSpec(group_size=64), (64, 64))
    assert "fp8-block" in reason


@pytest.mark.parametrize("name", SCHEMES)
def test_damage_is_told_and_never_a_traceback(name: str) -> None:
    scheme = SCHEMES[name]
    tensors = CODEC.encode(a_weight(scheme.weights), inputs=scheme.inputs)
    headers = {f"m.{local}": tensor for local, tensor in tensors.items()}
    entry = CODEC.read_plan(config_of(scheme), headers)["m"]
    for local in tensors:
        if local == "weight_shape":
            continue
        missing = {key: value for key, value in tensors.items() if key != local}
        with pytest.raises(CheckpointError, match=local):
            entry.decode(missing)
        with pytest.raises(CheckpointError, match=local):
            entry.decode(tensors | {local: torch.cat([tensors[local].view(torch.uint8)] * 2)})
        with pytest.raises((CheckpointError, UnsupportedError)):
            # A dtype of another width under the same name.
            CODEC.read_plan(
                config_of(scheme), headers | {"m.weight": torch.zeros(4, 4), "m.weight_packed": torch.zeros(4, 4)}
            )


def test_inputs_that_cannot_be_simulated_are_refused() -> None:
    scheme = SCHEMES["W8A8"]
    headers = {f"m.{k}": v for k, v in CODEC.encode(a_weight(scheme.weights), inputs=scheme.inputs).items()}
    config = config_of(scheme)
    (group,) = config["config_groups"].values()
    group["input_activations"]["symmetric"] = False
    with pytest.raises(UnsupportedError, match="input_activations"):
        CODEC.read_plan(config, headers)
    group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": False}
    with pytest.raises(CheckpointError, match="static activation scales"):
        CODEC.read_plan(config, headers)
    group["input_activations"] = "int8"
    with pytest.raises(CheckpointError, match="must be a table"):
        CODEC.read_plan(config, headers)
