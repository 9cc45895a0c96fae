"""evaluate.py against naive loops over positions, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from effllm.errors import CalibrationError
from effllm.hf.evaluate import compare, perplexity, score
from tests.hf.tiny import tiny_llama


@pytest.fixture(scope="module")
def pair():
    dense = tiny_llama(torch.float32)
    other = tiny_llama(torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    windows = torch.randint(0, 64, (3, 150), generator=torch.Generator().manual_seed(3))
    return dense, other, windows


def naive(model, dense, windows):
    nll, kl, same, count = 0.0, 0.0, 0, 0
    for ids in windows:
        with torch.no_grad():
            a, b = (m(input_ids=ids[None], use_cache=False).logits[0].double() for m in (model, dense))
        for t in range(len(ids) - 1):
            p, q = torch.softmax(a[t], 0), torch.softmax(b[t], 0)
            nll -= math.log(p[ids[t + 1]])
            kl += float((q * (q / p).log()).sum())
            same += int(p.argmax() == q.argmax())
            count += 1
    return {"perplexity": math.exp(nll / count), "kl": kl / count, "top1_agreement": same / count, "tokens": count}


def test_compare_equals_a_loop_over_positions(pair):
    dense, other, windows = pair
    want, got = naive(other, dense, windows), compare(other, dense, windows)
    assert got["tokens"] == want["tokens"] == 3 * 149
    assert got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-5)
    assert got["kl"] == pytest.approx(want["kl"], rel=1e-3)
    assert want["kl"] > 1e-3
    assert got["top1_agreement"] == want["top1_agreement"] < 1


def test_dense_against_itself_is_neutral(pair):
    dense, _, windows = pair
    got = compare(dense, dense, windows)
    assert got["kl"] == 0 and got["top1_agreement"] == 1
    assert got["perplexity"] == perplexity(dense, windows)


def test_several_models_score_as_each_alone(pair):
    dense, other, windows = pair
    ticks = []
    both = score({"a": other, "b": dense}, dense, windows, lambda: ticks.append(1))
    assert both["a"] == compare(other, dense, windows) and both["b"] == compare(dense, dense, windows)
    assert len(ticks) == len(windows)


def test_each_window_is_scored_alone(pair):
    _, other, windows = pair
    logs = [math.log(perplexity(other, w[None])) for w in windows]
    assert math.log(perplexity(other, windows)) == pytest.approx(sum(logs) / 3, rel=1e-6)


def test_no_window_is_an_error(pair):
    with pytest.raises(CalibrationError, match="E-CAL-SHORT"):
        perplexity(pair[0], [])
