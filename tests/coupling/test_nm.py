"""Orders for N:M masks: known optima, legality, never worse, the same by seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.coupling import Structure, improve_nm
from effllm.coupling.nm import _Table, kept
from effllm.errors import CouplingError


def scores(rows, channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, generator=g) * torch.rand(channels, generator=g).exp() ** 3


def test_two_large_per_group_is_found():
    s = torch.full((10, 16), 0.01)
    s[:, :8] = 1.0
    found = improve_nm([s], 2, 4, Structure(16))
    assert found.before == pytest.approx((40 + 40 * 0.01) / (80 + 0.8))
    assert found.after == pytest.approx(80 / 80.8)
    assert found.gain == pytest.approx(found.after - found.before) and found.stopped == "settled"
    assert sorted((found.permutation < 8).reshape(4, 4).sum(1).tolist()) == [2, 2, 2, 2]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_eight_channels_are_as_good_as_all_35_partitions(n, seed):
    s = scores(7, 8, seed)
    best = max(kept(s[:, [0, *first, *(c for c in range(8) if c and c not in first)]], n, 4) for first in itertools.combinations(range(1, 8), 3))
    found = improve_nm([s], n, 4, Structure(8), seed=seed)
    assert found.after * float(s.double().sum()) == pytest.approx(best, rel=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (6, 8), (1, 2)]), st.integers(2, 4), st.sampled_from([(), (2,), (3, 2)]))
@settings(max_examples=25, deadline=None)
def test_legal_and_never_worse(seed, pattern, groups, blocks):
    (n, m), size = pattern, groups * pattern[1]
    structure = Structure(size, blocks)
    channels = size * torch.Size(blocks).numel()
    parts = [scores(5, channels, seed), scores(9, channels, seed + 1)]
    found = improve_nm(parts, n, m, structure, seed=seed, escapes=1)
    rows = structure.check(found.permutation)
    assert tuple(found.permutation.shape) == structure.shape
    permuted = [p.reshape(len(p), -1, size).gather(2, rows[None].expand(len(p), -1, -1)).reshape(len(p), -1) for p in parts]
    total = sum(float(p.double().sum()) for p in parts)
    assert sum(kept(p, n, m) for p in permuted) / total == pytest.approx(found.after, rel=1e-6)
    assert found.after >= found.before and found.gain >= 0


def test_more_time_and_more_escapes_are_never_worse():
    s = scores(40, 64)
    gains = [improve_nm([s], 2, 4, Structure(64), escapes=e).gain for e in (0, 2, 8)]
    assert gains == sorted(gains) and gains[0] > 0.01


def test_same_seed_same_order():
    s = scores(40, 64)
    a, b = (improve_nm([s], 2, 4, Structure(64), seed=3, sample=16) for _ in range(2))
    assert torch.equal(a.permutation, b.permutation) and a[1:] == b[1:]
    # another seed looks at other rows
    assert not torch.equal(a.permutation, improve_nm([s], 2, 4, Structure(64), seed=4, sample=16).permutation)


def test_a_sample_of_rows_decides_but_all_rows_judge():
    s = scores(300, 32)
    found = improve_nm([s], 2, 4, Structure(32), sample=16)
    assert found.gain >= 0
    assert found.after == pytest.approx(kept(s[:, found.permutation], 2, 4) / float(s.double().sum()), rel=1e-6)


def test_nothing_to_gain_is_the_identity():
    for s, n, m in ((torch.ones(3, 8), 2, 4), (scores(3, 8), 4, 4), (scores(3, 8), 2, 8), (torch.zeros(3, 8), 2, 4)):
        found = improve_nm([s], n, m, Structure(8))
        assert found.permutation.tolist() == list(range(8)) and found.gain == 0


def test_out_of_time_is_said():
    found = improve_nm([scores(64, 256)], 2, 4, Structure(256), budget_s=0)
    assert found.stopped == "budget" and found.gain >= 0


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (5, 8)])
def test_the_table_of_gains_is_what_a_swap_gains(n, m):
    s = scores(6, 4 * m).double()
    table = _Table(s, n, m)
    for i, j in ((0, m), (1, 2 * m), (m + 1, 3 * m + 1)):
        order = list(range(4 * m))
        order[i], order[j] = order[j], order[i]
        gain = table.value[i, j] + table.value[j, i] - table.group[i // m] - table.group[j // m]
        assert float(gain) == pytest.approx(kept(s[:, order], n, m) - kept(s, n, m), abs=1e-12)
    # and so it is after an update of two groups
    head = torch.randperm(2 * m, generator=torch.Generator().manual_seed(0))
    columns = s[:, torch.cat((head, torch.arange(2 * m, 4 * m)))]
    table.update(columns, torch.tensor([0, 1]))
    torch.testing.assert_close(table.value, _Table(columns, n, m).value)


@pytest.mark.parametrize(
    ("parts", "n", "m", "size", "code"),
    [
        ([torch.ones(2, 8)], 5, 4, 8, "E-CPL-PATTERN"),
        ([torch.ones(2, 8)], 0, 4, 8, "E-CPL-PATTERN"),
        ([torch.ones(2, 6)], 2, 4, 6, "E-CPL-PATTERN"),
        ([torch.ones(2, 8)], 2, 4, 16, "E-CPL-SCORE"),
        ([], 2, 4, 8, "E-CPL-SCORE"),
        ([-torch.ones(2, 8)], 2, 4, 8, "E-CPL-SCORE"),
        ([torch.full((2, 8), float("nan"))], 2, 4, 8, "E-CPL-SCORE"),
    ],
)
def test_bad_input(parts, n, m, size, code):
    with pytest.raises(CouplingError) as caught:
        improve_nm(parts, n, m, Structure(size))
    assert caught.value.code == code
