"""A pattern per block: whole numbers that meet the total, by spectrum, by global magnitude, up to a knee; and the recipe's way to them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import effllm
from effllm.errors import CalibrationError, EffllmError
from effllm.solvers.nm import layerwise
from effllm.solvers.nm.layerwise import per_module, whole
from tests.models import Tied

_SHARES = st.lists(st.tuples(st.floats(0, 0.998), st.integers(1, 50)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(_SHARES, st.sampled_from([(2, 4), (4, 8), (6, 8), (1, 4), (8, 16)]))
def test_the_total_is_met(blocks: list[tuple[float, int]], pattern: tuple[int, int]) -> None:
    n, m = pattern
    shares = {str(i): share for i, (share, _) in enumerate(blocks)}
    sizes = {str(i): size * 64 for i, (_, size) in enumerate(blocks)}
    found = whole(shares, sizes, n, m)
    assert all(1 <= x <= m for x in found.values())
    off = sum(found[b] * sizes[b] for b in found) - n * sum(sizes.values())
    free = [sizes[b] for b in found if (found[b] < m if off < 0 else found[b] > 1)]
    assert 2 * abs(off) <= min(free, default=2 * abs(off))  # no single step comes nearer


@settings(max_examples=30, deadline=None)
@given(_SHARES)
def test_who_loses_more_keeps_no_more(blocks: list[tuple[float, int]]) -> None:
    shares = {str(i): share for i, (share, _) in enumerate(blocks)}
    found = whole(shares, dict.fromkeys(shares, 64), 4, 8)
    order = sorted(shares, key=lambda b: shares[b])
    assert all(found[a] >= found[b] for a, b in pairwise(order) if shares[a] < shares[b] - 1e-9)


def stack(scale: float = 1.0) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Four blocks; the weights of the last one are `scale` times as large."""
    torch.manual_seed(0)
    model = Tied(blocks=4)
    with torch.no_grad():
        for p in model.blocks[3].parameters():
            p.mul_(scale)
    return model, {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")}


def test_uniform_is_the_pattern() -> None:
    model, linears = stack()
    found, note = per_module(model, linears, 2, 4, "uniform")
    assert set(found.values()) == {2} and note == "uniform: 4 blocks 2:4"


def test_global_magnitude_spares_large_weights() -> None:
    model, linears = stack(1000.0)
    found, note = per_module(model, linears, 4, 8, "essential")
    kept = {n.split(".")[1]: x for n, x in found.items()}
    assert kept["3"] == 8 and all(kept[b] < 4 for b in "012") and sum(kept.values()) == 16
    assert note.startswith("essential: 1 blocks 8:8")


def test_spectra_with_heavy_tails_are_spared() -> None:
    model, linears = stack()
    u, _, v = torch.linalg.svd(torch.randn(64, 64))
    with torch.no_grad():
        for name, module in linears.items():
            if name.startswith("blocks.1."):  # a power law: heavy tail, low exponent
                s = torch.arange(1, 65).float() ** -1.5
                wide = (u * s) @ v
                module.weight.copy_(wide.repeat(2, 2)[: module.weight.shape[0], : module.weight.shape[1]])
    found, _ = per_module(model, linears, 8, 16, "farms")
    kept = {n.split(".")[1]: x for n, x in found.items()}
    assert kept["1"] > max(kept[b] for b in "023") and sum(kept.values()) == 32


def test_the_knee_bounds_the_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    model, linears = stack()
    weights = copy.deepcopy(model.state_dict())
    losses = iter([1.0, 1.01, 1.02, 1.03, 3.0, 9.0])  # 8:8 ... 3:8
    monkeypatch.setattr(layerwise, "_loss", lambda *_: next(losses))
    found, note = per_module(model, linears, 3, 8, "knee", torch.randint(48, (2, 16)))
    assert sum(found.values()) == 5 * len(found) and "knee at 5:8" in note and "4:8 3.00" in note
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_the_loss_is_that_of_the_masked_model() -> None:
    model, linears = stack(5.0)
    ids = torch.randint(48, (2, 16))
    found, note = per_module(model, linears, 1, 4, "knee", ids)
    masked = copy.deepcopy(model)
    effllm.compress(masked, {"rules": [{"match": "blocks.*", "method": "nm", "pattern": "1:4", "solver": "magnitude"}]})
    with torch.no_grad():
        loss = nn.functional.cross_entropy(masked(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert f"1:4 {float(loss):.2f}" in note and set(found) == set(linears)


@pytest.mark.parametrize("ratios", ["farms", "essential", "knee"])
def test_recipes_reach_it(ratios: str) -> None:
    model, _ = stack(1000.0)
    rule = {"match": "blocks.*", "method": "nm", "pattern": "4:8", "solver": "wanda", "ratios": ratios}
    report = effllm.compress(model, {"rules": [rule]}, torch.randint(48, (4, 32)))
    (decision,) = [d for d in report.decisions if d.code == "ratios"]
    assert decision.reason.split("; ")[-1].startswith(f"{ratios}: ")
    patterns = {d.module: d.config["pattern"] for d in report.applied if d.module}
    dense = [d.module for d in report.decisions if d.code == "dense-ratio"]
    assert len(patterns) + len(dense) == 12
    if ratios == "essential":
        assert sorted(dense) == ["blocks.3.k", "blocks.3.o", "blocks.3.q"] and isinstance(model.blocks[3].q, nn.Linear)
    for name, pattern in patterns.items():
        keep, of = map(int, pattern.split(":"))
        w = model.get_submodule(name).weight.dense()
        assert int((w != 0).view(w.shape[0], -1, of).sum(-1).amax()) <= keep


def test_bad_input_is_named() -> None:
    model, linears = stack()
    with pytest.raises(CalibrationError, match="E-CAL-NONE"):
        per_module(model, linears, 2, 4, "knee")
    with pytest.raises(CalibrationError, match="E-CAL-FORM"):
        per_module(model, linears, 1, 4, "knee", [torch.randn(1, 8, 64)])
    with pytest.raises(EffllmError, match="E-RCP-VALUE"):
        effllm.compress(model, "nm(pattern=2:4, ratios=owl)")
    empty, own = stack(1e-6)
    with pytest.raises(EffllmError, match="E-RCP-RATIO"):
        per_module(empty, own, 1, 16, "essential")
