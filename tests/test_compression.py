"""effllm.compress on modules: what it swaps, what it leaves alone, and that a failure changes nothing."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from effllm.compression import compress
from effllm.errors import CalibrationError, EffllmError, OptionError, PassError, RecipeError, WeightError
from effllm.recipe import Recipe
from effllm.runtime.formats import bipolar
from effllm.runtime.packed import PackedEmbedding, PackedLinear, PackedWeight
from tests.models import Tied, relative

IDS = torch.arange(24).view(2, 12)


def tied() -> Tied:
    """The same small model every time."""
    torch.manual_seed(0)
    return Tied()


def snapshot(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Identity of every module and tensor, and the tensors' versions."""
    modules = {n: (id(m), int(m.training)) for n, m in model.named_modules()}
    return modules | {f"{n}!": (id(p), p._version) for n, p in model.named_parameters(remove_duplicate=False)}


def test_swaps_every_linear_and_embedding() -> None:
    model = tied()
    with torch.no_grad():
        dense = model(IDS)
    report = compress(model, "w8")
    assert not any(isinstance(m, nn.Linear | nn.Embedding) for m in model.modules())
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 7
    assert isinstance(model.emb, PackedEmbedding) and isinstance(model.lm_head, PackedLinear)
    assert len(report.applied) == 8 and not [d for d in report.decisions if d.action != "applied"]
    with torch.no_grad():
        assert relative(model(IDS), dense) < 0.01
    # only the biases are left as parameters
    assert {n.rsplit(".", 1)[1] for n, _ in model.named_parameters()} == {"bias"}


def test_output_is_that_of_the_dequantized_weights() -> None:
    model = tied()
    other = copy.deepcopy(model)
    compress(model, "bipolar(bits=3, group=16)")
    for name, module in other.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(model.get_submodule(name).weight.dense())
    with torch.no_grad():
        assert relative(model(IDS), other(IDS)) < 1e-5


def test_tied_weights_are_packed_once() -> None:
    model = tied()
    report = compress(model, "w4")
    assert model.emb.weight is model.lm_head.weight
    weights = [m for m in model.modules() if isinstance(m, PackedWeight)]
    assert len(weights) == 7
    by_name = {d.module: d for d in report.decisions}
    assert {by_name["emb"].code, by_name["lm_head"].code} == {"applied", "tied"}
    assert report.bytes_after == sum(w.nbytes for w in weights)
    assert report.bytes_before == 4 * sum(p.numel() for n, p in tied().named_parameters() if not n.endswith("bias"))


def test_dense_weights_are_freed() -> None:
    model = tied()
    refs = [weakref.ref(p) for n, p in model.named_parameters() if not n.endswith("bias")]
    compress(model, "w4")
    assert not [r for r in refs if r() is not None]


def test_bytes_follow_the_formula() -> None:
    n, k = sympy.symbols("N K", positive=True, integer=True)
    for bits in (1, 3, 8):
        for group in (16, 64, 0):
            model = nn.Sequential(nn.Linear(192, 320))
            report = compress(model, f"bipolar(bits={bits}, group={group or 'channel'}, offset=none)")
            wanted = int(bipolar.nbytes(bits=bits, group=group).subs({n: 320, k: 192}))
            assert abs(report.bytes_after - wanted) <= 0.01 * wanted


class Own(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))


def hooked() -> nn.Module:
    module = nn.Linear(32, 32)
    module.register_forward_hook(lambda m, a, y: y + 1)
    return module


@pytest.mark.parametrize("make", [lambda: Own(32, 32), parametrized, hooked, lambda: nn.MultiheadAttention(32, 4), lambda: nn.Embedding(8, 32, max_norm=1.0)])
def test_left_alone(make: Any) -> None:
    model = nn.Sequential(make(), nn.Linear(32, 32))
    before = snapshot(model[0])
    report = compress(model, "w4")
    assert snapshot(model[0]) == before
    assert isinstance(model[1], PackedLinear)
    kept = [d for d in report.decisions if d.action == "kept"]
    # attention holds three more matrices in a parameter of its own
    assert len(kept) == 1 + isinstance(model[0], nn.MultiheadAttention) and all(d.module.startswith("0") and d.reason for d in kept)


def test_the_model_itself_cannot_be_swapped() -> None:
    model = nn.Linear(32, 32)
    before = snapshot(model)
    report = compress(model, "w4")
    assert [d.code for d in report.decisions] == ["root"] and snapshot(model) == before


def test_a_module_in_two_places_is_swapped_in_both() -> None:
    one = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": one, "b": nn.Sequential(one), "c": nn.Linear(32, 32)})
    report = compress(model, "w4")
    assert isinstance(model["a"], PackedLinear) and model["b"][0] is model["a"]
    assert len(report.applied) == 2


