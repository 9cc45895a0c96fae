"""Calibration: what is found, the shares it promises on text it has not seen, and every way in which it is refused."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

import effllm
from effllm.activation.apply import every_row, install
from effllm.activation.calibration import Calibration
from effllm.errors import CalibrationError, OptionError, RecipeError
from effllm.runtime.activated import ThresholdedActivation
from tests.activation.models import INNER, WIDTH, decoder, windows

QUICK = "allocation=greedy, step=0.3, tokens=256"
METHODS = ("chess(sparsity=0.5)", "cats(sparsity=0.5)", f"teal(sparsity=0.5, {QUICK})", "teal(sparsity=0.5, allocation=uniform)",
           f"rsparse(sparsity=0.5, budget=6, {QUICK})")  # fmt: skip


@cache
def found() -> Calibration:
    return effllm.calibrate(decoder(), windows(), METHODS)


def test_sites_and_gates_are_found_by_how_data_flow() -> None:
    roles = {n: s.role for n, s in found().sites.items()}
    assert {n.removeprefix("layers.1."): r for n, r in roles.items() if ".1." in n} == {r: r for r in ("q", "k", "v", "o", "gate", "up", "down")}
    assert "head" not in roles and len(roles) == 14
    gate = found().gates["layers.0.down"]
    assert (gate.activation, gate.gate, gate.up, gate.half) == ("layers.0.act", "layers.0.gate", "layers.0.up", None)


def test_levels_are_the_targets() -> None:
    levels = [found().level(p) for p in found().plans]
    assert levels[2:] == pytest.approx([0.5] * 3, abs=0.005)
    n = WIDTH * WIDTH
    whole, mlp = 4 * n + 3 * WIDTH * INNER, 2 * WIDTH * INNER
    assert levels[0] == pytest.approx(0.5 * (mlp + 2 * n) / whole, abs=0.005)  # up, down, q and o
    assert levels[1] == pytest.approx(0.5 * mlp / whole, abs=0.005)


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("settle", [0, 2])
def test_realised_sparsity_on_other_text(index: int, settle: int) -> None:
    """Thresholds as found are for the dense model's activations, settled ones for those of the model that is sparse everywhere."""
    method = dataclasses.replace(found().plans[index].method, settle=settle)
    own, model = effllm.calibrate(decoder(), windows(), method), decoder()
    plan = own.plans[0]
    assert settle == 0 or plan.table() == found().plans[index].table()
    shares: list[float] = []
    install(model, own, plan)
    for module in model.modules():
        if isinstance(module, ThresholdedActivation):
            module.inner.register_forward_hook(lambda m, a, y, t=module.threshold: shares.append(float((y[:, 2:].abs() <= t).float().mean())))
    for name, cut in plan.inputs.items():
        t = cut.tensors["threshold"] / cut.tensors.get("norm", 1.0)
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, t=t: shares.append(float((a[0][:, 2:].abs() <= t).float().mean())))
    with torch.no_grad(), every_row(model) if settle else nullcontext():
        model(windows(16, seed=5))
    assert len(shares) == len(plan.inputs) + len(plan.gates) and all(s == pytest.approx(0.5, abs=0.02) for s in shares)


def test_settling_moves_thresholds_where_activations_shrink() -> None:
    """Channels that are dropped in the first layer are missing in the second: its thresholds fall, those that see no sparse input stay."""
    method = dataclasses.replace(found().plans[3].method, settle=0)
    before, after = effllm.calibrate(decoder(), windows(), method).plans[0].inputs, found().plans[3].inputs
    change = {n: float(after[n].tensors["threshold"] / before[n].tensors["threshold"]) for n in after}
    assert change["layers.0.q"] == pytest.approx(1.0, abs=0.02)  # other windows, the same inputs
    assert change["layers.1.down"] < 0.97


def test_greedy_differs_from_uniform_and_is_a_table() -> None:
    greedy, uniform = found().plans[2], found().plans[3]
    assert {round(c.target, 6) for c in uniform.inputs.values()} == {0.5}
    assert len({round(c.target, 3) for c in greedy.inputs.values()}) > 2
    assert {r["module"] for r in greedy.table()} == set(found().sites) and all(0 <= r["realised"] < 1 for r in greedy.table())


