"""Headers that lie, each refused with one line that names file, tensor and reason."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lowbit.checkpoint import read_header, write_safetensors
from lowbit.checkpoint.safetensors import read_bytes, read_rows, read_tensor
from lowbit.errors import CheckpointError, UnsupportedError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


F32 = entry("F32", [2], 0, 8)

BAD: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{hello", b"", "header: not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "header: not valid JSON"),
    "array": ([], b"", "expected a JSON object"),
    "deep": (b'{"a":' * 90_000 + b"1", b"", "nested too deeply|not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not valid JSON|expected an object"),
    "twice": (b'{"a": 1, "a": 2}', b"", "key 'a' appears twice"),
    "twice inside": (b'{"a": {"dtype": "F32", "dtype": "I8"}}', b"", "key 'dtype' appears twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map"),
    "no object": ({"w": 3}, b"", "tensor 'w': expected an object"),
    "dtype": ({"w": entry("F4", [2], 0, 1)}, b"\0", "tensor 'w': dtype 'F4' is not one of"),
    "shape": ({"w": F32 | {"shape": [2.0]}}, bytes(8), "tensor 'w': shape"),
    "negative": ({"w": F32 | {"shape": [-2]}}, bytes(8), "tensor 'w': shape"),
    "boolean": ({"w": F32 | {"shape": [True, 2]}}, bytes(8), "tensor 'w': shape"),
    "overflow": ({"w": entry("F32", [2**31, 2**31, 2**3], 0, 8)}, bytes(8), "overflows"),
    "overflow behind zero": ({"w": entry("F32", [0, 2**62, 2**62], 0, 0)}, b"", "overflows"),
    "product": ({"w": entry("F32", [3], 0, 8)}, bytes(8), r"F32 \[3\] takes 12 bytes, its offsets span 8"),
    "backwards": ({"w": entry("F32", [2], 8, 0)}, bytes(8), "data_offsets"),
    "overlap": ({"a": F32, "w": entry("F32", [2], 4, 12)}, bytes(12), "tensor 'w' overlaps"),
    "hole": ({"a": F32, "w": entry("F32", [2], 12, 20)}, bytes(20), "tensor 'w' leaves a hole"),
    "same bytes": ({"a": F32, "w": F32}, bytes(8), "overlaps"),
    "truncated": ({"w": F32}, bytes(7), "truncated: .* its header promises"),
    "too long": ({"w": F32}, bytes(9), "1 bytes more"),
    "surrogate": (b'{"\\ud800": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}', b"", "not valid Unicode"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    header, data, message = BAD[case]
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x05\0\0\0\0\0\0", "7 bytes are too few"),
        (b"\x05\0\0\0\0\0\0\0{", "truncated: the header needs 13 bytes"),
        (b"\xff" * 8, "not a safetensors file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_bad_lengths(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_empty_files_and_metadata(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "a", {})) == ({}, {})
    assert read_header(write(tmp_path / "b", {"__metadata__": {"format": "pt"}}))[1] == {"format": "pt"}


def test_reads_own_memory_and_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    write_safetensors(path, {"t": tensor})
    info = read_header(path)[0]["t"]
    read, raw = read_tensor(info), read_bytes(info)
    path.unlink()
    read += 0
    assert torch.equal(read, tensor)
    assert bytes(raw) == tensor.view(torch.uint8).numpy().tobytes()
    with pytest.raises(CheckpointError, match="tensor 't'"):
        read_tensor(info)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"t": torch.ones(100, 10)})
    info = read_header(path)[0]["t"]
    path.write_bytes(path.read_bytes()[:-50])
    for read in (read_tensor, read_bytes, lambda item: read_rows(item, [99]), lambda item: read_rows(item, range(100))):
        with pytest.raises(CheckpointError, match="truncated while reading tensor 't'"):
            read(info)


def test_rows_that_do_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"t": torch.ones(4, 2), "scalar": torch.tensor(1.0)})
    header = read_header(path)[0]
    for row in (-1, 4, 2**40):
        with pytest.raises(CheckpointError, match=rf"'t' has 4 rows, row {row} was asked"):
            read_rows(header["t"], [0, row])
        with pytest.raises(CheckpointError, match="'t' has 4 rows"):
            read_rows(header["t"], range(min(row, 2), row + 1))
    with pytest.raises(CheckpointError, match="scalar"):
        read_rows(header["scalar"], [0])
    assert read_rows(header["t"], torch.tensor([], dtype=torch.long)).shape == (0, 2)


def test_reading_from_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"t{i}": torch.full((64, 64), float(i)) for i in range(8)}
    write_safetensors(path, tensors)
    header = read_header(path)[0]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(name for name, value in tensors.items() if not torch.equal(read_tensor(header[name]), value))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_writing_is_deterministic_whatever_the_order_and_layout(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(4, 3).t(), "c": torch.randn(3, dtype=torch.float64)[::2]}
    first = write_safetensors(tmp_path / "1", tensors, {"y": "1", "x": "2"})
    second = write_safetensors(tmp_path / "2", dict(reversed(tensors.items())), {"x": "2", "y": "1"})
    assert first == second
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    for name, value in safetensors.torch.load_file(tmp_path / "1").items():
        assert torch.equal(value, tensors[name])


def test_writes_the_bytes_of_the_reference_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.arange(5),
        "c": torch.ones(2, dtype=torch.bfloat16),
        "d": torch.zeros(0),
    }
    write_safetensors(tmp_path / "a", tensors)
    assert (tmp_path / "a").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_dtypes_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'t': safetensors cannot hold"):
        write_safetensors(tmp_path / "a", {"t": torch.zeros(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_reading_leaves_nothing_resident(tmp_path: Path) -> None:
    """Reading 96 MB tensor by tensor takes little more memory than the largest tensor."""
    path = tmp_path / "large.safetensors"
    write_safetensors(path, {f"t{i:02d}": torch.full((1024, 1024), float(i)) for i in range(24)})
    program = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from lowbit.checkpoint.safetensors import read_header, read_tensor\n"
        "tensors = read_header(Path(sys.argv[1]))[0]\n"
        "read_tensor(tensors['t00']).sum()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in tensors: read_tensor(tensors[name]).max()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 24_000
