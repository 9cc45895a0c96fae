"""Every model family under the backend and under compress: right numbers, known rewrites, no graph of effllm's own making.

The reference is the same model with every rewritten weight replaced by unpack(pack(weight)): it has the quantization error, so
what is left is rounding, and the tolerance is that of fp32 sums in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effllm import backend
from effllm.compression import compress
from effllm.hf import variants
from effllm.hf.static import StaticRunner
from effllm.lowering import providers
from effllm.lowering.op import Problem
from effllm.recipe import Recipe
from effllm.report import Report
from effllm.runtime import dense
from effllm.runtime.formats import bipolar
from effllm.runtime.packed import PackedWeight
from effllm.solvers import solve
from tests.hf.families import FAMILIES, VOCAB, shallow, tiny
from tests.models import relative

# one grid for all: under offset=auto siblings of random weights differ by chance
W8, W4A8 = Recipe.parse("w8(offset=none)"), Recipe.parse("w4a8(offset=none)")
PROMPT, STEPS = 5, 16
DECODERS = [f for f in FAMILIES if f != "bert"]
ROUNDING = 2e-5


@dataclass
class Run:
    """One family's prefill and decode: logits, and a report per graph."""

    prefill: Tensor
    decode: Tensor
    reports: list[Report] = field(default_factory=list)
    a8: list[Report] = field(default_factory=list)  # the same graphs under W4A8


def ids_of(count: int) -> Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(1))


def drive(family: str, model: Any, compile_: Callable[..., Any] | None) -> Run:
    """Prefill of 12 tokens, and 16 given tokens decoded one by one after a prompt of 5 (a window of 8 fills on the way).

    The prompt of 5 is always read by the dense model in eager mode, as the runner does for lengths that are not compiled.
    """
    torch._dynamo.reset()
    runner = StaticRunner(model, compile_, length=48, prefill_length=12)
    prefill = runner.prefill(ids_of(12))[0].clone()
    ids = ids_of(PROMPT + STEPS)
    runner.model = tiny(family)
    runner.start(ids[:, :PROMPT])
    runner.model = model
    outs = [runner.decode_step(ids[:, i : i + 1], torch.tensor([[i]])).clone() for i in range(PROMPT, PROMPT + STEPS)]
    return Run(prefill, torch.stack(outs))


@cache
def compiled(family: str) -> Run:
    """The family under the effllm backend, with every graph in one piece."""
    reports: list[Report] = []
    a8: list[Report] = []

    def recording(gm: Any, inputs: Any) -> Any:
        a8.append(backend.rewrite(gm, backend.Options(W4A8)).report)
        call = backend.effllm(gm, inputs, options={"recipe": W8, "inner": "eager", "max_slowdown": 1e9})
        reports.append(backend.last_report())
        return call

    run = drive(family, tiny(family), lambda f: torch.compile(f, fullgraph=True, backend=recording))
    run.reports, run.a8 = reports, a8
    return run


def dequantized(family: str, report: Report) -> Any:
    """The family's model with each weight that the report says was packed replaced by what was packed."""
    model, other = tiny(family), tiny(family)
    for d in report.passes[0].decisions:
        if d.action == "applied":
            module = model.get_submodule(d.module)
            w = dense.matrix(module).detach()
            rule = W8.rule_for(d.module, dense.kind_of(module) or "linear", (w.shape[0], w.shape[1]))
            put(other, d.module, bipolar.unpack(solve(w.contiguous(), rule.params), torch.float32))
    return other


def put(model: Any, name: str, matrix: Tensor) -> None:
    """Give one module an (out, in) matrix; a weight that it was tied to stays."""
    module = model.get_submodule(name)
    module.weight = nn.Parameter(matrix.t() if dense.is_transposed(module) else matrix)


@pytest.mark.parametrize("family", DECODERS)
def test_backend_equals_the_dequantized_model(family: str) -> None:
    got = compiled(family)
    want, plain = (drive(family, m, None) for m in (dequantized(family, got.reports[0]), tiny(family)))
    for a, b, c in ((got.prefill, want.prefill, plain.prefill), (got.decode, want.decode, plain.decode)):
        assert relative(a, b) < ROUNDING < relative(a, c) < 0.2  # experts that change places are the most


