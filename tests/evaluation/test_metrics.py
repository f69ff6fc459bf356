"""Oracles: float64 arithmetic over full logits, and transformers' own loss on a tiny random Llama."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.errors import CalibrationError, NumericsError, UsageError
from lowbit.evaluation.metrics import HISTOGRAM_EDGES, Prediction, TokenScores, Windows, cut_windows


def naive_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(reference.double(), -1)
    q = torch.softmax(candidate.double(), -1)
    return torch.xlogy(p, p).sum(-1) - torch.xlogy(p, q).sum(-1)


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 10.0, 60.0])
def test_divergence_keeps_its_digits_at_every_distance(distance: float) -> None:
    torch.manual_seed(0)
    reference = 5 * torch.randn(20, 3000)
    candidate = reference + distance * torch.randn(20, 3000)
    actual = Prediction.of(reference, "r").divergence_of(Prediction.of(candidate, "c"))
    torch.testing.assert_close(actual.double(), naive_divergence(reference, candidate), rtol=2e-3, atol=1e-12)


def test_divergence_of_equal_and_of_impossible_predictions() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [200.0, -200.0, 0.0]])
    same = Prediction.of(logits, "a")
    assert same.divergence_of(same).tolist() == [0.0, 0.0]
    flat = Prediction.of(torch.zeros(2, 3), "b")
    torch.testing.assert_close(same.divergence_of(flat).double(), naive_divergence(logits, torch.zeros(2, 3)))
    assert flat.divergence_of(same)[0] == math.inf
    assert flat.divergence_of(same)[1] == pytest.approx(200.0 - math.log(3), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0.0, 30.0), st.integers(2, 40))
def test_divergence_is_never_negative_and_matches_float64(seed: int, distance: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = 10 * torch.randn(4, vocabulary, generator=generator)
    candidate = reference + distance * torch.randn(4, vocabulary, generator=generator)
    actual = Prediction.of(reference, "r").divergence_of(Prediction.of(candidate, "c"))
    assert bool((actual >= 0).all())
    torch.testing.assert_close(actual.double(), naive_divergence(reference, candidate), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(NumericsError, match="candidate"):
        Prediction.of(torch.tensor([[0.0, bad]]), "candidate")


@settings(deadline=None)
@given(st.integers(2, 70), st.integers(2, 20), st.one_of(st.none(), st.integers(1, 20)), st.booleans())
def test_windows_score_each_token_once_in_its_own_context(
    tokens: int, seq_len: int, stride: int | None, lead: bool
) -> None:
    if stride is not None and stride > seq_len:
        return
    ids, bos = torch.arange(100, 100 + tokens), 7 if lead else None
    windows = cut_windows(ids, seq_len, stride=stride, bos=bos)
    scored = windows.ids[windows.counted].tolist()
    assert scored == sorted(set(scored)), "in order, no token twice"
    if lead and (stride is None or stride < seq_len):
        assert scored == ids.tolist()
    elif stride is not None and stride < seq_len:
        assert scored == ids.tolist()[1:]
    for row, counted in zip(windows.ids.tolist(), windows.counted.tolist(), strict=True):
        assert not counted[0]
        text = [token for token in row if token >= 100]
        assert text == list(range(text[0], text[0] + len(text))), "a window is a piece of the text"
        if bos is not None and stride is None:
            assert row[0] == bos


def test_windows_that_cannot_work() -> None:
    with pytest.raises(CalibrationError, match="1 tokens"):
        cut_windows(torch.tensor([5]), 8)
    with pytest.raises(CalibrationError):
        cut_windows(torch.tensor([], dtype=torch.int64), 8, bos=1)
    with pytest.raises(UsageError, match="--seq-len"):
        cut_windows(torch.arange(9), 1)
    with pytest.raises(UsageError, match="--stride"):
        cut_windows(torch.arange(9), 4, stride=5)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def scores_of(model: LlamaForCausalLM, windows: Windows, chunk: int) -> TokenScores:
    scores = TokenScores(windows)
    with torch.no_grad():
        logits = model(windows.ids).logits[:, :-1][windows.counted[:, 1:]]
    for part in logits.split(chunk):
        scores.add(Prediction.of(part, "llama"))
    assert scores.filled == windows.tokens
    return scores


@pytest.mark.parametrize(("stride", "seq_len"), [(8, 24), (1, 24), (23, 24), (24, 24), (5, 64)])
def test_sliding_perplexity_against_transformers_loss(llama: LlamaForCausalLM, stride: int, seq_len: int) -> None:
    ids = torch.randint(0, 97, (131,), generator=torch.Generator().manual_seed(1))
    losses, previous_end = [], 0  # the loop of the Hugging Face guide, each window weighed by its scored tokens
    for begin in range(0, len(ids), stride):
        end = min(begin + seq_len, len(ids))
        window, labels = ids[begin:end][None], ids[begin:end][None].clone()
        labels[:, : end - begin - (end - previous_end)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                losses += [(float(llama(window, labels=labels).loss), count)]
        previous_end = end
        if end == len(ids):
            break
    expected = math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
    windows = cut_windows(ids, seq_len, stride=stride)
    assert windows.tokens == sum(count for _, count in losses)
    assert scores_of(llama, windows, 13).perplexity().value == pytest.approx(expected, rel=1e-5)


def test_disjoint_perplexity_against_transformers_loss(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 97, (100,), generator=torch.Generator().manual_seed(2))
    total, count = 0.0, 0
    for start in range(0, 100, 15):
        window = torch.cat([torch.tensor([1]), ids[start : start + 15]])[None]
        with torch.no_grad():
            total += float(llama(window, labels=window).loss) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    windows = cut_windows(ids, 16, bos=1)
    assert windows.tokens == count == 100
    assert scores_of(llama, windows, 7).perplexity().value == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.fixture
def pair() -> tuple[TokenScores, TokenScores, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    windows = cut_windows(torch.randint(0, 50, (200,), generator=generator), 40)
    reference = 3 * torch.randn(windows.tokens, 50, generator=generator)
    candidate = reference + torch.randn(windows.tokens, 50, generator=generator)
    first, second = TokenScores(windows), TokenScores(windows, divergence=True)
    for one, other in zip(reference.split(17), candidate.split(17), strict=True):
        prediction = Prediction.of(one, "r")
        first.add(prediction)
        second.add(Prediction.of(other, "c"), prediction)
    return first, second, reference, candidate


Pair = tuple[TokenScores, TokenScores, torch.Tensor, torch.Tensor]


def test_summaries_against_float64(pair: Pair) -> None:
    first, second, reference, candidate = pair
    divergence = naive_divergence(reference, candidate)
    spread = second.spread()
    assert spread.mean.value == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert spread.median == pytest.approx(float(divergence.quantile(0.5)), rel=1e-4)
    assert spread.p99 == pytest.approx(float(divergence.quantile(0.99)), rel=1e-4)
    assert spread.maximum == pytest.approx(float(divergence.max()), rel=1e-4)
    agreement = (reference.argmax(-1) == candidate.argmax(-1)).double().mean()
    assert second.agreement(first).value == pytest.approx(float(agreement))
    ratio = second.perplexity().value / first.perplexity().value
    assert second.perplexity_ratio(first).value == pytest.approx(ratio)
    assert second.worst(3) == divergence.argsort(descending=True)[:3].tolist()


def test_standard_error_is_clustered_by_window(pair: Pair) -> None:
    _, second, _, _ = pair
    values = torch.randn(195, dtype=torch.float64)
    whole = values.mean()
    clusters = [float((part - whole).sum()) for part in values.split(39)]
    expected = math.sqrt(5 / 4 * sum(cluster**2 for cluster in clusters)) / 195
    assert second.mean(values).standard_error == pytest.approx(expected)
    single = TokenScores(cut_windows(torch.arange(40), 40))
    values = torch.randn(39, dtype=torch.float64)
    assert single.mean(values).standard_error == pytest.approx(float(values.std()) / math.sqrt(39))


def test_histogram_and_positions_keep_every_token(pair: Pair) -> None:
    _, second, reference, candidate = pair
    divergence = naive_divergence(reference, candidate)
    counts = second.histogram()
    assert sum(counts) == 195
    for low, high, count in zip(HISTOGRAM_EDGES, HISTOGRAM_EDGES[1:], counts, strict=False):
        assert count == int(((divergence >= low) & (divergence < high)).sum())
    bins = second.by_position(8)
    assert sum(count for _, _, count in bins) == 195
    first = divergence.reshape(5, 39)[:, :5]
    assert bins[0] == (3.0, pytest.approx(float(first.mean()), rel=1e-4), 25)


def test_divergence_is_asked_of_a_run_without_reference() -> None:
    with pytest.raises(UsageError, match="reference"):
        TokenScores(cut_windows(torch.arange(40), 40)).spread()
