"""The format of weights with thresholds: exact values, bytes, both layouts and back, and damage that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from effllm.errors import CheckpointError
from effllm.recipe import Recipe
from effllm.runtime.formats import dense, thresholded
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights import make
from effllm.solvers import solve

N, K = 40, 70


def weight(bits: int = 0) -> Packed:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return solve(w, Recipe.parse(f"bipolar(bits={bits})").rules[-1].params) if bits else dense.make(w)


def packed(bits: int = 0, side: str = "in", rank: int = 0) -> Packed:
    u, v = (torch.randn(N, rank), torch.randn(rank, K)) if rank else (None, None)
    norm = torch.rand(K) if rank and not bits else None
    threshold = None if side == "out" else torch.rand(K if bits else 1)
    return thresholded.make(weight(bits), threshold, colnorm=norm, u=u, v=v, side=side, method="teal", target=0.5, realised=0.49)


CASES: list[dict[str, Any]] = [{}, {"rank": 3}, {"bits": 4}, {"bits": 4, "rank": 3}, {"side": "out"}, {"bits": 3, "side": "out"}]


@pytest.mark.parametrize("case", CASES)
def test_layouts_give_the_weight_back(case: dict[str, Any]) -> None:
    p = packed(**case)
    held = make(p)
    back = held.packed()
    assert back.attrs == p.attrs and back.tensors.keys() == p.tensors.keys()
    bits = case.get("bits", 0)
    assert torch.equal(thresholded.unpack(back), thresholded.unpack(p)) and torch.equal(held.dense(), held.dense())
    for key in ("threshold", "colnorm", "u", "v"):
        assert key not in p.tensors or torch.equal(back.tensors[key], p.tensors[key])
    x = torch.randn(9, K)  # nine rows are dense
    want = torch.nn.functional.linear(x, thresholded.unpack(p))
    assert torch.allclose(held.linear(x, None), want, atol=1e-4), bits


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_formula(case: dict[str, Any]) -> None:
    p = packed(**case)
    n, k = sympy.symbols("N K", positive=True, integer=True)
    count = p.tensors["threshold"].numel() if "threshold" in p.tensors else 0
    scale = p.tensors["weight.scale"].element_size() if "weight.scale" in p.tensors else 4
    own = thresholded.nbytes(weight=p.attrs["weight"], thresholds=count, number_bytes=scale).subs({n: N, k: K})
    rest = sum(p.tensors[key].numel() * 4 for key in ("u", "v", "colnorm") if key in p.tensors)
    assert int(own) + rest == pytest.approx(p.nbytes, rel=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": torch.rand(3)}, {"threshold": torch.rand(1).double()}, {"threshold": torch.tensor([torch.nan])}, {"threshold": None},
        {"u": torch.rand(N, 2)}, {"colnorm": torch.rand(2)}, {"more": torch.rand(1)},
    ],
)  # fmt: skip
def test_damage_is_refused(change: dict[str, Any]) -> None:
    p = packed()
    p.tensors = {k: t for k, t in (p.tensors | change).items() if t is not None}
    with pytest.raises(CheckpointError, match="E-CKP-SHAPE"):
        thresholded.validate(p)


@pytest.mark.parametrize("attrs", [{"side": "up"}, {"limit": -2}, {"limit": "4"}, {"side": "out"}])
def test_bad_attributes_are_refused(attrs: dict[str, Any]) -> None:
    p = packed()
    p.attrs |= attrs
    with pytest.raises(CheckpointError, match="E-CKP-SHAPE"):
        thresholded.validate(p)
