"""The bench on a tiny model: schema, interleaving, and the check that comes before the clock."""

from __future__ import annotations

import pytest
import torch

from effllm.autotune import machine
from effllm.errors import KernelError, OptionError, RecipeError
from effllm.hf import bench, measure, plot, texts, variants
from effllm.hf.static import StaticRunner
from effllm.hf.variants import Shape, Variant
from tests.hf.tiny import tiny_llama, tiny_text, tiny_tokenizer

SHAPE = Shape(prompt=8, tokens=6, prefill=16)
ROW = {"variant", "recipe", "decode_tok_s", "prefill_tok_s", "ttft_s", "weight_bytes", "bits_per_weight", "perplexity", "peak_rss_bytes", "sample"}


def eager(name: str, model) -> Variant:
    return Variant(name, None, model, StaticRunner(model, None, length=SHAPE.length, prefill_length=SHAPE.prefill))


def test_cache_length_is_rounded_up():
    assert Shape().length == 128 and Shape(prompt=64, tokens=65).length == 256


@pytest.mark.slow
def test_run_fills_the_schema(tmp_path):
    tokenizer, seen = tiny_tokenizer(), []
    windows = texts.windows(tokenizer, tiny_text(), 512, 2)
    plan = bench.Plan(["w8"], ["eager-bf16", "inductor-bf16-freezing"], SHAPE, rounds=2, windows=windows, compile_prefill=False, sample_tokens=4)
    result = bench.run(tiny_llama(layers=1), tokenizer, plan, lambda what, share: seen.append(share))
    assert [r["variant"] for r in result["rows"]] == ["eager-bf16", "inductor-bf16-freezing", "effllm-w8"]
    for row in result["rows"]:
        assert set(row) >= ROW
        low, high = row["decode_tok_s_range"]
        assert 0 < low <= row["decode_tok_s"] <= high
        assert row["checked_error"] <= measure.TOLERANCE
        assert row["sample"]
    dense, w8 = result["rows"][0], result["rows"][2]
    assert dense["kl"] == 0 and dense["bits_per_weight"] == 16 and w8["bits_per_weight"] < 10
    assert w8["perplexity"] == pytest.approx(dense["perplexity"], rel=0.02)
    assert result["machine"]["read_bandwidth_gb_s"] > 0
    assert seen == sorted(seen) and seen[-1] == 1
    plot.bench_png(result, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_rounds_are_interleaved():
    order = []
    made = [eager(name, tiny_llama()) for name in "ab"]
    for v in made:
        decode = v.runner.decode
        v.runner.decode = lambda *a, _d=decode, _n=v.name: order.append(_n) or _d(*a)  # type: ignore[method-assign]
    times = measure.measure(made, torch.randint(3, 64, (1, 16)), SHAPE, 3)
    assert "".join(order) == "ababab"
    assert all(len(t.decode) == len(t.prefill) == 3 and min(t.decode) > 0 for t in times.values())


def test_peaks_are_of_the_own_turns_and_own_weights():
    if not machine.reset_peak_rss():
        pytest.skip("the peak cannot be reset here")
    large, small = eager("large", tiny_llama()), eager("small", tiny_llama())
    size, decode = 1 << 28, large.runner.decode

    def greedy(*args):
        torch.ones(size // 4).sum()
        return decode(*args)

    large.runner.decode = greedy  # type: ignore[method-assign]
    times = measure.measure([large, small], torch.randint(3, 64, (1, 16)), SHAPE, 2)
    assert times["large"].peak - times["small"].peak > 0.9 * size
    # weights of another variant are not charged; those of its own and of nobody are
    other = torch.nn.Linear(4096, 1024)
    own = bench._own_peak(times["small"], small.model, [small.model, other, other, None])
    assert times["small"].peak - own == other.weight.nbytes + other.bias.nbytes


def test_no_reset_no_peak(monkeypatch):
    monkeypatch.setattr(machine, "reset_peak_rss", lambda: False)
    v = eager("a", tiny_llama())
    times = measure.measure([v], torch.randint(3, 64, (1, 16)), SHAPE, 1)
    assert times["a"].peak is None and bench._own_peak(times["a"], v.model, [v.model]) is None
    plan = bench.Plan([], ["eager-bf16"], SHAPE, rounds=1, sample_tokens=2)
    result = bench.run(tiny_llama(), tiny_tokenizer(), plan)
    assert result["rows"][0]["peak_rss_bytes"] is None and "not measured" in result["settings"]["peak_rss"]


def test_a_wrong_graph_is_refused_before_timing():
    model = tiny_llama()
    variant = eager("wrong", model)
    right = variant.runner._decode
    variant.runner._decode = lambda *a: right(*a).roll(1, -1)
    with pytest.raises(KernelError, match="E-KRN-RESULT"):
        measure.check(variant, torch.randint(3, 64, (1, 16)), SHAPE)
    assert measure.check(eager("right", model), torch.randint(3, 64, (1, 16)), SHAPE) < 0.05


def test_a_graph_of_nan_is_refused():
    variant = eager("nan", tiny_llama())
    variant.runner._prefill = lambda *a: torch.full((1, 64), float("nan"))
    with pytest.raises(KernelError, match="E-KRN-RESULT"):
        measure.check(variant, torch.randint(3, 64, (1, 16)), SHAPE)


@pytest.mark.parametrize(("recipes", "baselines", "error"), [(["w8"], ["inductor"], OptionError), (["w88"], ["eager-bf16"], RecipeError)])
def test_names_are_checked_before_work(recipes, baselines, error):
    with pytest.raises(error):
        bench.run(None, None, bench.Plan(recipes, baselines))


def test_fp32_baseline_leaves_the_model_alone():
    dense = tiny_llama()
    variant = variants.baseline("inductor-fp32-autotune", dense, SHAPE)
    assert variant.model.dtype == torch.float32 and dense.dtype == torch.bfloat16
    assert variants.baseline("inductor-bf16", dense, SHAPE).model is dense


