"""Calibration sets and evaluation texts: reading, packing, determinism, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.calibration import PRESETS, Tokenizer, encode_text, load_calibration, load_text, load_tokenizer
from lowbit.calibration.packing import cut, ids_hash
from lowbit.calibration.tokenizer import encode
from lowbit.errors import CalibrationError, UsageError


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_same_arguments_give_the_same_ids(tokenizer: Tokenizer, calibration_file: Path) -> None:
    first = load_calibration(calibration_file, tokenizer, samples=8, seq_len=64)
    again = load_calibration(str(calibration_file), tokenizer, samples=8, seq_len=64)
    other = load_calibration(calibration_file, tokenizer, samples=8, seq_len=64, seed=7)
    assert first.ids.shape == (8, 64)
    assert first.ids.dtype == torch.int64
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 == ids_hash(first.ids)
    assert first.sha256 != other.sha256
    assert (first.name, first.documents, first.tokens, first.notes) == ("calibration.txt", 1, 512, ())


def test_sequences_without_bos_are_divided_by_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = ["value", "other", "return", "def"]
    ids = load_calibration(write_rows(tmp_path / "w.jsonl", words), tokenizer, samples=99, seq_len=2).ids
    pieces = encode(tokenizer, words)
    stream = [piece for piece in ids.flatten().tolist() if piece != tokenizer.eos_token_id]
    assert sorted(map(tuple, pieces)) == sorted(tuple(run) for run in _runs(ids.flatten().tolist(), 1))
    assert len(stream) == sum(map(len, pieces))


def _runs(stream: list[int], end: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for piece in stream:
        if piece == end:
            runs.append([])
        else:
            runs[-1].append(piece)
    return [run for run in runs if run]


def test_every_sequence_begins_with_bos_where_texts_do(shared: Path) -> None:
    stories = load_tokenizer(shared / "models" / "stories260K")
    corpus = shared / "corpora" / "tinystories-calib.utf8.txt"
    data = load_calibration(corpus, stories, samples=16, seq_len=128)
    assert data.ids.shape == (16, 128)
    assert (data.ids[:, 0] == stories.bos_token_id).all()
    assert data.documents > 300
    follows = data.ids[:, :-1][data.ids[:, 1:] == stories.bos_token_id]
    assert (follows != stories.bos_token_id).all()


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "alpaca_zh_demo.json", "mt_bench_question.jsonl"])
def test_published_data_sets(shared: Path, tokenizer: Tokenizer, name: str) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    data = load_calibration(shared / "corpora" / name, tokenizer, samples=4, seq_len=256)
    assert data.ids.shape == (4, 256)
    assert "<user>" in tokenizer.decode(load_text(shared / "corpora" / name, tokenizer, max_tokens=256).ids.tolist())


def test_chat_rows_go_through_the_template_without_a_second_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}={{ m['content'] }}{% endfor %}"
    path = write_rows(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "value"}]}] * 3)
    data = load_calibration(path, tokenizer, samples=1, seq_len=4)
    assert tokenizer.decode(data.ids[0].tolist()).startswith("<s>user")
    assert data.documents == 1
    assert any("2 duplicate" in note for note in data.notes)


def test_fewer_sequences_than_asked_are_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("return value\n" * 60, encoding="utf-8")
    data = load_calibration(path, tokenizer, samples=500, seq_len=16)
    assert 0 < len(data.ids) < 500
    assert any(f"{len(data.ids)} full sequences of 16, not the 500" in note for note in data.notes)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "'a.txt' is empty"),
        ("a.txt", b" \n\t ", "is empty"),
        ("a.txt", b"return", "too short: .* tokens found, 64 needed for one sequence .512 for all"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text .byte 0."),
        ("a.bin", b"a\0b", "looks binary"),
        ("a.jsonl", b'{"text": "a"}\n{"text":', "a.jsonl:2: not a JSON row"),
        ("a.json", b"[", "not JSON"),
        ("a.json", b"[]", "is empty"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.csv", b"", "is empty"),
    ],
)
def test_unusable_files(tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=expected) as caught:
        load_calibration(path, tokenizer, samples=8, seq_len=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("genral", "did you mean 'general'"), ("none.txt", "give an existing file"), (Path("a/b"), "give an existing")],
)
def test_unknown_names(tokenizer: Tokenizer, source: str | Path, expected: str) -> None:
    with pytest.raises(CalibrationError, match=expected):
        load_calibration(source, tokenizer)


def test_sizes_that_cannot_be(tokenizer: Tokenizer, calibration_file: Path) -> None:
    with pytest.raises(UsageError, match="--samples 0"):
        load_calibration(calibration_file, tokenizer, samples=0)


def test_a_file_of_each_kind_reads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"value {i}, other" for i in range(20)]
    rows = [{"text": text} for text in texts]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "lines.json", rows)
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    (tmp_path / "a.csv").write_text("\ufeff\n\ufeffText,n\n" + "".join(f'"{t}",1\n' for t in texts), encoding="utf-8")
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8-sig")
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet")
    names = ["a.jsonl", "lines.json", "a.json", "a.csv", "a.txt", "a.parquet"]
    hashes = {load_calibration(tmp_path / name, tokenizer, samples=4, seq_len=16).sha256 for name in names}
    assert len(hashes) == 1
    whole = load_calibration(tmp_path, tokenizer, samples=4, seq_len=16)
    assert whole.documents == 20
    assert any("100 duplicate" in note for note in whole.notes)


def test_an_empty_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration file in this directory"):
        load_calibration(tmp_path, tokenizer)


def test_self_asks_the_model(tokenizer: Tokenizer) -> None:
    asked = []

    def generate(samples: int, seq_len: int, seed: int) -> torch.Tensor:
        asked.append((samples, seq_len, seed))
        ids = torch.arange(samples * seq_len).reshape(samples, seq_len) % 300
        ids[1] = ids[0]
        return ids

    for source in ("self", None):  # no hub here, so None means self
        data = load_calibration(source, tokenizer, samples=4, seq_len=8, seed=5, generate=generate)
        assert data.ids.shape == (3, 8)
        assert data.name == "self"
        assert "1 duplicate" in data.notes[0]
    assert asked == [(4, 8, 5)] * 2
    with pytest.raises(CalibrationError, match="none was given"):
        load_calibration("self", tokenizer)
    with pytest.raises(CalibrationError, match="outside the tokenizer's 320 ids"):
        load_calibration("self", tokenizer, seq_len=4, generate=lambda n, t, _: torch.full((n, t), 320))
    with pytest.raises(CalibrationError, match="shape"):
        load_calibration("self", tokenizer, seq_len=4, generate=lambda n, t, _: torch.ones(n, t + 1))


def test_demo_halves_differ(tokenizer: Tokenizer) -> None:
    data = load_calibration("demo", tokenizer, samples=2, seq_len=64)
    assert data.ids.shape == (2, 64)
    assert data.documents > 100
    text = load_text("demo", tokenizer, max_tokens=400)
    assert text.ids.shape == (400,)
    assert "argparse" in tokenizer.decode(text.ids.tolist())


def test_evaluation_text_keeps_its_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    content = "".join(f"def function_{i}(value):\n    return value\n" for i in range(2000))
    path.write_text(content, encoding="utf-8")
    text = load_text(path, tokenizer)
    assert text.ids.tolist() == encode(tokenizer, [content])[0]
    head = load_text(path, tokenizer, max_tokens=1000)
    assert torch.equal(head.ids, text.ids[:1000])
    assert torch.equal(encode_text(content, "given", tokenizer).ids, text.ids)
    with pytest.raises(CalibrationError, match="'given' is empty"):
        encode_text("", "given", tokenizer)


def test_evaluation_text_of_few_tokens_per_character(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([" " * 64])  # type: ignore[attr-defined]
    text = encode_text(" " * 64 * 3000, "spaces", tokenizer, max_tokens=2000)
    assert len(text.ids) == 2000


@given(st.text(alphabet="ab \n.。", max_size=400), st.integers(4, 50))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_hub_data_needs_its_extra(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (*PRESETS, "owner/set:config"):
        with pytest.raises(CalibrationError, match="pip install") as caught:
            load_calibration(name, tokenizer)
        assert "\n" not in str(caught.value)


class FakeHub(ModuleType):
    """Stands for the ``datasets`` package: what was asked of it, and rows or a failure in return."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[Any, ...]] = []
        self.failure = failure

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        if self.failure:
            raise self.failure
        assert streaming
        self.asked.append((name, config, split))
        return [{"text": f"return value {name} {i}", "other": "x" * 99} for i in range(50)]


def test_hub_data_by_name(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = load_calibration("owner/set:config:test:text", tokenizer, samples=2, seq_len=16)
    assert hub.asked == [("owner/set", "config", "test")]
    assert (data.name, data.documents) == ("owner/set:config:test:text", 50)
    load_calibration("legal", tokenizer, samples=2, seq_len=16)
    assert hub.asked[1:] == [(s.dataset, s.config, s.split) for s in PRESETS["legal"]]


@pytest.mark.parametrize(
    "failure", [ConnectionError("no\nroute"), ValueError("BuilderConfig 'x' not found"), KeyError()]
)
def test_hub_failures_are_one_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(failure))
    with pytest.raises(CalibrationError, match="'owner/set' cannot be read from the hub") as caught:
        load_calibration("owner/set", tokenizer)
    assert "\n" not in str(caught.value)
