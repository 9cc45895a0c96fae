"""Low-rank, Monarch and N:M recipes from compress to a compiled graph and back from disk, on a small Llama."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.errors import CalibrationError, EffllmError, RecipeError, WeightError
from effllm.runtime.packed import PackedLinear, packed_weights
from tests.hf.tiny import tiny_llama

DATA_FREE = ["svd(ratio=0.8)", "svd(ratio=0.8, pivoted=false)", "svd(ratio=0.8, bits=8)", "welore(ratio=0.7)", "monarch(ratio=0.6)", "nm(pattern=4:8)"]
CALIBRATED = [
    "whitened(ratio=0.8)", "whitened(ratio=0.8, allocation=uniform, metric=fisher)", "whitened(ratio=0.8, pivoted=false, bits=8)",
    "whitened(allocation=sensitivity, ratio=0.9)", "fwsvd", "asvd(rank=12)", "afm(ratio=0.7)", "sltrain(ratio=0.7)", "lost(ratio=0.7, density=0.05)",
    "monarch(ratio=0.6, form=strided, bits=8)", "monarch(ratio=0.6, blocks=2, solver=whitened)", "nm(solver=wanda)", "nm(bits=4)", "nm(solver=dsnot)",
    "armor(block=16)", "armor(block=32, bits=8)",
]  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = tiny_llama(torch.float32)
    vocabulary = model.config.vocab_size
    return model, torch.randint(0, vocabulary, (8, 24)), torch.randint(0, vocabulary, (2, 11))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def one_layer(model: Any) -> None:
    """Leave the first layer only: Dynamo takes half the time, and the second would be the same to it."""
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1


def multiplied_out(model: Any) -> Any:
    """The same model with dense linears that hold the stored values."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = module.weight.dense(torch.float32)
            if module.bias is not None:
                linear.bias.data = module.bias.detach().float()
            plain.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("recipe", DATA_FREE + CALIBRATED)
