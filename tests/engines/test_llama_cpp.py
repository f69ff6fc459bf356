"""The llama.cpp engine on the demo model, held to transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs.gguf.architectures import export_plan, load_tensor
from lowbit.codecs.gguf.vocabulary import vocabulary_metadata
from lowbit.codecs.gguf.writing import TensorHeader, write_gguf
from lowbit.codecs.reading import module_plan
from lowbit.engines.llama_cpp import ContextError, LlamaCpp, Sampling
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.formats.ggml.types import GGML_TYPES

pytest.importorskip("xllamacpp")
DEMO = Path(__file__).parents[2] / "src" / "lowbit" / "demo" / "model"
PROMPT = "def main(argv):\n    parser = argparse."


@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in F32."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    with open_checkpoint(DEMO) as checkpoint:
        modules = module_plan(checkpoint)
        plan = export_plan(checkpoint, modules)
        headers = [TensorHeader(tensor.name, GGML_TYPES["F32"], tensor.shape) for tensor in plan.tensors]
        vocabulary = vocabulary_metadata(DEMO, plan.tensors[0].shape[0], checkpoint.config)
        write_gguf(
            path,
            {**plan.metadata, **vocabulary},
            headers,
            (load_tensor(checkpoint, modules, tensor).float().numpy() for tensor in plan.tensors),
        )
    return path


@pytest.fixture(scope="module")
def engine(demo_gguf: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(demo_gguf, context=512, threads=1, precise=True) as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def test_greedy_tokens_and_their_probabilities_are_those_of_transformers(engine: LlamaCpp, reference: Any) -> None:
    prompt = AutoTokenizer.from_pretrained(DEMO)(PROMPT)["input_ids"]
    found = engine.greedy(prompt, 24, top=5)
    assert len(found) == 24
    ids = [*prompt, *(token.id for token in found)]
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0], dim=-1)[len(prompt) - 1 : -1]
    for token, row in zip(found, logprobs, strict=True):
        assert token.id == int(row.argmax())
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert set(token.top) == set(row.topk(5).indices.tolist())
        for id, logprob in token.top.items():
            assert logprob == pytest.approx(float(row[id]), abs=1e-4)


def test_greedy_goes_on_after_the_end_of_a_text(engine: LlamaCpp) -> None:
    prompt = engine.tokenize("x = 1\n")
    alone = engine.greedy(prompt, 60)
    assert len(alone) == 60


def test_generation_streams_what_it_returns(engine: LlamaCpp) -> None:
    pieces: list[str] = []
    result = engine.generate(PROMPT, max_tokens=16, sampling=Sampling(temperature=0), show=pieces.append)
    assert "".join(pieces) == result.text
    assert len(pieces) > 1
    assert (result.tokens, result.stop) == (16, "limit")
    assert result.prompt_tokens == len(engine.tokenize(PROMPT))
    assert result.tokens_per_second > 0
    ids = [token.id for token in engine.greedy(engine.tokenize(PROMPT), 16)]
    assert AutoTokenizer.from_pretrained(DEMO).decode(ids) == result.text


def test_a_seed_repeats_a_text(engine: LlamaCpp) -> None:
    texts = {engine.generate(PROMPT, max_tokens=12, sampling=Sampling(1.0, 1.0, seed)).text for seed in (7, 7, 8)}
    assert len(texts) == 2


def test_a_chat_goes_through_the_models_template(engine: LlamaCpp) -> None:
    messages = [{"role": "user", "content": "print the numbers"}]
    rendered = AutoTokenizer.from_pretrained(DEMO).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    answer = engine.chat(messages, max_tokens=8, sampling=Sampling(temperature=0))
    ids = AutoTokenizer.from_pretrained(DEMO)(rendered, add_special_tokens=False)["input_ids"]
    assert answer.prompt_tokens == len(ids)
    assert answer.text == engine.generate(ids, max_tokens=8, sampling=Sampling(temperature=0)).text


def test_prompts_that_cannot_work(engine: LlamaCpp) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.generate("", max_tokens=4)
    with pytest.raises(ContextError, match=r"600 tokens and the context 512"):
        engine.generate([5] * 600, max_tokens=4)
    with pytest.raises(ContextError, match="raise --context"):
        engine.chat([{"role": "user", "content": "word " * 900}], max_tokens=4)
    with pytest.raises(UsageError, match="temperature"):
        engine.generate("x", max_tokens=4, sampling=Sampling(temperature=-1))


def test_a_stopped_stream_leaves_the_engine_usable(engine: LlamaCpp) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, max_tokens=400, show=interrupt)
    assert engine.generate(PROMPT, max_tokens=2).tokens == 2


def test_files_that_are_no_models(tmp_path: Path, demo_gguf: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        LlamaCpp(text)
    with pytest.raises(CheckpointError, match="no such file"):
        LlamaCpp(tmp_path / "absent.gguf")
    with pytest.raises(UsageError, match=r"lowbit convert .* model\.gguf"):
        LlamaCpp(DEMO)
    truncated = tmp_path / "half.gguf"
    truncated.write_bytes(demo_gguf.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"half\.gguf"):
        LlamaCpp(truncated)


def test_what_llama_cpp_says_of_a_model_it_refuses(tmp_path: Path, demo_gguf: Path) -> None:
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(demo_gguf.read_bytes().replace(b"gpt-2", b"gpt-x", 1))
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer type: 'gpt-x'"):
        LlamaCpp(changed)


OPENED_AND_CLOSED = """
import sys
from lowbit.engines.llama_cpp import LlamaCpp
for _ in range(30):
    LlamaCpp(sys.argv[1], context=64, threads=1).close()
"""


def test_closed_as_soon_as_it_is_open(demo_gguf: Path) -> None:
    """llama.cpp's server, destroyed before its loop began, waits for ever: one time in a hundred on a busy machine."""
    subprocess.run([sys.executable, "-c", OPENED_AND_CLOSED, str(demo_gguf)], timeout=300, check=True)


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch, demo_gguf: Path) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lowbit\[llama-cpp\]'"):
        LlamaCpp(demo_gguf)
