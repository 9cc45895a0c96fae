"""Decoding steps in one native call where linears and caches have no instruction of their own: the program calls their kernels."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import effllm
from effllm.autotune import skip_gain
from effllm.errors import EffllmError
from effllm.hf.static import StaticRunner
from effllm.lowering.op import OPS
from tests.hf.families import VOCAB, tiny

CACHES = (
    "kivi(page=32,window=32,bits=4,group=32)", "kivi(page=32,window=32,bits=2,group=32)", "gear(page=32,window=32,bits=4,group=32)",
    "mustafar(sparsity=0.5,page=64,window=32)", "bfp(page=32,window=32,block=16)",
)  # fmt: skip
WEIGHTS = ("svd(ratio=0.5)", "svd(ratio=0.5,bits=8)", "monarch(ratio=0.5)", "nm(pattern=2:4,solver=magnitude)", "nm(pattern=2:4,solver=magnitude,bits=8)")


def steps(model, step, kv=None, count=3, rows=1, prompt=60):
    """Logits of some decoding steps, and the report of the step's graph."""
    torch._dynamo.reset()

    def wrap(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="effllm", options={"recipe": "dense", "step": step, "inner": "eager"})

    runner = StaticRunner(model, wrap, length=192, prefill_length=prompt + 4, compile_prefill=False, kv=kv)
    runner.start(torch.randint(3, VOCAB, (1, prompt), generator=torch.Generator().manual_seed(0)))
    out = [runner.decode_step(torch.tensor([[5 + i % 40]]), torch.tensor([[prompt + i]])) for i in range(count)]
    return torch.cat(out), effllm.last_report(), runner


def decision(report):
    return next(d for p in report.passes if p.name == "step_program" for d in p.decisions)


@pytest.mark.parametrize("cache", CACHES)
def test_compressed_caches_across_pages(cache):
    model = tiny("llama", torch.float32)
    got, report, _ = steps(model, "auto", cache, 70)  # pages are packed on the way
    assert decision(report).action == "applied", decision(report)
    assert decision(report).config["around"] == []
    want, plain, _ = steps(model, "off", cache, 70)
    assert decision(plain).action == "kept"
    assert torch.allclose(got, want, atol=3e-4 * float(want.abs().max()))


@pytest.mark.parametrize("recipe", WEIGHTS)
def test_weights_of_other_formats(recipe):
    model = tiny("llama", torch.bfloat16)
    effllm.compress(model, recipe)
    got, report, _ = steps(model, "auto")
    assert decision(report).action == "applied", decision(report)
    want, _, _ = steps(copy.deepcopy(model), "off")
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 0.05


def test_a_full_cache_raises_with_its_reason_and_is_left_as_it_was():
    model = tiny("llama", torch.float32)
    _, report, runner = steps(model, "auto", CACHES[0], 3)
    assert decision(report).action == "applied"
    layer = runner._cache.layers[0]
    full = layer.pages.shape[1] * 32 + layer.ring.shape[3]
    for n in runner._cache.layers:
        n.lens[0] = full
    before = [t.clone() for t in (layer.pages, layer.ring, layer.lens)]
    with pytest.raises(RuntimeError, match="E-KVC-FULL"):
        runner.decode_step(torch.tensor([[6]]), torch.tensor([[80]]))
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.pages, layer.ring, layer.lens), strict=True))


def test_a_kernel_that_needs_torch_keeps_the_graph_and_is_named(monkeypatch):
    model = tiny("llama", torch.float32)
    op = OPS["kv_attend"]
    for name, provider in list(op.providers.items()):
        if name.startswith("cpu-"):
            monkeypatch.setitem(op.providers, name, replace(provider, call=lambda *a, run=provider.call: run(*a).sin()))
    _, report, _ = steps(model, "auto", CACHES[0])
    found = decision(report)
    assert (found.action, found.code) == ("kept", "unsupported") and "aten.sin" in found.reason


def test_threads_do_not_change_the_result():
    model = tiny("llama", torch.bfloat16)
    effllm.compress(model, "w4")
    outs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(steps(model, "auto", CACHES[0], 5)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(outs[0], outs[1], atol=2e-2) and torch.allclose(outs[0], outs[2], atol=2e-2)


def test_errors_of_bad_options_are_ours():
    with pytest.raises(EffllmError):
        StaticRunner(tiny("llama"), None, length=64, prefill_length=8, kv="kivi(bits=5)")


@pytest.mark.parametrize("recipe", ["act:teal(sparsity=0.5, allocation=uniform)", "w4+act:chess(sparsity=0.5)"])
def test_thresholded_linears(recipe, monkeypatch):
    monkeypatch.setattr(skip_gain, "slower", lambda *args, **kw: None, raising=False)
    model = tiny("llama", torch.float32)
    effllm.compress(model, recipe, calibration=torch.randint(3, VOCAB, (64, 256), generator=torch.Generator().manual_seed(1)))
    got, report, _ = steps(model, "auto")
    assert decision(report).action == "applied", decision(report)
    want, plain, _ = steps(copy.deepcopy(model), "off")
    assert decision(plain).action == "kept"
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 1e-3