def codes(report: Report, name: str) -> dict[str, int]:
    """Decisions of a pass, counted by code."""
    found = next(p for p in report.passes if p.name == name)
    return dict(Counter(d.code for d in found.decisions))


GOLDEN = {
    # rewritten weights, embeddings and head among them
    # |   parameters of other ops: stacked experts
    # |   |  merged groups: (q, k, v) and (gate, up)
    # |   |  |  not mergeable: outputs that fill no tiles
    # |   |  |  |   alone with their activation
    # |   |  |  |   |  quantizations that w4a8 shares
    # |   |  |  |   |  |  attention calls of decode that the kernel takes
    # |   |  |  |   |  |  |  graphs: prefill, decode, and with a window decode once it is full
    "llama": (16, 0, 4, 1, 4, 6, 2, 2),
    "qwen2": (16, 0, 4, 1, 4, 6, 2, 2),  # q, k, v have biases
    "qwen3": (16, 0, 4, 1, 4, 6, 2, 2),
    "mistral": (16, 0, 2, 5, 4, 6, 2, 3),  # gate and up have 100 outputs
    "gemma2": (16, 0, 4, 1, 4, 6, 0, 3),  # soft-capped scores: transformers calls no attention op
    "gemma3": (16, 0, 4, 1, 4, 6, 2, 3),
    "phi3": (10, 0, 0, 1, 8, 0, 2, 2),  # one matrix for q, k, v and one for gate, up
    "phi": (14, 0, 2, 1, 4, 6, 2, 2),  # attention and MLP read the same norm
    "gpt2": (11, 0, 0, 7, 2, 0, 2, 2),  # Conv1D, one matrix for q, k, v
    "gpt_neox": (10, 0, 0, 1, 8, 0, 2, 2),
    "mixtral": (12, 4, 2, 3, 2, 4, 2, 2),  # routers are rewritten, experts are not
    "qwen2_moe": (20, 4, 4, 5, 4, 8, 2, 2),
}


def row(run: Run) -> tuple[int, ...]:
    first, last = run.reports[0], run.reports[-1]
    linear, merge = codes(last, "packed_linear"), codes(last, "merge_linear")
    assert codes(first, "packed_linear") == linear and codes(first, "merge_linear") == merge
    assert linear.keys() <= {"applied", "other-op"} and merge.keys() <= {"merged", "not-mergeable", "alone"}
    assert codes(run.a8[0], "share_activation") == codes(run.a8[-1], "share_activation")
    counts = [linear.get("applied", 0), linear.get("other-op", 0), *(merge.get(c, 0) for c in ("merged", "not-mergeable", "alone"))]
    shared = codes(run.a8[-1], "share_activation").get("shared", 0)
    return (*counts, shared, codes(last, "attention").get("applied", 0), len(run.reports))


def prompts() -> str:
    """What a Decision says of a prompt's attention here: plain C++ leaves it to torch."""
    return "no-kernel" if providers.select(Problem("prompt_attention", 4, 16, 0, 0, False, m=12))[0].name == "reference" else "applied"


@pytest.mark.skipif(bool(providers.load("cpu")), reason="the reference kernel merges nothing")
@pytest.mark.parametrize("family", DECODERS)
def test_what_is_rewritten(family: str) -> None:
    run = compiled(family)
    assert row(run) == GOLDEN[family]
    # prefill has its own kernel, where there is one: as many calls
    calls = codes(run.reports[-1], "attention").get("applied", 0)
    assert codes(run.reports[0], "attention").get(prompts(), 0) == calls