def test_packed_model_is_its_stored_values_saved_and_compiled(recipe: str, subject: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    dense, calibration, ids = subject
    model = copy.deepcopy(dense)
    report = effllm.compress(model, recipe, calibration if recipe in CALIBRATED else None)
    applied = [d for d in report.decisions if d.action == "applied"]
    assert applied and packed_weights(model) and all(d.bytes_after < d.bytes_before for d in applied)
    y = logits(model, ids)
    assert distance(y, logits(multiplied_out(model), ids)) < 1e-5
    effllm.save(model, tmp_path / "m")
    assert torch.equal(logits(effllm.load(tmp_path / "m"), ids), y)
    torch._dynamo.reset()
    one_layer(model)
    compiled = torch.compile(model, backend="effllm", options={"inner": "eager", "recipe": "dense"})
    assert distance(logits(compiled, ids), logits(model, ids)) < 1e-5


@pytest.mark.parametrize("recipe", ["svd(ratio=0.8)", "svd(ratio=0.8, pivoted=false)"])
def test_siblings_run_in_one_call(recipe: str, subject: tuple[Any, Tensor, Tensor]) -> None:
    model, _, ids = subject
    torch._dynamo.reset()
    with torch.no_grad():
        report = effllm.explain(model, (ids,), recipe, max_slowdown=1e9)
    merged = [d for p in report.passes if p.name == "merge_lowrank" for d in p.decisions if d.action == "applied"]
    assert len(merged) == 2 * model.config.num_hidden_layers  # query, key, value; gate, up
    call = torch.compile(model, backend="effllm", options={"inner": "eager", "recipe": recipe, "max_slowdown": 1e9})
    packed = copy.deepcopy(model)
    effllm.compress(packed, recipe)
    assert distance(logits(call, ids), logits(packed, ids)) < 1e-5


@pytest.mark.parametrize("recipe", ["svd(ratio={})", "monarch(ratio={}, blocks=2)", "nm(pattern={})"])
def test_less_kept_is_further_from_dense(recipe: str, subject: tuple[Any, Tensor, Tensor]) -> None:
    dense, _, ids = subject
    want, found = logits(dense, ids), []
    for size in ("2:8", "4:8", "6:8") if "pattern" in recipe else ("0.3", "0.6", "0.9"):
        model = copy.deepcopy(dense)
        effllm.compress(model, recipe.format(size))
        found.append(distance(logits(model, ids), want))
    assert found[0] > found[1] > found[2]


def test_full_rank_is_the_dense_model(subject: tuple[Any, Tensor, Tensor]) -> None:
    dense, _, ids = subject
    model = copy.deepcopy(dense)
    rules = [{"match": "*.down_proj", "method": "svd", "rank": min(model.model.layers[0].mlp.down_proj.weight.shape)}]
    effllm.compress(model, {"rules": rules})
    assert distance(logits(model, ids), logits(dense, ids)) < 1e-5


def test_auto_statistics_are_the_dense_model_s_where_ranks_go_by_energy(subject: tuple[Any, Tensor, Tensor]) -> None:
    """What the allocation settles holds when every layer has its rank."""
    model, calibration, _ = subject
    stored = {}
    for statistics in ("auto", "dense", "sequential"):
        packed = copy.deepcopy(model)
        effllm.compress(packed, f"whitened(ratio=0.8, statistics={statistics})", calibration)
        stored[statistics] = {n: p.tensors["a.values"] for n, m in packed.named_modules() if isinstance(m, PackedLinear) for p in [m.weight.packed()]}
    last = max(stored["dense"])
    assert all(torch.equal(t, stored["dense"][n]) for n, t in stored["auto"].items()) and not torch.equal(stored["auto"][last], stored["sequential"][last])


def test_ratio_is_the_share_of_the_numbers(subject: tuple[Any, Tensor, Tensor]) -> None:
    dense, calibration, _ = subject
    for recipe in ("whitened(ratio=0.8)", "whitened(ratio=0.8, allocation=uniform)", "svd(ratio=0.8)", "afm(ratio=0.8, pivoted=false)"):
        model = copy.deepcopy(dense)
        before = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
        effllm.compress(model, recipe, calibration)
        packed = packed_weights(model).values()
        left = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
        numbers = left + sum(t.numel() for w in packed for t in w.parameters())
        assert 0.7 < numbers / before <= 0.8


@pytest.mark.parametrize(
    ("recipe", "kind", "code"),
    [
        ("whitened(ratio=0.8)", CalibrationError, "E-CAL-NONE"),
        ("nm(solver=wanda)", CalibrationError, "E-CAL-NONE"),
        ("armor", CalibrationError, "E-CAL-NONE"),
        ("sltrain", CalibrationError, "E-CAL-NONE"),
        ("svd(rank=0)", RecipeError, "E-RCP-VALUE"),
        ("monarch(blocks=0)", RecipeError, "E-RCP-VALUE"),
        ("svd(rank=100000)", WeightError, "E-WGT-RANK"),
        ("monarch(ratio=0.5, blocks=7, pad=false)", WeightError, "E-WGT-PAD"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(recipe: str, kind: type[EffllmError], code: str, subject: tuple[Any, Tensor, Tensor]) -> None:
    dense, _, ids = subject
    model = copy.deepcopy(dense)
    want = logits(model, ids)
    with pytest.raises(kind) as caught:
        effllm.compress(model, recipe)
    assert caught.value.code == code
    assert torch.equal(logits(model, ids), want) and not packed_weights(model)


@pytest.mark.parametrize("recipe", ["whitened(ratio=0.8)", "monarch(ratio=0.8)", "nm(solver=wanda)"])
@pytest.mark.parametrize(
    ("ids", "code"),
    [
        (torch.full((3, 20), 64), "E-CAL-VOCAB"),
        (torch.full((3, 20), -1), "E-CAL-VOCAB"),
        ([{"input_ids": torch.full((1, 20), 1000)}], "E-CAL-VOCAB"),
        (torch.zeros(2, 8), "E-CAL-FORM"),
        (torch.zeros(0, 8, dtype=torch.long), "E-CAL-SHORT"),
    ],
)
def test_calibration_of_another_model_is_refused(recipe: str, ids: Any, code: str, subject: tuple[Any, Tensor, Tensor]) -> None:
    model = copy.deepcopy(subject[0])
    with pytest.raises(CalibrationError) as caught:
        effllm.compress(model, recipe, ids)
    assert caught.value.code == code and not packed_weights(model)


def test_calibration_with_fewer_tokens_than_channels_is_damped(subject: tuple[Any, Tensor, Tensor]) -> None:
    dense, calibration, ids = subject
    model = copy.deepcopy(dense)
    effllm.compress(model, "whitened(ratio=0.9)", calibration[:1])  # 24 tokens for 64 and 96 channels
    assert torch.isfinite(logits(model, ids)).all() and distance(logits(model, ids), logits(dense, ids)) < 1


@pytest.mark.parametrize("recipe", ["whitened(ratio=0.8)", "sltrain(ratio=0.7)", "lost", "armor", "nm(solver=sparsegpt)"])
def test_backend_keeps_dense_what_needs_calibration(recipe: str, subject: tuple[Any, Tensor, Tensor]) -> None:
    model, _, ids = subject
    torch._dynamo.reset()
    with torch.no_grad():
        decisions = effllm.explain(model, (ids,), recipe).decisions
    kept = [d for d in decisions if d.code == "calibration"]
    assert kept and all("compress" in d.reason for d in kept)


def test_factors_train_under_the_backend(subject: tuple[Any, Tensor, Tensor]) -> None:
    dense, _, ids = subject
    model = copy.deepcopy(dense)
    effllm.compress(model, "svd(ratio=0.5)")
    factors = [p for w in packed_weights(model).values() for p in w.parameters()]
    for p in factors:
        p.requires_grad_(True)
    torch._dynamo.reset()
    call = torch.compile(model, backend="effllm", options={"recipe": "dense", "inner": "eager"})
    optimizer, losses = torch.optim.Adam(factors, 3e-3), []
    target = logits(dense, ids).softmax(-1)
    for _ in range(8):
        loss = nn.functional.cross_entropy(call(ids).logits.flatten(0, 1), target.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(p.grad is not None for p in factors)
