"""Model families: their gated MLPs and attention projections are found, made sparse and joined in the graph, whatever they are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import effllm
from effllm import backend
from effllm.activation.apply import install
from effllm.activation.calibrate import Recording, parse
from effllm.lowering import providers
from effllm.solvers import blocks
from tests.hf.families import VOCAB, tiny
from tests.models import relative

LAYERS = 2
METHOD = "chess(sparsity=0.5)"
OPTIONS = {"recipe": "dense", "inner": "eager", "max_slowdown": 1e9}


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def sparse(family: str, method: str = METHOD) -> tuple[Any, Any, Any]:
    """The sparse model, what was found, and the report."""
    model = tiny(family)
    ids = text(8, 96)
    found = Recording(model, blocks.batches(ids), ids.numel(), parse(method), lambda _: None).solve(parse(method))
    report, _ = install(model, found, found.plans[0], anyway=True)
    return model, found, report


@pytest.mark.skipif(bool(providers.load("cpu")), reason="no compiled kernels: nothing to join for")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"])
def test_swiglu_geglu_and_attention_of_a_family(family: str) -> None:
    model, found, report = sparse(family)
    fused = family == "phi3"
    roles = Counter(s.role for s in found.sites.values())
    assert len(found.gates) == LAYERS and all(g.activation and (g.half is not None) == fused for g in found.gates.values())
    assert roles["o"] == roles["down"] == LAYERS and (fused or roles["q"] == roles["k"] == roles["v"] == roles["gate"] == roles["up"] == LAYERS)
    codes = Counter(d.code for d in report.decisions)
    assert codes["gate"] == LAYERS and codes["sparse"] == LAYERS * (2 if fused else 3)  # o and down, and q where it is a matrix of its own
    assert codes["fused-qkv"] == (LAYERS if fused else 0)
    steps = (text(1, 1, 5), text(1, 3, 6))
    for step in steps if family in ("llama", "phi3") else steps[1:]:  # one and several rows with gates apart and fused; several with the others
        torch._dynamo.reset()
        with torch.no_grad():
            got = torch.compile(model, fullgraph=True, backend="effllm", options=OPTIONS)(input_ids=step, use_cache=False).logits
            assert relative(got, model(input_ids=step, use_cache=False).logits) < 1e-5
            assert relative(got, tiny(family)(input_ids=step, use_cache=False).logits) > 1e-4  # something was skipped
        joined = [d for d in backend.last_report().decisions if d.code == "joined"]
        assert len(joined) == LAYERS and all(d.config["split"] == fused for d in joined)


def test_an_mlp_without_a_gate_is_left_to_teal() -> None:
    _, found, report = sparse("phi", "teal(sparsity=0.5,allocation=uniform)")
    assert not found.gates and sum(d.action == "applied" for d in report.decisions) == len(found.sites)
    with pytest.raises(effllm.errors.CalibrationError, match="E-CAL-NONE"):
        sparse("phi", "cats(sparsity=0.5)")


@pytest.mark.skipif(bool(providers.load("cpu")), reason="no compiled kernels: nothing to join for")
def test_batches_change_between_steps_of_one_compiled_model() -> None:
    """Rows above and below the limit in turn, and a dynamic number of rows in one graph."""
    model, _, _ = sparse("llama")
    dense = tiny("llama")
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="effllm", options=OPTIONS, dynamic=dynamic)
        for rows in (2, 5, 1, 4, 2):
            step = text(rows, 1, rows)
            with torch.no_grad():
                got, want = (m(input_ids=step, use_cache=False).logits for m in (compiled, model))
                assert relative(got, want) < 1e-5, (dynamic, rows)
                assert (relative(got, dense(input_ids=step, use_cache=False).logits) > 1e-4) == (rows <= 4)


def test_with_a_compressed_cache() -> None:
    """Weights, activations and cache in one recipe: while all tokens are in the cache's exact part, decoding is that without a cache."""
    from effllm.hf.cache import CompressedCache

    model, ids = tiny("llama"), text(2, 24, 8)
    effllm.compress(model, f"w4+act:{METHOD}+kv:kivi(bits=4)", calibration=text(180, 96))
    cache = CompressedCache(model, "kivi")
    with torch.no_grad():
        first = model(input_ids=ids[:1, :20], past_key_values=cache, use_cache=True).logits
        steps = [model(input_ids=ids[:1, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(20, 24)]
        plain = [model(input_ids=ids[:1, :20], use_cache=True)]
        for i in range(20, 24):
            plain.append(model(input_ids=ids[:1, i : i + 1], past_key_values=plain[-1].past_key_values, use_cache=True))
    assert relative(first, plain[0].logits) < 1e-5
    assert all(relative(a, b.logits) < 1e-4 for a, b in zip(steps, plain[1:], strict=True))
