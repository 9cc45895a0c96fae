"""Packed weights in torch functions: the right result, or an error that says what to do; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effllm.compression import compress
from effllm.errors import EffllmError, WeightError
from effllm.runtime.functional import PackedUseError
from tests.models import Tied

IDS = torch.tensor([[3, 0, 47], [1, 1, 20]])
X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
BIAS = torch.linspace(-1, 1, 48)


def packed(recipe: str = "w4") -> Any:
    torch.manual_seed(0)
    model = Tied()
    compress(model, recipe)
    return model


USES: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda m: F.linear(X, m.emb.weight),
    "linear with bias": lambda m: F.linear(X, m.lm_head.weight, bias=BIAS),
    "matmul": lambda m: X @ m.lm_head.weight.T,
    "torch.matmul": lambda m: torch.matmul(X, m.emb.weight.T),
    "embedding": lambda m: F.embedding(IDS, m.emb.weight, padding_idx=0),
    "index": lambda m: m.emb.weight[IDS],
    "back and forth": lambda m: F.linear(X, m.emb.weight.T.T),
    "from the left": lambda m: m.emb.weight @ X.mT,
    "torch.matmul from the left": lambda m: torch.matmul(m.lm_head.weight, X.mT),
    "of a vector": lambda m: m.emb.weight @ X.flatten(0, -2)[1],
}
DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: X @ w.T,
    "linear with bias": lambda w: X @ w.T + BIAS,
    "matmul": lambda w: X @ w.T,
    "torch.matmul": lambda w: X @ w.T,
    "embedding": lambda w: w[IDS],
    "index": lambda w: w[IDS],
    "back and forth": lambda w: X @ w.T,
    "from the left": lambda w: w @ X.mT,
    "torch.matmul from the left": lambda w: w @ X.mT,
    "of a vector": lambda w: w @ X.flatten(0, -2)[1],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_functions_give_what_the_dense_weight_gives(use: str, compiled: bool) -> None:
    model = packed()
    # Dynamo hands `weight @ x` over with its sides swapped, so that one breaks the graph
    run = torch.compile(USES[use], backend="aot_eager", fullgraph=use not in ("from the left", "of a vector")) if compiled else USES[use]
    torch.testing.assert_close(run(model), DENSE[use](model.emb.weight.dense()), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_8_bit_activations_are_those_of_the_module() -> None:
    model = packed("w4a8")
    assert model.lm_head.weight.act == "a8"
    assert torch.equal(F.linear(X, model.lm_head.weight), model.lm_head(X))
    assert not torch.equal(F.linear(X, model.lm_head.weight), X @ model.lm_head.weight.dense().T)


class ByHand(nn.Module):
    """A model that writes its tied head by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(48, 64)
        self.lin = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.lin(self.emb(ids)), self.emb.weight)


@torch.no_grad()
def test_a_head_written_by_hand_runs_packed_and_compiled_by_effllm() -> None:
    torch.manual_seed(0)
    model = ByHand()
    want = model(IDS)
    compress(model, "w8")
    got = model(IDS)
    assert 0 < float((got - want).norm() / want.norm()) < 0.02
    compiled = torch.compile(model, backend="effllm", options={"inner": "eager"}, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), got)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "add": lambda w: X + w,
    "no transpose": lambda w: X @ w,
    "as the left side": lambda w: w.T @ X.mT,
    "transpose()": lambda w: X @ w.transpose(0, 1),
    "clone()": lambda w: w.clone(),
    "mean": lambda w: w.mean(),
    "slice": lambda w: w[:3],
    "mask": lambda w: w[torch.ones(48, dtype=torch.bool)],
    "max_norm": lambda w: F.embedding(IDS, w, max_norm=1.0),
    "as an input": lambda w: F.linear(w, X[0]),
    "by another packed one": lambda w: torch.matmul(w, w),
    "of the transpose": lambda w: w.T.contiguous(),
    "clone": lambda w: torch.clone(w),
}


@pytest.mark.parametrize("use", REFUSED)
def test_other_uses_are_refused_with_the_next_step(use: str) -> None:
    with pytest.raises(EffllmError) as caught:
        REFUSED[use](packed().emb.weight)
    assert caught.value.code == "E-WGT-USE" and "dense()" in caught.value.next_step


def test_a_wrong_width_is_an_error() -> None:
    with pytest.raises(WeightError) as caught:
        F.linear(X[..., :32], packed().emb.weight)
    assert caught.value.code == "E-WGT-SHAPE"
    with pytest.raises(WeightError, match="E-WGT-SHAPE"):
        packed().emb.weight @ X[..., :32].mT


def test_hasattr_and_unknown_names_behave() -> None:
    weight = packed().emb.weight
    assert not hasattr(weight, "data") and not hasattr(weight, "nonsense")
    assert weight.device == torch.device("cpu") and weight.T.shape == (64, 48)
    with pytest.raises(AttributeError) as caught:
        getattr(weight, "nonsense")  # noqa: B009 - the statement form is useless to ruff
    assert not isinstance(caught.value, PackedUseError)


def test_a_refused_use_in_a_compiled_graph_names_the_code() -> None:
    with pytest.raises(Exception, match="E-WGT-USE"):
        torch.compile(lambda m: X + m.emb.weight, backend="aot_eager")(packed())
