"""The whole of recover: it recovers, leaves frozen what is frozen, repeats, resumes, and stops with an error where it must."""

from __future__ import annotations

import copy

import pytest
import torch

import effllm
from effllm.errors import CalibrationError, CheckpointError, OptionError, RecoveryError
from effllm.recovery.loss import divergence
from effllm.recovery.ordered import Ordered
from effllm.recovery.targets import cache_targets, load_targets
from tests.recovery.models import Small, dense, low_rank, same, state, windows

FAST = {"batch": 4, "precision": "fp32", "lr": 0.02}


def kl(model, teacher, ids) -> float:
    with torch.no_grad():
        return float(divergence(model(ids).flatten(0, 1), teacher(ids).flatten(0, 1), torch.ones(ids.numel()))) / ids.numel()


LOSSES = ({"features": None}, {"features": 0}, {"loss": {"features": 0.0, "lm": 0.1}}, {"loss": {"kl": 0.0}})


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "batch": 2}, *LOSSES])
def test_factors_recover_and_nothing_else_moves(options):
    teacher = dense()
    model, ids, unseen = low_rank(teacher), windows(), windows(seed=9)
    before, start = state(model), kl(low_rank(teacher), teacher, unseen)
    report = effllm.recover(model, teacher, ids, 40, **FAST | options)
    assert kl(model, teacher, unseen) < 0.75 * start
    moved = {k for k, v in state(model).items() if not torch.equal(v, before[k])}
    assert moved == {f"layers.{i}.up.{p}" for i in range(3) for p in "ab"}
    assert report.trained == sum(before[k].numel() for k in moved)
    assert report.mean("total", 8) < report.mean("total", -8)
    assert len(report.history) == 40 and report.tokens == 40 * 4 * 12
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in moved)
    assert all(p.grad is None for p in model.parameters())
    assert "6 weights" not in str(report) and "trained (factors)" in str(report)