def test_chess_thresholds_are_theta_over_the_size_of_the_up_projection() -> None:
    t = found().plans[0].gates["layers.0.down"].tensors["threshold"]
    assert t.shape == (INNER,) and float(t[0] / t[-1]) > 5  # channels of `up` grow along the index
    assert len(set(found().plans[1].gates["layers.0.down"].tensors["threshold"].tolist())) == 1


def test_weighing_counts_the_columns_that_would_be_multiplied() -> None:
    """t_i c_i is one number for all channels; with weigh c_i includes the norm of column i of the down projection, and inputs have theirs."""
    model = decoder()
    plain, weighed = effllm.calibrate(decoder(), windows(), ["chess(sparsity=0.5, settle=0)", "chess(sparsity=0.5, weigh=true, settle=0)"]).plans
    norm = model.layers[0].down.weight.detach().norm(dim=0)
    a, b = (p.gates["layers.0.down"].tensors["threshold"] for p in (plain, weighed))
    ratio = b * norm / a
    assert ratio.max() / ratio.min() == pytest.approx(1.0, abs=1e-4) and norm.max() / norm.min() > 1.05
    for name, cut in weighed.inputs.items():
        torch.testing.assert_close(cut.tensors["norm"], model.get_submodule(name).weight.detach().norm(dim=0))
    assert plain.inputs and all("norm" not in c.tensors for c in plain.inputs.values())


@pytest.mark.parametrize("word", ["chess(sparsity=0.5, layers=measured)", "teal(sparsity=0.5, allocation=uniform, layers=measured)"])
def test_a_block_that_costs_more_drops_less(word: str) -> None:
    """The second block's outputs are made ten times larger: what it drops moves the logits more, and it gets the smaller share."""
    def loud() -> torch.nn.Module:
        model = decoder()
        with torch.no_grad():
            model.layers[1].down.weight.mul_(10.0)
            model.layers[1].o.weight.mul_(10.0)
        return model

    plan = effllm.calibrate(loud(), windows(), word).plans[0]
    kinds = [kind for kind in (plan.gates, plan.inputs) if kind]
    shares = [[{round(c.target, 9) for n, c in kind.items() if n.startswith(f"layers.{i}.")} for kind in kinds] for i in (0, 1)]
    assert all(len(s) == 1 for block in shares for s in block)
    (first, second), weights = [[min(s) for s in block] for block in shares], [2 * WIDTH * INNER, 2 * WIDTH * WIDTH][: len(kinds)]
    assert all(b < a for a, b in zip(first, second, strict=True)) and min(second) < 0.48
    mean = sum(w * (a + b) / 2 for w, a, b in zip(weights, first, second, strict=True)) / sum(weights)
    assert mean == pytest.approx(0.5)  # a gate's channels are skipped in up and down, inputs in q and o
    even = effllm.calibrate(loud(), windows(), word.replace("measured", "uniform")).plans[0]
    assert {c.target for c in {**even.inputs, **even.gates}.values()} == {0.5}


@pytest.mark.parametrize("method", ["teal", "rsparse"])
def test_a_linear_that_costs_the_output_more_drops_less(method: str) -> None:
    """Of two alike, the one whose output is ten times larger gets the smaller share; the block's own error would not tell inputs of a residual apart."""
    model = decoder()
    with torch.no_grad():
        model.layers[1].down.weight.mul_(10.0)
        model.layers[1].o.weight.mul_(10.0)
    plan = effllm.calibrate(model, windows(), f"{method}(sparsity=0.5, tokens=256)").plans[0]
    sites, cuts = {n: math.prod(model.get_submodule(n).weight.shape) for n in plan.inputs}, plan.inputs
    assert sum(sites[n] * cuts[n].target for n in sites) == pytest.approx(0.5 * sum(sites.values()))
    assert all(cuts[f"layers.1.{n}"].target < cuts[f"layers.0.{n}"].target for n in ("down", "o"))
    assert len({round(c.target, 3) for c in cuts.values()}) > 4


