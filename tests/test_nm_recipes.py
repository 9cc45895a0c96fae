"""N:M recipes end to end: what cannot be done is named, joint pruning and quantization, zeros, masks that stay through training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.errors import EffllmError
from effllm.runtime.formats import nm
from tests.models import Tied, relative

IDS = torch.randint(48, (8, 64), generator=torch.Generator().manual_seed(3))


class Wide(nn.Module):
    """One block with a linear of any shape."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(48, k)
        self.w = nn.Linear(k, n, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.w(self.emb(ids))


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module) -> float:
    return relative(model(IDS), dense(IDS))


def rule(**values: object) -> dict[str, object]:
    return {"rules": [{"match": "*w", "method": "nm", "pattern": "2:4", "solver": "magnitude", **values}]}


def test_groups_that_do_not_divide_k_are_named() -> None:
    torch.manual_seed(0)
    model = Wide(8, 36)
    weight = model.w.weight.detach().clone()
    with pytest.raises(EffllmError, match=r"E-WGT-NM\] w: 36 inputs"):
        effllm.compress(model, rule(pattern="4:8"))
    assert isinstance(model.w, nn.Linear) and torch.equal(model.w.weight, weight)
    effllm.compress(model, rule(pattern="4:8", pad=True))
    kept = model.w.weight.dense()
    assert torch.equal(kept[kept != 0], weight[kept != 0]) and int((kept != 0).sum()) == 8 * (4 * 4 + 4)


@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
@pytest.mark.parametrize("bits", [16, 8])
def test_groups_of_zeros_stay_zero(bits: int, pattern: str) -> None:
    torch.manual_seed(0)
    model = Wide(8, 64)
    with torch.no_grad():
        model.w.weight[3] = 0
        model.w.weight[:, 8:16] = 0
    effllm.compress(model, rule(pattern=pattern, bits=bits))
    kept = model.w.weight.dense()
    largest = float(kept.abs().max()) / (2**bits - 1)  # a grid without zero stores its smallest step
    assert float(kept[3].abs().max()) <= largest and float(kept[:, 8:16].abs().max()) <= 2 * largest


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "5:4", "2:5", "2", "a:b"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(EffllmError, match="E-RCP-VALUE"):
        effllm.compress(Wide(8, 64), rule(pattern=pattern))


def test_a_mask_for_another_shape_is_refused_on_loading() -> None:
    packed = nm.from_dense(torch.randn(8, 64), torch.ones(8, 64, dtype=torch.bool) & (torch.arange(64) % 2 == 0), 2, 4)
    other = nm.from_dense(torch.randn(8, 32), torch.ones(8, 32, dtype=torch.bool) & (torch.arange(32) % 2 == 0), 2, 4)
    packed.tensors["index"] = other.tensors["index"]
    with pytest.raises(EffllmError, match="E-CKP-SHAPE"):
        nm.validate(packed)
    model = Tied()
    wrong = {"blocks.0.q": torch.ones(64, 32, dtype=torch.bool)}
    with pytest.raises(EffllmError, match="E-OPT-MASK"):
        effllm.recover(model, copy.deepcopy(model), IDS, 1, what="perp", masks=wrong, precision="fp32")


def test_joint_pruning_and_quantization_by_recipe() -> None:
    """nm(solver=sparsegpt, bits=4) quantizes what it keeps by the same statistics: nearer to the dense outputs than rounding Wanda's survivors."""
    errors = {}
    for solver in ("sparsegpt", "wanda"):
        torch.manual_seed(0)
        model = Tied()
        dense = copy.deepcopy(model)
        found = {"rules": [{"match": "blocks.*", "method": "nm", "pattern": "2:4", "solver": solver, "bits": 4, "group": 16}]}
        report = effllm.compress(model, found, IDS)
        assert {d.config["bits"] for d in report.applied} == {4}
        for _, module in model.named_modules():
            if hasattr(module, "weight") and hasattr(module.weight, "dense") and module.weight.format == "nm":
                assert int((module.weight.dense() != 0).view(module.weight.shape[0], -1, 4).sum(-1).amax()) <= 2
        with torch.no_grad():
            hidden = [m.blocks[0](m.emb(IDS)) for m in (model, dense)]
        errors[solver] = relative(*hidden)
    assert errors["sparsegpt"] < 0.95 * errors["wanda"]


@pytest.mark.parametrize("recipe", ["nm(pattern=2:4, solver=wanda)", "armor(pattern=2:4, block=16)"])
def test_training_in_packed_form_keeps_the_mask(recipe: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    dense = copy.deepcopy(model)
    name, _, rest = recipe.partition("(")
    values = dict(part.split("=") for part in rest.rstrip(")").split(", "))
    effllm.compress(model, {"rules": [{"match": "blocks.*", "method": name, **{k: int(v) if v.isdigit() else v for k, v in values.items()}}]}, IDS)
    masks = {n: t.clone() for n, t in model.named_buffers() if n.endswith("index")}
    before = distance(model, dense)
    report = effllm.recover(model, dense, IDS, 30, what="factors", lr=1e-2, batch=4, precision="fp32")
    assert distance(model, dense) < before and report.trained > 0
    assert masks and all(torch.equal(t, masks[n]) for n, t in model.named_buffers() if n.endswith("index"))
