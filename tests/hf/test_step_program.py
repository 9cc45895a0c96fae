"""Decoding steps of many families in one native call: the same logits as without it, and which families it takes."""

from __future__ import annotations

import pytest
import torch

import effllm
from effllm import backend
from effllm.hf.static import StaticRunner
from tests.hf.families import VOCAB, tiny

WHOLE = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "phi", "gpt_neox")
STEPS = 3  # the first two differ from later ones where a window's cache counts in Python, and each such step is compiled anew


def steps(model, step, recipe="dense", rows=1):
    """Logits of some decoding steps under the backend, and the report of the step's graph; eager ones where `step` is None."""
    torch._dynamo.reset()

    def wrap(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="effllm", options={"recipe": recipe, "step": step, "inner": "eager"})

    runner = StaticRunner(model, wrap if step else None, length=32, prefill_length=24, compile_prefill=False)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    runner.start(ids)
    out = [runner.decode_step(torch.tensor([[5 + i]]), torch.tensor([[9 + i]])) for i in range(STEPS)]
    return torch.cat(out), effllm.last_report() if step else None


def eager(model):
    """The same steps without a compiler."""
    return steps(model, None)[0]


def decision(report):
    return next(d for p in report.passes if p.name == "step_program" for d in p.decisions)


@pytest.mark.parametrize("family", WHOLE)
def test_families_run_as_one_call(family):
    model = tiny(family)
    got, report = steps(model, "auto")
    found = decision(report)
    assert found.action == "applied", found
    assert found.config["around"] == [], found  # embeddings, angles and masks are inside
    want = eager(model)
    assert torch.allclose(got, want, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("family", "recipe"), [("llama", "w8"), ("llama", "w4"), ("llama", "w4a8"), ("llama", "bipolar(bits=3, group=64)"), ("gemma3", "w4a8"), ("gpt2", "w4")]
)
def test_packed_weights_in_bf16(family, recipe):
    model = tiny(family, torch.bfloat16)
    effllm.compress(model, recipe)
    got, report = steps(model, "auto")
    assert decision(report).action == "applied", decision(report)
    want = eager(model)
    scale = float(want.float().abs().max())
    # both round to bf16 at some thirty places, not at the same ones
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 0.05
    assert torch.isfinite(got.float()).all() and scale > 0


@pytest.mark.parametrize("recipe", ["dense", "w4"])
def test_nine_tokens_at_once_are_one_call(recipe):
    """A short prompt, or drafted tokens to be verified."""
    model = tiny("llama", torch.float32)
    if recipe != "dense":
        effllm.compress(model, recipe)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    outs = []
    for step in ("auto", "off"):
        torch._dynamo.reset()
        options = {"recipe": "dense", "step": step, "inner": "eager"}
        wrap = lambda f, options=options: torch.compile(f, fullgraph=True, dynamic=False, backend="effllm", options=options)  # noqa: E731
        outs.append(StaticRunner(model, wrap, length=32, prefill_length=9).prefill(ids)[0])
        assert decision(effllm.last_report()).action == ("applied" if step == "auto" else "kept")
    assert torch.allclose(outs[0], outs[1], atol=2e-4 * float(outs[1].abs().max()))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_temperature_that_changes_with_each_step_makes_one_more_graph(inner):
    model = tiny("llama")
    torch._dynamo.reset()
    runner, other = (StaticRunner(model, None, length=32, prefill_length=9) for _ in range(2))
    for each in (runner, other):
        each.start(torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0)))
    eager, before = runner._decode, list(backend.reports)  # the newest 64, which may be all there is room for

    def sample(model, token, position, cache, temperature):
        return torch.softmax(eager(model, token, position, cache) / temperature, -1)

    call = torch.compile(sample, fullgraph=True, backend="effllm", options={"recipe": "dense", "inner": inner})
    with torch.no_grad():
        for i, temperature in enumerate((0.3, 0.6, 0.9, 1.4)):
            token, position = torch.tensor([[5 + i]]), torch.tensor([[9 + i]])
            got = call(model, token, position, runner._cache, temperature)
            want = torch.softmax(other.decode_step(token, position) / temperature, -1)
            assert torch.allclose(got, want, atol=1e-4)
    assert decision(effllm.last_report()).action == "applied"
    assert sum(all(r is not b for b in before) for r in backend.reports) == 2


def test_several_rows_of_a_batch_and_threads():
    model = tiny("llama", torch.bfloat16)
    effllm.compress(model, "w4")
    outs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(steps(model, "auto")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])  # cuts are by outputs: sums do not depend on them


def test_a_step_past_the_end_of_the_cache_raises_and_changes_nothing():
    model = tiny("llama")
    torch._dynamo.reset()

    def wrap(function):
        return torch.compile(function, fullgraph=True, backend="effllm", options={"recipe": "dense", "inner": "eager"})

    runner = StaticRunner(model, wrap, length=16, prefill_length=8, compile_prefill=False)
    runner.start(torch.randint(3, VOCAB, (1, 15)))
    runner.decode_step(torch.tensor([[5]]), torch.tensor([[15]]))
    layer = runner._cache.layers[0]
    keys = layer.keys.clone()
    with pytest.raises(RuntimeError, match="past the end"):
        runner.decode_step(torch.tensor([[6]]), torch.tensor([[16]]))
    assert torch.equal(layer.keys, keys)


def test_what_lies_between_layers_is_named():
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Softplus()
    _, report = steps(model, "auto")
    found = decision(report)
    assert (found.action, found.code) == ("kept", "split") and "mlp" in found.reason and "softplus" in found.reason


def test_a_profile_adds_up():
    from effllm.runtime.step import programs

    torch._dynamo.reset()
    model = tiny("llama", torch.bfloat16)
    effllm.compress(model, "w8")

    def wrap(function):
        return torch.compile(function, fullgraph=True, backend="effllm", options={"inner": "eager"})

    runner = StaticRunner(model, wrap, length=32, prefill_length=8, compile_prefill=False)
    known = set(programs)
    runner.start(torch.randint(3, VOCAB, (1, 4)))
    runner.decode_step(torch.tensor([[5]]), torch.tensor([[4]]))
    (program,) = set(programs) - known
    program.profile = torch.zeros(len(program.code.steps) + 1, dtype=torch.int64)
    runner.decode_step(torch.tensor([[5]]), torch.tensor([[5]]))
    *parts, whole = program.profile.tolist()
    assert min(parts) > 0 and sum(parts) <= whole * torch.get_num_threads()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_padded_batch_is_one_call_without_copies(family):
    """Masks by row, merged products whose parts lie apart, and positions by row: all inside; the tokens are those of each prompt alone."""
    model = tiny(family)
    effllm.compress(model, "w8")
    prompts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 2)]
    together = effllm.generate(model, prompts, max_new_tokens=6, eos_token_id=-1, compile=True)
    found = decision(effllm.last_report())
    assert found.action == "applied" and found.config["around"] == [], found
    assert found.config["instructions"] < 20 * len(model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h) + 40
    alone = [effllm.generate(model, [p], max_new_tokens=6, eos_token_id=-1)[0] for p in prompts]
    assert [list(t) for t in together] == [list(t) for t in alone]
