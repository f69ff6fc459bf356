"""Estimates: file sizes to the byte against what lowbit writes, splits over devices, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import convert, estimate, quantize, recommend
from lowbit.codecs import conversion
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from lowbit.planning import Hardware
from lowbit.sizing import variants
from lowbit.sizing.estimate_results import Estimate
from lowbit.sizing.headers import open_header_model
from lowbit.sizing.memory_plot import write_picture
from lowbit.sizing.pictures import write_figure
from lowbit.sizing.placement import device_kinds, image_encoder
from lowbit.sizing.recommend_plot import draw_recommendation
from lowbit.sizing.variants import make_variant

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GIB = 2**30
MACHINE = Hardware(8.0, "Some CPU", True, True, False, 64 * GIB, 48 * GIB)

FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt_neox opt mixtral qwen2_moe qwen3_moe"


def weights(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.glob("*.safetensors")}


@pytest.mark.parametrize("model_type", FAMILIES.split())
def test_every_family_to_the_byte(model_type: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of(model_type)
    predicted = make_variant(open_header_model(source), "int4-g64-sym")
    assert not predicted.problem
    quantize(source, tmp_path / "out", scheme="int4-g64-sym", method="rtn", certify_tokens=0)
    assert predicted.files == weights(tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        *(
            (scheme, "compressed-tensors")
            for scheme in ("W4A16", "W4A16_ASYM", "W8A16", "int3-g32-asym", "int5-channel-sym")
        ),
        *((scheme, "gptq") for scheme in ("int4-g128-sym", "int8-g32-sym", "int3-channel-sym", "int2-g64-sym")),
        *((scheme, "gptq_v2") for scheme in ("int4-g128-asym", "int8-channel-asym")),
        *((scheme, "awq") for scheme in ("int4-g128-asym", "int4-g64-sym", "int4-channel-asym")),
        ("int6-tensor-sym", "compressed-tensors"),
    ],
)
def test_every_format_to_the_byte(
    scheme: str, format: str, new_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    dtype = torch.float32 if "channel" in scheme else torch.bfloat16
    source = new_checkpoint(tmp_path / "source", dtype=dtype, num_hidden_layers=1)
    predicted = make_variant(open_header_model(source), scheme, format)
    quantize(source, tmp_path / "out", scheme=scheme, format=format, method="rtn", certify_tokens=0)
    assert predicted.files == weights(tmp_path / "out")
    assert predicted.exact


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W4A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4"])
def test_quantized_inputs_to_the_byte(
    scheme: str, new_checkpoint: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    source = new_checkpoint(tmp_path / "source", dtype=torch.bfloat16, num_hidden_layers=1)
    predicted = make_variant(open_header_model(source), scheme)
    data = {"calibration": calibration_file, "samples": 4, "seq_len": 32}
    quantize(source, tmp_path / "out", scheme=scheme, method="rtn", certify_tokens=0, **data)
    assert predicted.files == weights(tmp_path / "out")
    assert "gptq" in make_variant(open_header_model(source), scheme, "gptq").problem.lower()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_dense_copies_to_the_byte(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    predicted = make_variant(open_header_model(tiny_llama), name)
    convert(tiny_llama, tmp_path / "out", "dense", dtype=name)
    assert predicted.files == weights(tmp_path / "out")


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "Q5_0", "IQ4_NL", "F16", "MXFP4_MOE"])
def test_gguf_files_to_the_byte(mix: str, tmp_path: Path) -> None:
    predicted = make_variant(open_header_model("demo"), mix)
    assert predicted.exact
    assert not predicted.problem
    quantize("demo", tmp_path / "out.gguf", scheme=mix, certify_tokens=0)
    assert predicted.size == (tmp_path / "out.gguf").stat().st_size


def test_a_gguf_file_that_needs_a_matrix_to_the_byte(tmp_path: Path) -> None:
    """The matrix changes the types of some tensors, and the keys that name it are part of the file."""
    predicted = make_variant(open_header_model("demo"), "IQ2_S")
    assert not predicted.problem
    settings: dict[str, Any] = {"imatrix": "auto", "calibration": "demo", "samples": 2, "seq_len": 32}
    quantize("demo", tmp_path / "out.gguf", scheme="IQ2_S", certify_tokens=0, **settings)
    assert predicted.size == (tmp_path / "out.gguf").stat().st_size


def test_a_quantized_model_as_it_is_and_as_floats(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "int4", scheme="W4A16", method="rtn", certify_tokens=0)
    opened = open_header_model(tmp_path / "int4")
    assert make_variant(opened, "stored").files == weights(tmp_path / "int4")
    convert(tmp_path / "int4", tmp_path / "dense", "dense", dtype="bf16")
    assert make_variant(opened, "bf16").files == weights(tmp_path / "dense")
    assert opened.parameters == open_header_model(tiny_llama).parameters


def test_parts_of_a_conversion_are_counted_as_it_counts() -> None:
    assert variants.CONVERSION_PART_BYTES == conversion._PART_BYTES


def test_several_files(new_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from lowbit.checkpoint import PartialCheckpoint
    from lowbit.checkpoint.sizes import weight_file_sizes

    parts = [
        {f"model.layers.{block}.{name}": torch.zeros(20 + block, 7) for name in ("b.weight", "a.weight", "c.bias")}
        for block in range(4)
    ]
    with PartialCheckpoint.create(tmp_path / "out", "x") as partial:
        for index, part in enumerate(parts):
            partial.commit_part(index, part, {})
        partial.finish({}, max_shard_bytes=1500)
    headers = [{name: (item.dtype, tuple(item.shape)) for name, item in part.items()} for part in parts]
    assert weight_file_sizes(headers, 1500) == weights(tmp_path / "out")
    assert len(weights(tmp_path / "out")) > 3


def published(name: str, **arguments: object) -> Estimate:
    return estimate(CONFIGS / f"{name}.json", hardware=MACHINE, **arguments)  # type: ignore[arg-type]


def test_bf16_is_a_gguf_file_to_llama_cpp() -> None:
    found = estimate("demo", engine="llama.cpp", gpus=0, hardware=MACHINE)
    assert [entry.format for entry in found.precisions] == ["gguf"] * len(found.precisions)
    assert all(entry.fits for entry in found.precisions)
    assert estimate("demo", schemes=("BF16",), hardware=MACHINE).precisions[0].format == "dense"


def test_published_sizes() -> None:
    llama = published("llama-3.1-8b", schemes=("bf16", "Q4_K_M"), gpus=1, gpu_memory=24 * GIB)
    assert llama.parameters == 8_030_261_248
    assert llama.precisions[0].file_bytes == pytest.approx(16_060_522_240, rel=1e-5)
    assert llama.precisions[0].kinds["head"] == llama.precisions[0].kinds["embedding"] == 128_256 * 4096 * 2
    # The file on the hub is 4,920,734,272 bytes long, 8 MB of it vocabulary.
    assert llama.precisions[1].file_bytes == pytest.approx(4_920_734_272, rel=0.003)
    mixtral = published("mixtral-8x7b-v0.1", schemes=("bf16",))
    assert (mixtral.parameters, mixtral.active_parameters) == (46_702_792_704, 12_879_925_248)
    gemma = published("gemma-2-9b", schemes=("bf16",))
    assert gemma.parameters == 9_241_705_984
    assert "head" not in gemma.precisions[0].kinds


def test_what_fits_on_24_gib() -> None:
    found = published("llama-3.1-8b", context=8192, concurrency=16, gpus=1, gpu_memory=24 * GIB)
    by_name = {entry.scheme: entry for entry in found.precisions}
    assert not by_name["bf16"].fits
    assert by_name["bf16"].concurrency < by_name["int4-g128-sym"].concurrency < 16
    fp8 = published("llama-3.1-8b", context=8192, concurrency=16, kv_dtype="fp8", gpus=1, gpu_memory=24 * GIB)
    assert fp8.precisions[-1].fits
    assert fp8.cache.allocated < found.cache.allocated * 0.51
    assert any("fp8" in way for way in by_name["int4-g128-sym"].advice.offload)  # type: ignore[union-attr]


def test_devices_share_and_replicate() -> None:
    llama = open_header_model(CONFIGS / "llama-3.1-8b.json")
    variant = make_variant(llama, "bf16")
    whole, half, sixteenth = (device_kinds(variant, llama, devices) for devices in (1, 2, 16))
    assert half["mlp"] * 2 == whole["mlp"]
    assert half["norm"] == whole["norm"]
    keys_and_values = 32 * 2 * 1024 * 4096 * 2
    assert sixteenth["attention"] == (whole["attention"] - keys_and_values) // 16 + keys_and_values // 8


def test_latent_attention_is_kept_whole(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "deepseek-v2.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "n_routed_experts": 8}))
    found = estimate(tmp_path, schemes=("int4",), gpus=8, gpu_memory=80 * GIB, hardware=MACHINE)
    assert any("MLA" in note for note in found.notes)
    assert found.cache.request == 8192 * 3 * 576 * 2


def test_degrees_that_cut_groups_are_told() -> None:
    qwen = published("qwen2.5-7b", schemes=("int4",), gpus=8, gpu_memory=24 * GIB)
    assert not qwen.precisions[0].fits
    assert "tensor parallel 8: 28 attention heads" in qwen.precisions[0].problem
    assert qwen.precisions[0].tensor_parallel == (1, 2, 4)


def test_gpus_of_the_machine_are_used() -> None:
    from lowbit.planning import Gpu

    two = Hardware(8.0, "CPU", True, True, False, 64 * GIB, 48 * GIB, (Gpu("G", (9, 0), 80 * GIB, 79 * GIB),) * 2)
    found = estimate("demo", hardware=two)
    assert (found.devices.count, found.devices.memory, found.tensor_parallel) == (2, 80 * GIB, 2)
    assert estimate("demo", hardware=two, gpus=0).devices.name == "CPU"


def test_an_image_encoder_is_counted() -> None:
    vision = {"embed_dim": 1280, "patch_size": 14, "spatial_merge_size": 2, "intermediate_size": 3420}
    encoder = image_encoder({"vision_config": vision})
    assert encoder is not None
    assert (encoder.tokens, encoder.patches) == (16_384, 4)
    fixed = image_encoder(
        {"vision_config": {"hidden_size": 1152, "patch_size": 14, "image_size": 896}, "mm_tokens_per_image": 256}
    )
    assert fixed is not None
    assert (fixed.tokens, fixed.patches) == (256, 16)
    assert image_encoder({"vision_config": {"depth": 3}}) is None
    assert image_encoder({}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1 << 20}, "--context 1048576: beyond the model's maximum of 1024"),
        ({"context": 0}, "--context 0: must be at least 1"),
        ({"concurrency": 0}, "--concurrency 0"),
        ({"gpu_memory": 0}, "--gpu-memory 0"),
        ({"gpus": -1}, "--gpus -1"),
        ({"gpus": 2}, "this machine has none, so say how large they are"),
        ({"gpus": 0, "gpu_memory": GIB}, "contradict each other"),
        ({"gpus": 2, "gpu_memory": GIB, "tensor_parallel": 4}, "--tensor-parallel 4: there are 2 GPUs"),
        ({"schemes": ("int4-g12x",)}, "did you mean 'int4-g128-sym'"),
        ({"schemes": ("Q4_K_N",)}, "did you mean 'Q4_K_"),
        ({"schemes": ("int9-g128",)}, "--scheme int9-g128"),
        ({"schemes": ("int4",), "format": "gtpq"}, "did you mean 'gptq'"),
        ({"kv_dtype": "fp9"}, "--kv-dtype fp9: unknown: did you mean 'fp8'"),
        ({"engine": "vlm"}, "--engine vlm"),
    ],
)
def test_nonsense_gets_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as found:
        estimate("demo", hardware=MACHINE, **arguments)  # type: ignore[arg-type]
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_what_a_format_cannot_hold_is_a_row_with_its_reason() -> None:
    found = estimate("demo", schemes=("int4-g96-sym", "int4", "Q4_K_M"), hardware=MACHINE)
    assert "group size 96 does not divide" in found.precisions[0].problem
    assert "--engine llama.cpp" in found.precisions[2].problem
    assert [bool(entry.problem) for entry in found.precisions] == [True, False, True]
    assert not any(entry.fits for entry in found.precisions if entry.problem)
    dense = estimate("demo", schemes=("int4",), format="dense", hardware=MACHINE)
    assert "--scheme bf16" in dense.precisions[0].problem


def test_unknown_architectures(tmp_path: Path) -> None:
    config = (CONFIGS / "llama-3.1-8b.json").read_text().replace('"llama"', '"lama"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedError, match="'lama'"):
        estimate(tmp_path, hardware=MACHINE)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type is missing"):
        estimate(tmp_path, hardware=MACHINE)


def test_a_picture(tmp_path: Path) -> None:
    found = estimate("demo", hardware=MACHINE)
    write_picture(found, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match=r"must end in \.png"):
        write_picture(found, tmp_path / "memory.xyz")


def test_recommending_by_measurement(tmp_path: Path) -> None:
    quantize("demo", tmp_path / "copy", scheme="int8-g128-sym", method="rtn", certify_tokens=512)
    plain = recommend("demo", gpus=1, memory=4 * GIB, hardware=MACHINE)
    assert plain.measured == ()
    found = recommend("demo", gpus=1, memory=4 * GIB, measured=[tmp_path / "copy"], hardware=MACHINE)
    assert found.measured == ("copy",)
    assert found.scheme == "int8-g128-sym"
    assert "measured" in found.reasons["precision"]
    assert (
        found.commands[0]
        == "lowbit quantize demo demo-int8-g128-sym --scheme int8-g128-sym --method rtn --format compressed-tensors"
    )
    assert found.runner_up
    with pytest.raises(UsageError, match="no certificate there"):
        recommend("demo", measured=[tmp_path], hardware=MACHINE)


def test_a_picture_of_what_was_compared(tmp_path: Path) -> None:
    found = recommend(CONFIGS / "llama-3.1-8b.json", gpus=1, memory=24 * GIB, concurrency=16, hardware=MACHINE)
    figure = draw_recommendation(found)
    (axes,) = figure.axes
    rings = [line for line in axes.lines if line.get_markersize() == 15]
    assert [line.get_xdata()[0] for line in rings if len(line.get_xdata())] == [found.chosen.total / GIB]
    marks = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert len(marks) == len(found.candidates) + 1
    write_figure(figure, tmp_path / "deep" / "choice.png")
    assert (tmp_path / "deep" / "choice.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"--png .*cannot be written"):
        write_figure(figure, tmp_path / "file" / "choice.png")


def test_recommending_on_a_cpu() -> None:
    found = recommend(CONFIGS / "llama-3.1-8b.json", gpus=0, memory=8 * GIB, hardware=MACHINE)
    assert found.engine == "llama.cpp"
    assert found.format == "gguf"
    assert found.precision.fits


def test_a_budget_that_is_too_small_says_by_how_much() -> None:
    large = CONFIGS / "llama-3.1-70b.json"
    with pytest.raises(ResourceError, match=r"lacks \d+\.\d+ GiB .* this would do: .*devices of 4\d\.\d GiB") as found:
        recommend(large, gpus=1, memory=24 * GIB, hardware=MACHINE)
    # What is advised does fit.
    enough = re.search(r"devices of (\d+\.\d) GiB", str(found.value))
    assert enough is not None
    assert recommend(large, gpus=1, memory=int(float(enough[1]) * GIB), hardware=MACHINE).precision.fits
    with pytest.raises(ResourceError, match=r"fits in 1\.0 MiB: .* lacks \d+\.\d\d MiB .*devices of \d+\.\d MiB"):
        recommend("demo", gpus=1, memory=1 << 20, hardware=MACHINE)


def test_a_wider_batch_is_counted_in_a_recommendation() -> None:
    model = CONFIGS / "llama-3.1-8b.json"
    parts = [
        recommend(model, gpus=1, memory=80 * GIB, batch_tokens=tokens, hardware=MACHINE).precision.parts["activations"]
        for tokens in (2048, 16384)
    ]
    assert parts[1] > 4 * parts[0]