def test_same_seed_same_result_other_seed_another():
    teacher, results = dense(), []
    for seed in (0, 0, 1):
        model = low_rank(teacher)
        effllm.recover(model, teacher, windows(), 6, seed=seed, **FAST)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_the_global_generator_is_left_alone():
    teacher = dense()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    effllm.recover(low_rank(teacher), teacher, windows(), 2, perturbation=0.01, **FAST)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("options", [{}, {"perturbation": 0.01}, {"ordered": Ordered()}, {"accumulate": 2, "batch": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(tmp_path, options, dtype):
    teacher = dense().to(dtype)
    whole, part = low_rank(teacher), low_rank(teacher)
    full = effllm.recover(whole, teacher, windows(), 9, **FAST | options)

    class Killed(Exception):
        pass

    def kill(done, total, what):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        effllm.recover(part, teacher, windows(), 9, checkpoint=tmp_path / "c", every=4, progress=kill, **FAST | options)
    again = low_rank(teacher)  # a new process starts from the compressed model
    report = effllm.recover(again, teacher, windows(), 9, checkpoint=tmp_path / "c", resume=True, **FAST | options)
    assert report.resumed_from == 4
    assert same(state(again), state(whole))
    assert report.history == full.history


def test_resume_without_a_state_starts_at_the_beginning(tmp_path):
    teacher = dense()
    a, b = low_rank(teacher), low_rank(teacher)
    effllm.recover(a, teacher, windows(), 3, **FAST)
    report = effllm.recover(b, teacher, windows(), 3, checkpoint=tmp_path / "c", resume=True, **FAST)
    assert report.resumed_from == 0 and same(state(a), state(b))


def test_a_finished_run_is_restored_by_resume(tmp_path):
    teacher = dense()
    a, b = low_rank(teacher), low_rank(teacher)
    effllm.recover(a, teacher, windows(), 3, checkpoint=tmp_path / "c", **FAST)
    report = effllm.recover(b, teacher, windows(), 3, checkpoint=tmp_path / "c", resume=True, **FAST)
    assert report.tokens == 0 and same(state(a), state(b))


def test_resume_refuses_another_run(tmp_path):
    teacher = dense()
    effllm.recover(low_rank(teacher), teacher, windows(), 2, checkpoint=tmp_path / "c", **FAST)
    again = {"checkpoint": tmp_path / "c", "resume": True}
    for other in ({"seed": 1}, {"lr": 0.01}, {"perturbation": 0.1}):
        with pytest.raises(RecoveryError, match="E-REC-RESUME"):
            effllm.recover(low_rank(teacher), teacher, windows(), 2, **FAST | again | other)
    with pytest.raises(RecoveryError, match=r"E-REC-RESUME.*data"):
        effllm.recover(low_rank(teacher), teacher, windows(seed=8), 2, **FAST | again)
    with pytest.raises(RecoveryError, match="E-REC-RESUME"):
        effllm.recover(low_rank(teacher, 4), teacher, windows(), 2, **FAST | again)
    (tmp_path / "c" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="E-CKP-RECOVERY"):
        effllm.recover(low_rank(teacher), teacher, windows(), 2, **FAST | again)


@pytest.mark.parametrize("loss", [{}, {"features": 0.0}])
def test_nan_stops_and_the_last_good_values_come_back(loss):
    teacher = dense()
    model, values, calls = low_rank(teacher), {}, 0

    def spoil(module, args, output):
        nonlocal calls
        calls += 1
        # one probe, then one call per step; step 22 is spoiled, the copy kept is of step 20
        values[calls - 2] = module.a.detach().clone()
        return output * float("nan") if calls == 24 else None

    model.layers[1].up.register_forward_hook(spoil)
    with pytest.raises(RecoveryError, match=r"E-REC-NAN.*step 22.*step 20") as caught:
        effllm.recover(model, teacher, windows(), 40, loss=loss, **FAST)
    assert "lr" in caught.value.next_step
    assert torch.equal(model.layers[1].up.a, values[20])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_default_rates_and_a_note_where_the_loss_rose():
    teacher = dense()
    quiet = {k: v for k, v in FAST.items() if k != "lr"}
    for what, rate in (("factors", 1e-4), (["layers.*"], 1e-4), ("lora", 1e-3)):
        report = effllm.recover(low_rank(teacher), teacher, windows(), 2, what=what, warmup=0.0, **quiet)
        assert report.history[0]["lr"] == rate and not report.notes
    report = effllm.recover(low_rank(teacher), teacher, windows(), 20, **FAST | {"lr": 0.9, "clip": None})
    assert report.rose and "smaller lr than 0.9" in str(report)


def test_bad_input():
    teacher, ids = dense(), windows()
    model = low_rank(teacher)
    before = state(model)

    def refused(error, code, *, teacher=teacher, data=ids, model=model, **options):
        with pytest.raises(error, match=code):
            effllm.recover(model, teacher, data, 2, **FAST | options)

    refused(CalibrationError, "E-CAL-SHORT", data=ids[:3])
    refused(CalibrationError, "E-CAL-SHORT", accumulate=7)
    refused(CalibrationError, "E-CAL-SHORT", data=ids[:, :1])
    refused(CalibrationError, "E-CAL-FORM", data="text")
    refused(RecoveryError, "E-REC-TEACHER.*vocabulary of 50", teacher=dense(vocabulary=50))
    refused(RecoveryError, "E-REC-TEACHER", teacher=dense(vocabulary=20))
    refused(RecoveryError, "E-REC-TEACHER.*no block", teacher=dense(blocks=2), features=None)
    refused(RecoveryError, "E-REC-TEACHER.*layers", teacher=dense(width=32))
    refused(RecoveryError, "E-REC-VOCABULARY", data=ids + 30)
    refused(RecoveryError, "E-REC-NOTHING", model=copy.deepcopy(teacher))
    refused(RecoveryError, "E-REC-NOTHING", what=["nothing.*"])
    refused(OptionError, r"(?s)E-OPT-WHAT.*did you mean 'factors'", what="factor")
    refused(OptionError, "E-OPT-LOSS", loss={"kd": 1})
    refused(OptionError, "E-OPT-LOSS", loss={"kl": 0, "features": 0})
    refused(OptionError, "E-OPT-LOSS", loss={"temperature": 0})
    refused(OptionError, "E-OPT-RECOVER", precision="fp8")
    refused(OptionError, "E-OPT-RECOVER", lr=0.0)
    refused(OptionError, "E-OPT-RECOVER", batch=0)
    refused(OptionError, "E-OPT-RECOVER", resume=True)
    refused(OptionError, "E-OPT-OPTIMIZER", clip=0.0)
    assert same(state(model), before) and not any(p.requires_grad for p in model.layers[0].up.parameters())


def test_cached_targets_stand_in_for_the_teacher(tmp_path):
    teacher, ids = dense().to(torch.bfloat16), windows()
    online = low_rank(teacher)
    effllm.recover(online, teacher, ids, 5, **FAST)
    for directory in (None, tmp_path / "t"):
        model = low_rank(teacher)
        targets = cache_targets(teacher, ids, features=4, directory=directory)
        effllm.recover(model, targets, ids, 5, **FAST)
        # a bf16 model's states are kept without loss, and a window's answer does not depend on its batch beyond rounding
        for name, value in state(online).items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0.05, atol=0.02)
        with pytest.raises(RecoveryError, match=r"E-REC-TEACHER.*other data"):
            effllm.recover(low_rank(teacher), targets, windows(seed=1), 1, **FAST)
    with pytest.raises(RecoveryError, match=r"E-REC-TEACHER.*no block"):
        effllm.recover(low_rank(teacher), cache_targets(teacher, ids, features=1), ids, 1, features=None, **FAST)
    (tmp_path / "t" / "000003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="E-CKP-TARGETS"):
        load_targets(tmp_path / "t")


def test_logits_that_no_module_makes():
    teacher = dense(cap=True)
    model, ids = low_rank(teacher), windows()
    start = kl(model, teacher, ids)
    report = effllm.recover(model, teacher, ids, 30, **FAST)
    assert report.head == "" and kl(model, teacher, ids) < 0.75 * start
    again = low_rank(teacher)
    effllm.recover(again, cache_targets(teacher, ids), ids, 30, **FAST)
    assert kl(again, teacher, ids) < 0.75 * start


def test_batches_of_keyword_arguments_and_progress():
    teacher = dense()
    model, seen = low_rank(teacher), []
    data = [{"input_ids": w.view(2, 6)} for w in windows(6)]
    effllm.recover(model, teacher, data, 8, progress=lambda *a: seen.append(a[:2]), **FAST)
    assert seen == [(i + 1, 8) for i in range(8)]


def test_training_flags_and_gradients_come_back():
    teacher = dense()
    model = low_rank(teacher).train()
    model.emb.weight.grad = torch.ones_like(model.emb.weight)
    effllm.recover(model, teacher, windows(), 2, **FAST)
    assert all(m.training for m in model.modules()) and torch.equal(model.emb.weight.grad, torch.ones_like(model.emb.weight))
    assert model.emb.weight.requires_grad


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_autocast(precision):
    teacher = dense()
    model, ids = low_rank(teacher), windows()
    start = kl(model, teacher, ids)
    effllm.recover(model, teacher, ids, 30, **FAST | {"precision": precision})
    assert kl(model, teacher, ids) < 0.75 * start
    assert model.layers[0].up.a.dtype == torch.float32


def test_all_trains_a_tied_head():
    teacher = dense()
    model = low_rank(teacher)
    model.head.weight = model.emb.weight
    report = effllm.recover(model, teacher, windows(), 20, what="all", **FAST)
    assert model.head.weight is model.emb.weight
    assert report.trained == sum(p.numel() for p in model.parameters()) and report.share == 1
    assert report.mean("total", 4) < report.mean("total", -4)


def test_a_model_without_logits():
    class Odd(Small):
        def forward(self, input_ids):
            return {"scores": super().forward(input_ids)}

    with pytest.raises(RecoveryError, match="E-REC-OUTPUT"):
        effllm.recover(Odd(), dense(), windows(), 1, **FAST)
