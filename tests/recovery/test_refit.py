"""The closed-form fit: least squares to the teacher's outputs or to its stream, on toys where both can be computed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import effllm
from effllm.errors import OptionError, RecoveryError
from effllm.recovery.refit import refit
from effllm.recovery.select import pairs
from effllm.recovery.stream import stream
from effllm.recovery.targets import cache_targets
from effllm.runtime.packed import PackedLinear
from tests.recovery.models import LowRank, Small, dense, low_rank, same, state, windows
from tests.recovery.test_run import kl

FAST: dict[str, Any] = {"batch": 4, "precision": "fp32", "lr": 1e-4}


class Biased(LowRank):
    """y = a (b x) + bias."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.weight, rank)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


def both(teacher: Small, rank: int) -> Small:
    model = low_rank(teacher, rank)
    for layer in model.layers:
        layer.down = Biased(layer.down, rank)
    return model


def seen(model: nn.Module, module: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module reads and answers, (tokens, K) and (tokens, N)."""
    found: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: found.extend((args[0], out)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    x, y = found
    return x.flatten(0, -2).double(), y.flatten(0, -2).double()


@pytest.mark.parametrize("rank", [3, 10])
def test_it_recovers_on_text_it_has_not_seen(rank: int) -> None:
    teacher, ids, unseen = dense(), windows(64), windows(64, seed=9)
    model = both(teacher, rank)
    start, before = kl(model, teacher, unseen), state(model)
    explained = refit(model, teacher, list(ids.split(1)))
    assert kl(model, teacher, unseen) < 0.6 * start
    assert set(explained) == {f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")} and all(0 < v < 1 for v in explained.values())
    assert {k for k, v in state(model).items() if not torch.equal(v, before[k])} == {f"{n}.a" for n in explained}
    assert not any("forward" in m.__dict__ for m in [*model.modules(), *teacher.modules()])


def test_it_is_the_least_squares_solution() -> None:
    teacher, ids = dense(), windows(32)
    model = both(teacher, 6)
    refit(model, teacher, list(ids.split(1)), damp=0.0)
    # the first linear reads what the teacher's reads
    x, _ = seen(model, model.layers[0].up, ids)
    _, want = seen(teacher, teacher.layers[0].up, ids)
    z = x @ model.layers[0].up.b.double().t()
    torch.testing.assert_close(model.layers[0].up.a.double(), torch.linalg.lstsq(z, want).solution.t(), rtol=1e-3, atol=1e-4)
    # behind a block's last linear nothing of the stream's difference can be explained by what it reads
    for i in range(3):
        x, _ = seen(model, model.layers[i].down, ids)
        z = x @ model.layers[i].down.b.double().t()
        rho = seen(teacher, teacher.layers[i], ids)[1] - seen(model, model.layers[i], ids)[1]
        left = float((rho.t() @ z).norm() / (rho.norm() * z.norm()))
        own = seen(teacher, teacher.layers[i].down, ids)[1] - seen(model, model.layers[i].down, ids)[1]
        assert left < 1e-5
        assert i == 0 or float((own.t() @ z).norm() / (own.norm() * z.norm())) > 1e-3  # its own output is not the target


def test_nothing_is_changed_where_nothing_is_lost() -> None:
    teacher, ids = dense(), windows(32)
    model = both(teacher, 24)
    before = state(model)
    refit(model, teacher, list(ids.split(1)))
    for name, value in state(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-4)


def test_damping_keeps_what_the_data_does_not_say() -> None:
    teacher, ids = dense(), windows(1, length=4)  # four tokens, rank 6
    with pytest.raises(RecoveryError, match="E-REC-REFIT"):
        refit(both(teacher, 6), teacher, list(ids.split(1)), damp=0.0)
    changes = []
    for damp in (1e-2, 1e2):
        model = both(teacher, 6)
        before = model.layers[0].up.a.clone()
        refit(model, teacher, list(ids.split(1)), damp=damp)
        changes.append(float((model.layers[0].up.a - before).norm() / before.norm()))
    assert 0 < changes[1] < 0.01 * changes[0]


def test_a_chosen_weight_alone() -> None:
    teacher, ids = dense(), windows(16)
    model = both(teacher, 6)
    before = state(model)
    assert list(refit(model, teacher, list(ids.split(1)), [p for p in pairs(model) if p.name == "layers.1.up"])) == ["layers.1.up"]
    assert {k for k, v in state(model).items() if not torch.equal(v, before[k])} == {"layers.1.up.a"}


PACKED = ("svd(rank=18)", "svd(rank=12, pivoted=false)", "lost(ratio=0.8, density=0.1, pivoted=false)", "sltrain(ratio=0.9, density=0.05)")


@pytest.mark.parametrize("recipe", PACKED)
def test_packed_weights_keep_their_form(recipe: str) -> None:
    teacher, ids, unseen = dense(), windows(96), windows(seed=9)
    model = copy.deepcopy(teacher)
    effllm.compress(model, recipe, ids)
    model.head, own = copy.deepcopy(teacher.head), {n: m for n, m in model.layers.named_modules() if isinstance(m, PackedLinear)}
    about = {n: (m.weight.attrs["rank"], m.weight.nbytes, set(m.weight.packed().tensors)) for n, m in own.items()}
    start = kl(model, teacher, unseen)
    report = effllm.recover(model, teacher, ids, 1, refit=96, **FAST)
    assert kl(model, teacher, unseen) < 0.9 * start
    assert len(report.refit) == 6 and "closed form: 6 weights" in str(report)
    assert {n: (m.weight.attrs["rank"], m.weight.nbytes, set(m.weight.packed().tensors)) for n, m in own.items()} == about


def test_resume_is_bit_equal(tmp_path: Any) -> None:
    teacher, ids = dense(), windows()

    def model() -> nn.Module:
        made = copy.deepcopy(teacher)
        effllm.compress(made, "svd(rank=18)")
        return made

    class Killed(Exception):
        pass

    def kill(done: int, total: int, what: str) -> None:
        if done == 5 and total == 6:
            raise Killed

    whole, part, again = model(), model(), model()
    effllm.recover(whole, teacher, ids, 6, refit=12, **FAST)
    keep: dict[str, Any] = {"checkpoint": tmp_path / "c", "every": 4, "refit": 12}
    with pytest.raises(Killed):
        effllm.recover(part, teacher, ids, 6, progress=kill, **keep, **FAST)
    assert effllm.recover(again, teacher, ids, 6, resume=True, **keep, **FAST).resumed_from == 4
    assert same(state(again), state(whole))
    with pytest.raises(RecoveryError, match=r"E-REC-RESUME.*refit"):
        effllm.recover(model(), teacher, ids, 6, resume=True, **keep | {"refit": 11}, **FAST)


def test_items_with_arguments_of_their_own() -> None:
    class Scaled(Small):
        def forward(self, input_ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            x = self.emb(input_ids)
            for layer in self.layers:
                x = layer(x) if scale is None else layer(x, scale=scale)
            return self.head(self.norm(x))

    class Block(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.own(x) * scale

    teacher = Scaled()
    teacher.layers = nn.ModuleList(Block(layer) for layer in teacher.layers)
    items = [{"input_ids": ids[None], "scale": torch.tensor(1.0 + i)} for i, ids in enumerate(windows(3))]
    found = stream(teacher, teacher.layers, items)
    assert found is not None and [float(c.kwargs["scale"]) for c in found.chain.calls[1]] == [1.0, 2.0, 3.0]
    alike = stream(dense(), dense().layers, list(windows(3).split(1)))
    assert alike is None  # the blocks of another model are never called
    model = dense()
    alike = stream(model, model.layers, list(windows(3).split(1)))
    assert alike is not None and [len(c) for c in alike.chain.calls] == [1, 1, 1] and len(alike.states) == 3


def test_linears_that_tokens_are_routed_to_are_left_alone() -> None:
    class Routed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.some = block, nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.block(x).clone()
            out[:, ::2] += self.some(out[:, ::2])
            return out

    teacher = dense()
    teacher.layers = nn.ModuleList(Routed(layer) for layer in teacher.layers)
    model = copy.deepcopy(teacher)
    for layer in model.layers:
        layer.some, layer.block.up = Biased(layer.some, 4), LowRank(layer.block.up.weight, 6)
    assert set(refit(model, teacher, list(windows(16).split(1)))) == {f"layers.{i}.block.up" for i in range(3)}


def test_bad_input() -> None:
    teacher, ids = dense(), windows()
    model = both(teacher, 6)
    before = state(model)

    def refused(error: Any, code: str, *, model: nn.Module = model, teacher: Any = teacher, count: int = 4) -> None:
        with pytest.raises(error, match=code):
            effllm.recover(model, teacher, ids, 1, refit=count, **FAST)

    refused(OptionError, "E-OPT-RECOVER.*refit=-1", count=-1)
    refused(OptionError, "E-OPT-RECOVER.*refit=25 of 24", count=25)
    refused(OptionError, "E-OPT-RECOVER.*cached answers", teacher=cache_targets(teacher, ids))
    refused(RecoveryError, "E-REC-PAIR", model=copy.deepcopy(teacher))
    refused(RecoveryError, "E-REC-TEACHER.*blocks", teacher=dense(blocks=2))
    broken = copy.deepcopy(teacher)
    broken.layers[0].up.weight.data[0, 0] = torch.nan
    refused(RecoveryError, "E-REC-REFIT.*layers.0.up.*not finite", teacher=broken)
    assert same(state(model), before)