@pytest.mark.parametrize("family", DECODERS)
def test_no_recompile_that_torch_alone_would_not_make(family: str) -> None:
    if len(compiled(family).reports) == 2:  # one for the prompt and one for steps: there cannot be fewer
        return
    graphs: list[Any] = []

    def plain(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    drive(family, tiny(family), lambda f: torch.compile(f, fullgraph=True, backend=plain))
    assert len(compiled(family).reports) == len(graphs)


@pytest.mark.slow
def test_the_bench_decodes_a_window_through_inductor() -> None:
    # Dynamo must be free to make the window's fill level symbolic, or every step is a new graph and the limit is an error
    model = shallow("mistral")
    compress(model, "w4")
    runner = variants.packed("w4", model, variants.Shape(prompt=PROMPT, tokens=STEPS, prefill=12), compile_prefill=False).runner
    _, outs = runner.decode(runner.start(ids_of(PROMPT)), PROMPT, STEPS)
    plain = StaticRunner(model, None, length=48, prefill_length=12)
    _, want = plain.decode(plain.start(ids_of(PROMPT)), PROMPT, STEPS)
    assert relative(torch.stack(outs), torch.stack(want)) < ROUNDING


def test_experts_that_stay_dense_say_why() -> None:
    others = [d for d in compiled("mixtral").reports[0].passes[0].decisions if d.code == "other-op"]
    assert {d.module for d in others} == {f"model.layers.{i}.mlp.experts.{w}_proj" for i in (0, 1) for w in ("gate_up", "down")}
    assert all(d.action == "kept" and "(4, " in d.reason and "transpose" in d.reason for d in others)


def output(model: Any, ids: Tensor) -> Tensor:
    """Logits, or an encoder's last hidden states; without a cache."""
    with torch.no_grad():
        out = model(input_ids=ids) if model.config.model_type == "bert" else model(input_ids=ids, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def test_encoder_equals_the_dequantized_model() -> None:
    torch._dynamo.reset()
    ids = ids_of(24).view(2, 12)
    got = output(torch.compile(tiny("bert"), fullgraph=True, backend="effllm", options={"recipe": W8, "inner": "eager", "max_slowdown": 1e9}), ids)
    report = backend.last_report()
    assert codes(report, "packed_linear") == {"applied": 3 + 2 * 6 + 1} and codes(report, "attention") == {prompts(): 2}
    assert relative(got, output(dequantized("bert", report), ids)) < ROUNDING < relative(got, output(tiny("bert"), ids)) < 0.05


# what compress leaves dense, by code: stacked experts and routers are no modules, Gemma's embedding scales its rows
KEPT = {
    "mixtral": {"other-module": 2 * 3}, "qwen2_moe": {"other-module": 2 * 3}, "gemma2": {"not-plain": 1}, "gemma3": {"not-plain": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_equals_the_dequantized_model(family: str) -> None:
    model, other, ids = tiny(family), tiny(family), ids_of(24).view(2, 12)
    report = compress(model, "w4")
    assert dict(Counter(d.code for d in report.decisions if d.action != "applied")) == KEPT.get(family, {})
    for name, weight in ((n.removesuffix(".weight"), m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedWeight)):
        put(other, name, weight.dense())
    want = output(other, ids)
    assert relative(output(model, ids), want) < ROUNDING < relative(want, output(tiny(family), ids))
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="effllm", options={"recipe": "dense", "inner": "eager"})
    assert relative(output(call, ids), want) < ROUNDING


def test_conv1d_survives_save_and_load(tmp_path: Any) -> None:
    import effllm

    model, ids = tiny("gpt2"), ids_of(12)
    compress(model, "w4")
    assert torch.equal(output(effllm.load(effllm.save(model, tmp_path / "packed")), ids), output(model, ids))
    tiny("gpt2").save_pretrained(tmp_path / "dense")
    read, _ = compress(tmp_path / "dense", "w4")
    assert torch.equal(output(read, ids), output(model, ids))


def test_conv1d_is_calibrated_on_its_inputs() -> None:
    model, searched, ids = tiny("gpt2"), tiny("gpt2"), ids_of(120)
    want = output(model, ids)
    compress(searched, "w3")
    compress(model, "w3", calibration=ids.view(4, 30))
    assert relative(output(model, ids), want) < relative(output(searched, ids), want)
