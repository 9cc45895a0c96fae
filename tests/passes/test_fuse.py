"""Norms, gated units and rotations as one op each: found in every family, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from effllm import backend, compat
from effllm.passes.base import is_op
from tests.hf.families import VOCAB, tiny

FOUND = {  # norms, gated units, rotations of two layers
    "llama": (5, 2, 4), "qwen2": (5, 2, 4), "qwen3": (9, 2, 4), "mistral": (5, 2, 4), "gemma2": (9, 2, 4), "gemma3": (13, 2, 4),
    "phi3": (5, 2, 4), "phi": (0, 0, 4), "gpt_neox": (0, 0, 4), "gpt2": (0, 0, 0),
}  # fmt: skip


def rewritten(model, ids):
    options = backend.Options.parse({"recipe": "dense", "layers": "inline", "step": "off", "inner": "eager"}, None)
    done = backend.capture(model, {"input_ids": ids, "use_cache": False}, options)
    assert done is not None
    return done


@pytest.mark.parametrize("family", FOUND)
def test_every_family(family):
    model, ids = tiny(family), torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    done = rewritten(model, ids)
    counts = tuple(sum(is_op(n, op) for n in done.gm.graph.nodes) for op in ("rms_norm", "glu", "rotate"))
    assert counts == FOUND[family], [d for p in done.report.passes if p.name.startswith("fuse") for d in p.decisions]
    assert compat.fake_mode(done.gm.graph) is not None


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(family, dtype, monkeypatch):
    """The ops decompose into what they replaced, operation by operation: no bit differs without Inductor, with torch's own attention."""
    monkeypatch.setattr(compat, "ATTENTION", ())
    model, ids = tiny(family, dtype), torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="effllm", options={"recipe": "dense", "step": "off", "inner": "eager"})
        got = compiled(input_ids=ids, use_cache=False).logits
    assert torch.equal(got, want)
