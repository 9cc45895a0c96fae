"""Channels in a better order before N:M masks: the same outputs, more energy kept, everything undone on an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import effllm
from effllm.errors import CalibrationError, EffllmError
from effllm.methods import NM
from effllm.reordering import reorder
from effllm.runtime import dense
from effllm.solvers.nm import nm_mask
from tests.coupling.helpers import build, difference, logits
from tests.hf.families import VOCAB
from tests.models import Tied

RECIPE = "nm(pattern=2:4, solver=wanda, permute={})"


def family(name: str) -> tuple[Any, dict[str, Any], Tensor]:
    """A tiny fp64 model with inputs and calibration windows."""
    model, inputs = build(name)
    return model, inputs, torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))


def rules(model: Any, permute: str, pattern: str = "2:4") -> dict[str, Any]:
    """Every linear of the blocks under one rule."""
    rule = NM(pattern=pattern, solver="wanda", permute=permute)
    return {n: (m, rule) for n, m in model.named_modules() if dense.kind_of(m) == "linear" and "head" not in n and "embed_out" not in n}


@pytest.mark.parametrize("permute", ["inner", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_outputs_stay_and_energy_grows(name: str, permute: str) -> None:
    model, inputs, windows = family(name)
    before, weights = logits(model, inputs), copy.deepcopy(model.state_dict())
    done = reorder(model, rules(model, permute), windows)
    applied = [d for d in done.decisions if d.action == "applied"]
    assert applied and len(applied) == len(done.moved)
    for d in applied:
        assert 0 < d.config["before"] < d.config["after"] <= 1 and f"{d.config['after']:.2%}" in d.reason
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, weights[n])]
    assert changed
    assert difference(logits(model, inputs), before) < 1e-10  # fp64 rounding of sums in another order
    done.undo()
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_inner_leaves_the_states_between_blocks_alone() -> None:
    model, _, windows = family("llama")
    seen: list[list[Tensor]] = [[], []]
    for kind, into in (("inner", seen[0]), ("all", seen[1])):
        own = copy.deepcopy(model)
        with torch.no_grad():
            before = own(windows, output_hidden_states=True).hidden_states[1:-1]
            reorder(own, rules(own, kind), windows)
            after = own(windows, output_hidden_states=True).hidden_states[1:-1]
        into += [*before, *after]
        half = len(before)
        same = all(difference(a, b) < 1e-5 for a, b in zip(into[:half], into[half:], strict=True))  # norms run in fp32
        assert same == (kind == "inner"), kind


def test_the_kept_energy_is_that_of_the_masks() -> None:
    """The Decision's figures against masks that are made from the weights themselves, inputs alike."""
    model, _, windows = family("llama")
    block = model.model.layers[0].mlp
    rule = {"model.layers.0.mlp.down_proj": (block.down_proj, NM(pattern="2:4", solver="wanda", permute="inner"))}
    inputs: list[Tensor] = []
    handle = block.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(windows)
    share = []
    for _ in range(2):
        score = block.down_proj.weight.detach().double().square() * torch.cat(inputs).square().sum(0)
        share.append(float((score * nm_mask(score, 2, 4)).sum() / score.sum()))
        inputs.clear()
        if len(share) == 1:
            handle.remove()
            (decision,) = reorder(model, rule, windows).decisions
            handle = block.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).double()))
            with torch.no_grad():
                model(windows)
    assert (decision.config["before"], decision.config["after"]) == pytest.approx(share, rel=1e-4)


def test_compress_permutes_first_and_says_so() -> None:
    torch.manual_seed(0)
    plain, _, windows = family("llama")
    plain = plain.float()
    moved = copy.deepcopy(plain)
    report = effllm.compress(moved, RECIPE.format("true"), windows)
    found = [d for d in report.decisions if d.code == "permuted"]
    assert found and all(d.site.startswith("permute ") for d in found)
    down = [n for n, m in moved.named_modules() if n.endswith("down_proj")]
    rows = {d.module: d for d in report.applied if d.module}
    assert set(down) <= rows.keys()  # the linears themselves are packed as ever
    effllm.compress(plain, RECIPE.format("false"), windows)
    a, b = (m.model.layers[0].mlp.down_proj.weight.dense() for m in (plain, moved))
    assert not torch.equal(a != 0, b != 0)
    order = next(d for d in found if "layers.0.mlp" in d.reason).config
    assert order["after"] > order["before"] and order["channels"] == plain.config.intermediate_size


def test_a_failure_later_on_puts_channels_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, windows = family("llama")
    model = model.float()
    weights, before = copy.deepcopy(model.state_dict()), logits(model, inputs)
    recipe = {"rules": [{"match": "*down_proj", "method": "nm", "pattern": "2:4", "solver": "wanda", "permute": "inner"},
                        {"match": "*q_proj", "method": "armor", "pattern": "2:4", "block": 48}]}  # fmt: skip
    with pytest.raises(EffllmError):
        effllm.compress(model, recipe, windows)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, inputs), before)


def test_what_cannot_move_is_a_decision() -> None:
    model, _, windows = family("llama")
    wide = {n: (m, NM(pattern="8:16", solver="wanda", permute="inner")) for n, (m, _) in rules(model, "inner").items()}
    size = model.config.intermediate_size
    codes = {d.code for d in reorder(model, wide, windows).decisions}
    assert ("pattern" in codes) == bool(size % 16 or (model.config.hidden_size // model.config.num_attention_heads) % 16)
    for mode, linears in (("inner", ".q"), ("none", ".o")):  # q reads the residual stream, which "inner" leaves alone; "none" asks for nothing
        tied = Tied()
        own = {n: (m, NM(permute=mode, solver="wanda")) for n, m in tied.named_modules() if n.endswith(linears)}
        assert reorder(tied, own, torch.randint(48, (2, 8))).decisions == []


def test_a_model_that_cannot_be_traced_stays_as_it_is() -> None:
    class Branch(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            out = super().forward(ids)
            return out if float(out.sum()) > 0 else -out

    torch.manual_seed(0)
    model = Branch()
    weights = copy.deepcopy(model.state_dict())
    own = {n: (m, NM(permute="inner", solver="wanda")) for n, m in model.named_modules() if n.endswith(".o")}
    (decision,) = reorder(model, own, torch.randint(48, (2, 8))).decisions
    assert (decision.action, decision.code) == ("kept", "E-CPL-CAPTURE") and "no channel was moved" in decision.reason
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_needs_data_and_a_known_word() -> None:
    model = Tied()
    with pytest.raises(CalibrationError, match="E-CAL-NONE"):
        effllm.compress(model, "nm(pattern=2:4, solver=magnitude, permute=true)")
    with pytest.raises(EffllmError, match="E-RCP-VALUE"):
        effllm.compress(model, "nm(pattern=2:4, permute=outer)")
