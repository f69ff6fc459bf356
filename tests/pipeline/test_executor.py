"""A quantization on many workers writes the bytes of one on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scattered import Scattered

from lowbit.errors import ResourceError, UnsupportedError
from lowbit.pipeline.executor import Executor
from lowbit.pipeline.quantize import quantize

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("llama", {"method": "gptq"}),
    "awq": ("llama", {"method": "awq", "symmetric": False}),
    "awq into linears": ("qwen2", {"method": "awq", "symmetric": False}),
    "rtn": ("llama", {"method": "rtn"}),
    "gptaq": ("llama", {"method": "gptaq"}),
    "hqq": ("llama", {"method": "hqq", "symmetric": False}),
    "inputs and cache": ("llama", {"scheme": "W8A8", "kv_cache": "fp8", "group_size": None}),
    "merged matrices": ("llama", {"scheme": "NVFP4", "group_size": None}),
    "pruned": ("llama", {"method": "gptq", "sparsity": "2:4"}),
    "experts": ("qwen3_moe", {"method": "gptq"}),
    "experts, float beside": ("qwen3_moe", {"method": "gptaq"}),
    "experts, all tokens": ("mixtral", {"method": "gptq", "all_experts": True}),
    "little memory": ("llama", {"method": "gptq", "memory": 64 << 20}),
}


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _quantize(source: Path, out: Path, text: Path, executor: Executor | None, **settings: Any) -> dict[str, bytes]:
    given: dict[str, Any] = {"calibration": text, "samples": 24, "seq_len": 256, "group_size": 64} | settings
    given = {name: value for name, value in given.items() if value is not None}
    quantize(source, out, executor=executor, **given)
    return _files(out)


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_one_machine(
    case: str, checkpoint_of: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    family, settings = CASES[case]
    source = checkpoint_of(family)
    expected = _quantize(source, tmp_path / "one", calibration_file, None, **settings)
    with Scattered(3, seed=7) as executor:
        assert _quantize(source, tmp_path / "many", calibration_file, executor, **settings) == expected
        assert len(executor.by_worker) == 3


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_lost_workers_change_no_byte(method: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    expected = _quantize(tiny_llama, tmp_path / "one", calibration_file, None, method=method)
    losses = (5, 40, 90, 130) if method == "gptq" else (3, 9)
    with Scattered(3, seed=1, losses=losses) as executor:
        assert _quantize(tiny_llama, tmp_path / "many", calibration_file, executor, method=method) == expected
        assert executor.lost == len(losses)


def test_a_run_that_lost_all_its_workers_goes_on_alone(
    tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    expected = _quantize(tiny_llama, tmp_path / "one", calibration_file, None)
    out = tmp_path / "many"
    with Scattered(2, losses=(70, 71), spare=0) as executor, pytest.raises(ResourceError):
        _quantize(tiny_llama, out, calibration_file, executor)
    assert not out.exists()
    assert _quantize(tiny_llama, out, calibration_file, None, resume=True) == expected


def test_a_run_begun_alone_goes_on_with_workers(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    expected = _quantize(tiny_llama, tmp_path / "one", calibration_file, None)
    out = tmp_path / "many"
    with Scattered(1, losses=(60,), spare=0) as executor, pytest.raises(ResourceError):
        _quantize(tiny_llama, out, calibration_file, executor)
    with Scattered(3) as executor:
        assert _quantize(tiny_llama, out, calibration_file, executor, resume=True) == expected


@pytest.mark.parametrize(
    ("method", "reason"), [("autoround", "all batches at once"), ("best", "the time that is left")]
)
def test_methods_that_cannot_be_shared_out_are_refused(
    method: str, reason: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    with Scattered(2) as executor, pytest.raises(UnsupportedError, match=reason):
        _quantize(tiny_llama, tmp_path / "out", calibration_file, executor, method=method)
    assert list(tmp_path.iterdir()) == []
