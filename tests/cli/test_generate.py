"""``lowbit generate`` and ``lowbit chat`` on the demo model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.codecs.gguf.writing import write_gguf

pytest.importorskip("xllamacpp")
DEMO = Path(__file__).parents[2] / "src" / "lowbit" / "demo" / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a GGUF file. Read only."""
    from lowbit.cli.main import main

    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    assert main(["convert", str(DEMO), str(path)]) == 0
    return path


def test_a_text_is_continued(model: Path, lowbit: Callable[..., Any]) -> None:
    arguments = ("generate", model, "def main(", "--max-tokens", 12, "--temperature", 0, "--context", 256)
    shown = lowbit(*arguments)
    assert shown.status == 0
    assert "12 tokens, " in shown.err
    assert "tokens/s" in shown.err
    told = lowbit(*arguments, "--json")
    answer = json.loads(told.out)
    assert answer["text"] + "\n" == shown.out
    assert answer["tokens"] == 12
    assert answer["stop"] == "limit"
    assert told.err == ""


def test_the_prompt_may_come_from_stdin(
    model: Path, lowbit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main("))
    piped = lowbit("generate", model, "-", "--max-tokens", 3, "--seed", 5)
    named = lowbit("generate", model, "def main(", "--max-tokens", 3, "--seed", 5)
    assert piped.out == named.out


def test_a_chat_remembers(model: Path, lowbit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []
    from lowbit.engines.llama_cpp import LlamaCpp

    answer = LlamaCpp.chat

    def record(self: LlamaCpp, messages: Any, **options: Any) -> Any:
        asked.append(list(messages))
        return answer(self, messages, **options)

    monkeypatch.setattr(LlamaCpp, "chat", record)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nagain\n/clear\nanew\n/exit\nnever\n"))
    outcome = lowbit("chat", model, "--max-tokens", 4, "--temperature", 0, "--system", "be brief")
    assert outcome.status == 0
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert asked[1][2]["content"] in outcome.out
    assert outcome.err.count("tokens/s]") == 3


def test_a_full_context_forgets_the_oldest(
    model: Path, lowbit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "word " * 60
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n" * 4))
    outcome = lowbit("chat", model, "--max-tokens", 2, "--context", 256)
    assert outcome.status == 0
    assert "the oldest message is forgotten" in outcome.err
    assert outcome.err.count("tokens/s]") == 4


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_cannot_be_loaded(verb: str, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    prompt = ("x",) if verb == "generate" else ()
    text = tmp_path / "notes.gguf.txt"
    text.write_text("hello")
    empty = tmp_path / "empty.gguf"
    write_gguf(empty, {"general.architecture": "llama"}, [], [])
    encoder = tmp_path / "encoder.gguf"
    write_gguf(encoder, {"general.architecture": "bert"}, [], [])
    for path, message in (
        (text, "not a GGUF file"),
        (tmp_path / "absent.gguf", "no such file"),
        (DEMO, "lowbit convert"),
        (empty, "llama.cpp cannot load it"),
        (encoder, "cannot generate"),
    ):
        outcome = lowbit(verb, path, *prompt)
        assert outcome.status == 2
        assert outcome.err.startswith("lowbit: error: ")
        assert message in outcome.err
        assert outcome.err.count("\n") == 1


def test_prompts_and_settings_that_cannot_work(model: Path, lowbit: Callable[..., Any]) -> None:
    for arguments, message in (
        ((" ",), "the prompt is empty"),
        (("word " * 400, "--context", 256), "tokens and the context 256"),
        (("x", "--top-p", 2), "top-p 2.0"),
        (("x", "--temperature", "nan"), "--temperature"),
        (("x", "--seed", 2**32), "--seed"),
        (("x", "--max-tokens", 0), "--max-tokens"),
    ):
        outcome = lowbit("generate", model, *arguments)
        assert (outcome.status, outcome.out) == (2, "")
        assert message in outcome.err
        assert outcome.err.count("\n") == 1


def test_without_the_wheel(model: Path, lowbit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    outcome = lowbit("chat", model)
    assert outcome.status == 2
    assert "pip install 'lowbit[llama-cpp]'" in outcome.err
