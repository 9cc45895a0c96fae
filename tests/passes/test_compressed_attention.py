"""The pass "compressed_attention": what it fuses, what it leaves alone and why, and that nothing is copied or recompiled while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effllm import backend
from effllm.backend import Options, rewrite
from effllm.hf.cache import CompressedCache
from effllm.lowering import providers
from effllm.report import Decision
from effllm.runtime.caches.layer import Layer
from tests.hf.tiny import tiny_llama

SPEC = "kivi(bits=4,page=16,group=16,window=4)"
needs_kernel = pytest.mark.skipif(bool(providers.load("cpu")), reason="no compiled kernels here")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend.reports.clear()


def rewritten(step: Any, *args: Any) -> tuple[torch.fx.GraphModule, list[Decision]]:
    """The graph of a step after the passes, and the Decisions of this one."""
    found: list[Any] = []

    def look(gm: torch.fx.GraphModule, _: Any) -> Any:
        options = Options.parse({"recipe": "dense"}, None)
        found.append(rewrite(gm, options))
        names = [str(n.target) for n in found[0].gm.graph.nodes]
        assert [str(n.target) for n in rewrite(found[0].gm, options).gm.graph.nodes] == names  # a second time changes nothing
        return gm.forward

    with torch.no_grad():
        torch.compile(step, backend=look, fullgraph=True)(*args)
    return found[0].gm, next(p for p in found[0].report.passes if p.name == "compressed_attention").decisions


def layer(spec: str = SPEC) -> Layer:
    made = Layer(spec, 100)
    x = torch.randn(1, 2, 50, 32, generator=torch.Generator().manual_seed(0))
    made.allocate(x, x)
    made.append(x, x)
    return made


def attend(cache: Layer, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
    keys, values = cache.update(k, v)
    b, g, s, d = keys.shape
    keys, values = (t[:, :, None, :, :].expand(b, g, 2, s, d).reshape(b, 2 * g, s, d) for t in (keys, values))
    mask = torch.arange(s) < cache.lens[0]
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask[None, None, None], **kw)


def operands(n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, n, 32, generator=g), torch.randn(1, 2, n, 32, generator=g), torch.randn(1, 2, n, 32, generator=g)


@needs_kernel
@pytest.mark.parametrize("spec", [SPEC, "gear(bits=2,page=16,group=16,window=4)"])
def test_append_and_one_fused_op_are_left(spec: str) -> None:
    gm, decisions = rewritten(lambda *a: attend(layer_, *a), *operands()) if (layer_ := layer(spec)) else (None, [])
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert sum("kv_append" in t for t in called) == 1 and sum("kv_attend" in t for t in called) == 1
    assert not any(w in t for t in called for w in ("kv_read", "scaled_dot"))
    assert [(d.action, d.code) for d in decisions] == [("applied", "append"), ("applied", "applied")]
    assert decisions[1].config["heads_per_key_head"] == 2 and decisions[1].kernel and "of the bytes" in decisions[1].reason


@needs_kernel
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda c, q, k, v: attend(c, q, k, v, dropout_p=0.5), "options"),
        (lambda c, q, k, v: attend(c, q.expand(1, 4, 7, 32), k, v), "many-queries"),
        (lambda c, q, k, v: attend(c, q, k, v) + c.read()[0].sum(), None),
        (lambda c, q, k, v: c.update(k, v)[0].sum() + q, "pattern"),
        (lambda c, q, k, v: torch.nn.functional.scaled_dot_product_attention(q[:, :2], *(t * 2 for t in c.update(k, v))), "pattern"),
    ],
)
def test_what_is_left_alone_says_why(change: Any, code: str | None) -> None:
    cache = layer()
    gm, decisions = rewritten(lambda *a: change(cache, *a), *operands())
    kept = [d for d in decisions if d.action == "kept"]
    if code is not None:
        assert [d.code for d in kept] == [code] and "decompressed" in kept[0].reason
    assert any("kv_read" in str(n.target) for n in gm.graph.nodes)


def test_a_format_without_kernel_is_kept_with_the_reason() -> None:
    cache = layer("dense(page=16,window=4)")
    _, decisions = rewritten(lambda *a: attend(cache, *a), *operands())
    assert [d.code for d in decisions if d.action == "kept"] == ["no-kernel"]


@needs_kernel
@pytest.mark.parametrize("compiler", ["inductor", "effllm"])
def test_one_graph_from_the_first_page_to_the_last_token(compiler: str) -> None:
    model = tiny_llama(torch.float32)
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(2))

    def roll(step: Any) -> Tensor:
        cache, outs = CompressedCache(model, SPEC, 60), []
        with torch.inference_mode():
            logits = model(ids, past_key_values=cache).logits[:, -1]
            for i in range(9, cache.layers[0].limit):
                token = logits.argmax(-1, keepdim=True)
                logits = step(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[i]])).logits[:, -1]
                outs.append(logits)
            assert cache.layers[0].lens.tolist()[0] == cache.layers[0].limit
        return torch.cat(outs)

    want = roll(model.forward)
    options = {"options": {"recipe": "dense"}} if compiler == "effllm" else {}
    got = roll(torch.compile(model.forward, backend=compiler, fullgraph=True, **options))
    assert (got - want).abs().max() < 2e-5 * want.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # written in place, nothing cloned first
    assert not torch._dynamo.utils.counters["inductor"]["possibly_missed_reinplacing_bytes"]
    if compiler == "effllm":
        fused = [d for d in backend.last_report().decisions if d.action == "applied" and d.config.get("cache")]
        assert len(fused) == 2 * len(model.model.layers)