def test_rules_decide() -> None:
    model = tied()
    recipe = Recipe.parse(
        {
            "rules": [
                {"match": "blocks.0.*", "method": "dense"},
                {"match": "*.q", "bits": 2, "group": 16},
                {"match": "*.k", "bits": 5, "group": 64},
            ]
        }
    )
    report = compress(model, recipe)
    by_name = {d.module: d for d in report.decisions}
    assert by_name["blocks.0.q"].code == "dense" and isinstance(model.blocks[0].q, nn.Linear)
    assert by_name["blocks.1.q"].config["bits"] == 2 and model.blocks[1].q.weight.group == 16
    assert model.blocks[1].k.weight.bits == 5
    assert by_name["lm_head"].code == "no-rule" and by_name["emb"].code == "no-rule"
    assert model.lm_head.weight is model.emb.weight


def test_strict_wants_something_applied() -> None:
    model = tied()
    before = snapshot(model)
    nothing = {"rules": [{"match": "no.such.module", "bits": 4}]}
    with pytest.raises(PassError) as caught:
        compress(model, nothing, strict=True)
    assert caught.value.code == "E-PAS-STRICT"
    assert snapshot(model) == before
    assert not compress(model, nothing).applied


def poison(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        next(iter(model.blocks[-1].o.parameters()))[-1, -1] = value  # type: ignore[union-attr,index,operator]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("calibration", [None, IDS])
def test_bad_weight_in_the_last_layer_changes_nothing(value: float, calibration: Tensor | None) -> None:
    model = tied()
    poison(model, value)
    before = snapshot(model)
    with pytest.raises(WeightError) as caught:
        compress(model, "w4", calibration)
    assert caught.value.code == "E-WGT-NAN" and "blocks.1.o" in caught.value.cause
    assert snapshot(model) == before


def test_calibrating_where_the_dtype_is_slow_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for fast, calibration, noted in ((False, IDS, True), (False, None, False), (True, IDS, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        report = compress(Tied().bfloat16().eval(), "w4", calibration)
        assert ("no bf16 products" in str(report)) is noted


@pytest.mark.parametrize("calibration", [None, IDS])
def test_interruption_changes_nothing(calibration: Tensor | None) -> None:
    model = tied().train()
    before = snapshot(model)
    ids = IDS

    def stop(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with torch.no_grad():
        dense = model(ids)
    with pytest.raises(KeyboardInterrupt):
        compress(model, "w4", calibration, progress=stop)
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids), dense)


@pytest.mark.parametrize(
    ("calibration", "code"),
    [(torch.empty(0, 512, dtype=torch.long), "E-CAL-SHORT"), ([], "E-CAL-SHORT"), ("some text", "E-CAL-FORM"), (torch.rand(2, 8), "E-CAL-FORM")],
)
def test_bad_calibration(calibration: Any, code: str) -> None:
    model = tied()
    before = snapshot(model)
    with pytest.raises(CalibrationError) as caught:
        compress(model, "w4", calibration)
    assert caught.value.code == code and snapshot(model) == before


def test_other_bad_input() -> None:
    model = tied()
    before = snapshot(model)
    cases: list[tuple[Any, Any, type[EffllmError], str]] = [
        (model, "w9", RecipeError, "E-RCP-METHOD"),
        (model, "bipolar(bits=0)", RecipeError, "E-RCP-BITS"),
        (model, "bipolar(solver=gptq)", CalibrationError, "E-CAL-NONE"),
        (model, "bipolar(group=128, pad=false)", WeightError, "E-WGT-PAD"),
        (nn.Sequential(nn.Linear(32, 32, device="meta")), "w4", WeightError, "E-WGT-META"),
        (3, "w4", OptionError, "E-OPT-MODEL"),
    ]
    for target, recipe, kind, code in cases:
        with pytest.raises(kind) as caught:
            compress(target, recipe)
        assert caught.value.code == code, (recipe, caught.value)
        assert caught.value.next_step
    assert snapshot(model) == before


def test_again_finds_nothing_to_do() -> None:
    model = tied()
    compress(model, "w4")
    before = snapshot(model)
    assert not compress(model, "w4").applied
    assert snapshot(model) == before


def test_calibrated_beats_data_free_on_its_own_data() -> None:
    ids = torch.randint(0, 48, (8, 32), generator=torch.Generator().manual_seed(1))
    dense = tied()
    with torch.no_grad():
        wanted = dense(ids)
        results = {}
        for name, calibration in (("search", None), ("gptq", ids)):
            model = tied()
            report = compress(model, "bipolar(bits=2, group=32, offset=none, head_bits=8)", calibration)
            assert len(report.applied) == 8
            results[name] = relative(model(ids), wanted)
    assert results["gptq"] < 0.9 * results["search"], results


def test_training_flag_and_progress() -> None:
    model = tied().eval()
    seen: list[tuple[int, int, str]] = []
    compress(model, "w4", progress=lambda done, total, name: seen.append((done, total, name)))
    assert [d for d, _, _ in seen] == list(range(1, 9)) and {t for _, t, _ in seen} == {8}
    assert len({n for _, _, n in seen}) == 8
    assert not any(m.training for m in model.modules() if isinstance(m, PackedLinear))
