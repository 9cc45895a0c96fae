"""Evict-then-merge: scores against the whole matrix, bias of the causal mask, identities of the compression."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.solvers.kv import evict

B, H, G, T, D = 2, 4, 2, 96, 16


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, T, D, generator=g) for n in (H, G, G))  # type: ignore[return-value]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("kind", evict.GLOBAL)
def test_scores_against_the_matrix(padding: int, kind: str) -> None:
    q, k, _ = inputs()
    real = torch.ones(B, T, dtype=torch.bool)
    real[0, :padding] = False
    wide, local = evict.attention_scores(q, k, 0.25, window=8, kind=kind, mask=real, block=20)
    for b in range(B):
        first = padding if b == 0 else 0
        s = q[b].double() @ k[b].double().repeat_interleave(H // G, 0).mT * 0.25
        a = torch.softmax(s[:, first:, first:].masked_fill(torch.ones(T - first, T - first).triu(1).bool(), -torch.inf), -1)
        a = a.unflatten(0, (G, -1)).sum(1)
        n = T - first
        expected = (a * torch.arange(1, n + 1)[:, None]).sum(1) / n if kind == "flat" else a.sum(1) / torch.arange(n, 0, -1)
        torch.testing.assert_close(wide[b, :, first:].double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(local[b, :, first:].double(), a[:, -8:].mean(1), rtol=1e-4, atol=1e-6)
        assert (wide[b, :, :first] == 0).all() and (local[b, :, :first] == 0).all()


def test_bias_of_the_causal_mask() -> None:
    t = 128
    q, k = torch.zeros(1, 1, t, 8), torch.zeros(1, 1, t, 8)  # uniform attention 1 / (j + 1)
    visible, _ = evict.attention_scores(q, k, 1.0, window=8)
    flat, _ = evict.attention_scores(q, k, 1.0, window=8, kind="flat")
    harmonic = sum(1 / j for j in range(1, t + 1))
    raw = (visible * torch.arange(t, 0, -1))[0, 0]
    assert float(raw[0] / raw[-1]) == pytest.approx(t * harmonic, rel=1e-4)
    assert float(visible[0, 0, 0] / visible[0, 0, -1]) == pytest.approx(harmonic, rel=1e-4) and harmonic < 1 + math.log(t)
    torch.testing.assert_close(flat[0, 0] * t, torch.arange(t, 0, -1.0), rtol=1e-4, atol=1e-4)


def score_of(q: Tensor, k: Tensor) -> Tensor:
    return evict.combine(*evict.attention_scores(q, k, D**-0.5, window=16))


def test_combine() -> None:
    wide, local = torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(1)), torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(2))
    smooth = torch.stack([local[0, 0, max(0, i - 2) : i + 3].mean() for i in range(50)])
    aligned = wide[0, 0] * smooth.mean() / wide.mean()
    torch.testing.assert_close(evict.combine(wide, local)[0, 0], torch.maximum(aligned, smooth))
    torch.testing.assert_close(evict.combine(wide, local, how="sum")[0, 0], aligned + smooth)
    assert evict.combine(torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)).isfinite().all()


def test_budget_that_holds_everything_changes_nothing() -> None:
    q, k, v = inputs()
    for budget in (T, T + 5):
        kept = evict.compress(k, v, score_of(q, k), budget=budget, window=16)
        assert kept.keys is k and kept.values is v and torch.equal(kept.positions[1, 1], torch.arange(T)) and (kept.weight == 0).all()


def test_pure_eviction_by_score() -> None:
    q, k, v = inputs()
    score = score_of(q, k)
    kept = evict.compress(k, v, score, budget=40, window=16, sinks=2, threshold=math.inf)
    for b in range(B):
        for g in range(G):
            middle = score[b, g, 2 : T - 16].topk(40 - 18).indices + 2
            expected = torch.cat((torch.arange(2), middle.sort().values, torch.arange(T - 16, T)))
            assert torch.equal(kept.positions[b, g], expected)
            assert torch.equal(kept.keys[b, g], k[b, g, expected]) and torch.equal(kept.values[b, g], v[b, g, expected])


def dense(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    s = q @ k.mT * D**-0.5
    return torch.softmax(s if weight is None else s + weight[..., None, :], -1) @ v


@pytest.mark.parametrize("merge_keys", [True, False])
def test_duplicates_merge_exactly_with_their_weight(merge_keys: bool) -> None:
    _, k, v = (t.double() for t in inputs(3))
    score = torch.ones(B, G, T, dtype=torch.float64)
    k[:, :, 10], v[:, :, 10] = k[:, :, 5], v[:, :, 5]
    score[..., 10] = 0.5  # the one token too many; equal attention would be 1.0, and the weight says what share it stands for
    kept = evict.compress(k, v, score, budget=T - 1, window=16, sinks=0, centres=1.0, threshold=0.999, merge_keys=merge_keys, weighted=True)
    assert 10 not in kept.positions[0, 0] and kept.weight[0, 0, 5] == pytest.approx(math.log(1.5), rel=1e-6)
    score[..., 10] = 1 - 1e-9
    kept = evict.compress(k, v, score, budget=T - 1, window=16, sinks=0, centres=1.0, threshold=0.999, merge_keys=merge_keys, weighted=True)
    q = torch.randn(B, G, 3, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    true = dense(q, k, v)
    assert float((dense(q, kept.keys, kept.values, kept.weight) - true).abs().max()) < 1e-6
    assert float((dense(q, kept.keys, kept.values) - true).abs().max()) > 1e-3


def test_opposites_are_not_alike() -> None:
    k, v = torch.randn(2, 1, 1, 3, D, generator=torch.Generator().manual_seed(6))
    assert (evict.redundancy(-k, -v, k, v).diagonal(dim1=-2, dim2=-1) == 0).all()  # the raw product would be 1
    torch.testing.assert_close(evict.redundancy(k, v, k, v).diagonal(dim1=-2, dim2=-1), torch.ones(1, 1, 3))


def test_merging_moves_values_alone_unless_asked_and_keeps_norms() -> None:
    q, k, v = inputs(4)
    score = score_of(q, k)
    plain = evict.compress(k, v, score, budget=40, window=16, threshold=math.inf)
    values = evict.compress(k, v, score, budget=40, window=16, threshold=0.0)
    both = evict.compress(k, v, score, budget=40, window=16, threshold=0.0, merge_keys=True)
    assert torch.equal(values.keys, plain.keys) and not torch.equal(values.values, plain.values)
    assert not torch.equal(both.keys, plain.keys)
    torch.testing.assert_close(both.keys.norm(dim=-1), plain.keys.norm(dim=-1))
    assert torch.equal(values.positions, plain.positions)
    for made in (values, both):  # the window stays as it is
        assert torch.equal(made.values[:, :, -16:], v[:, :, -16:]) and torch.equal(made.keys[:, :, -16:], k[:, :, -16:])


def test_heads_do_not_mix() -> None:
    q, k, v = inputs(5)
    score = score_of(q, k)
    a = evict.compress(k, v, score, budget=40, window=16, threshold=0.1, merge_keys=True, weighted=True)
    b = evict.compress(k.flip(1), v.flip(1), score.flip(1), budget=40, window=16, threshold=0.1, merge_keys=True, weighted=True)
    for x, y in zip((a.keys, a.values, a.positions, a.scores, a.weight), (b.keys, b.values, b.positions, b.scores, b.weight), strict=True):
        assert torch.equal(x.flip(1), y)


def test_bad_input() -> None:
    q, k, v = inputs()
    with pytest.raises(CacheError, match="E-KVC-BUDGET"):
        evict.compress(k, v, score_of(q, k), budget=30, window=32)
    s = k[..., 0]
    for call in (lambda: evict.attention_scores(q, k, 1.0, window=4, kind="x"), lambda: evict.combine(s, s, how="x"), lambda: evict.combine(s, s, pool=4)):
        with pytest.raises(CacheError, match="E-KVC-SCORE"):
            call()