class Tuple(torch.nn.Module):
    """A model whose output is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = decoder()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.model(ids)
        return x, x + 1


@pytest.mark.parametrize("word", ["teal(sparsity=0.5, step=0.3, tokens=256)", "chess(sparsity=0.5, layers=measured)"])
def test_a_model_whose_output_cannot_be_compared_says_so(word: str) -> None:
    model = Tuple().eval()
    own = effllm.calibrate(model, windows(), word)
    plan, greedy = own.plans[0], effllm.calibrate(Tuple().eval(), windows(), word.replace("measured", "uniform").replace("step", "allocation=greedy, step"))
    assert [c.target for c in plan.inputs.values()] == [c.target for c in greedy.plans[0].inputs.values()]
    report, _ = install(model, own, plan)
    assert [d.code for d in report.decisions if "neither logits nor a tensor" in d.reason] == ["not-measured"]


def test_a_low_rank_costs_what_it_takes() -> None:
    for cut in found().plans[4].inputs.values():
        rank = cut.tensors["u"].shape[1] if "u" in cut.tensors else 0
        assert (cut.alpha < 1) == (rank > 0) and cut.skipped <= cut.realised
        assert cut.skipped == pytest.approx(cut.target, abs=0.01)


def test_the_same_data_give_the_same_plan() -> None:
    again = effllm.calibrate(decoder(), windows(), METHODS[4])
    assert again.plans[0].table() == found().plans[4].table()


def test_saved_and_read(tmp_path: Path) -> None:
    read = Calibration.load(found().save(tmp_path / "c"))
    assert [p.table() for p in read.plans] == [p.table() for p in found().plans]
    a, b = (c.plans[4].inputs["layers.0.gate"].tensors for c in (read, found()))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    read.check(decoder())
    (tmp_path / "c" / "calibration.safetensors").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="E-CAL-FILE"):
        Calibration.load(tmp_path / "c")
    with pytest.raises(CalibrationError, match="E-CAL-FILE"):
        Calibration.load(tmp_path / "none")


def test_stale_thresholds_are_refused_with_what_differs() -> None:
    other = decoder(seed=1)
    with pytest.raises(CalibrationError, match=r"E-CAL-STALE.*14 of 14 weights"):
        install(other, found(), found().plans[0])
    one = decoder()
    with torch.no_grad():
        one.layers[1].up.weight[0, 0] += 1e-3
    with pytest.raises(CalibrationError, match=r"1 of 14 weights changed.*layers\.1\.up"):
        install(one, found(), found().plans[0])
    with pytest.raises(CalibrationError, match=r"E-CAL-STALE.*another model"):
        install(torch.nn.Linear(3, 3), found(), found().plans[0])
    changed = decoder()
    changed.layers[0].act = torch.nn.GELU()
    with pytest.raises(CalibrationError, match="classes"):
        install(changed, found(), found().plans[0])
    packed = decoder()
    effllm.compress(packed, "w4")
    with pytest.raises(CalibrationError, match="E-CAL-STALE"):
        install(packed, found(), found().plans[0])
    with pytest.raises(CalibrationError, match="E-CAL-METHOD"):
        found().plan(dataclasses.replace(found().plans[0].method, sparsity=0.6))


def test_bad_data() -> None:
    with pytest.raises(CalibrationError, match=r"E-CAL-SHORT.*16384"):
        effllm.calibrate(decoder(), windows(4))
    constant = decoder()
    with torch.no_grad():
        for layer in constant.layers:
            layer.gate.weight.zero_()
            layer.second.weight.zero_()
            layer.second.bias.fill_(1.0)
    with pytest.raises(CalibrationError, match=r"E-CAL-CONSTANT.*layers\.0"):
        effllm.calibrate(constant, windows(), "teal(sparsity=0.5, allocation=uniform)")
    broken = decoder()
    with torch.no_grad():
        broken.layers[1].gate.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="E-CAL-NAN"):
        effllm.calibrate(broken, windows(), "cats(sparsity=0.5)")
    with pytest.raises(CalibrationError, match="E-CAL-NONE"):
        effllm.calibrate(torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 8)), windows(), "cats(sparsity=0.5)")
    with pytest.raises(OptionError):
        effllm.calibrate("model", windows())  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["w4", "chess(sparsity=1)", "chess(sparsity=-0.1)", "teal(attention=true)", "ches(sparsity=0.5)"])
def test_bad_methods(word: str) -> None:
    with pytest.raises(RecipeError):
        effllm.calibrate(decoder(), windows(1), word)
