"""Fused attention "kv_attend" over Mustafar, block-floating-point and Matryoshka pages: every build against fp64, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.kernels.cpu import build, kv_formats
from effllm.lowering import kv_cache, providers
from effllm.lowering.op import OPS, Provider
from effllm.runtime.caches.layer import Layer
from effllm.runtime.caches.matryoshka import pack_tables

providers.load("cpu")
SPECS = (
    "mustafar(page=64,window=8,sparsity=0.7)",
    "mustafar(page=256,window=32,sparsity=0.5)",
    "mustafar(page=128,window=0,sparsity=0.7,bits=4)",
    "mustafar(page=64,window=8,sparsity=0.5,bits=8)",
    "bfp(page=64,window=8,bits=4,vbits=8,block=16)",
    "bfp(page=16,window=0,bits=3,vbits=4,block=32)",
    "matryoshka(page=64,window=8,k=24,v=0.75)",
    "matryoshka(page=48,window=5,k=8/16,v=31/1)",
)
OWN = [p for p in OPS["kv_attend"].providers.values() if p.name.rsplit("-", 1)[-1] in kv_formats.CALLS]
PAIRS = [(p, s) for s in SPECS for p in OWN if s.startswith(p.name.rsplit("-", 1)[-1])]
EACH = pytest.mark.parametrize(("kernel", "spec"), PAIRS, ids=lambda x: x.name if isinstance(x, Provider) else x)


def orthogonal(heads: int, dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(seed))).Q


def tables_for(spec: str, heads: int, dim: int) -> list[Tensor] | None:
    g = torch.Generator().manual_seed(9)
    if spec.startswith("matryoshka"):
        return pack_tables(orthogonal(heads, dim, 1), torch.randn(heads, dim, generator=g), orthogonal(heads, dim, 2), torch.randn(heads, dim, generator=g))
    if spec.startswith("bfp"):
        return [torch.stack([torch.randperm(dim, generator=g) for _ in range(heads)]) for _ in range(2)]
    return None


def filled(spec: str, tokens: int, *, heads: int = 2, dim: int = 64, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, heads, tokens, dim, generator=g) * torch.rand(batch, heads, 1, dim, generator=g).mul(2).exp() for _ in range(2))
    layer = Layer(spec, tokens + 70, tables_for(spec, heads, dim))
    layer.allocate(k.to(dtype), v.to(dtype))
    layer.pages.fill_(255)  # whatever no token is in may not be read
    layer.append(k.to(dtype), v.to(dtype))
    behind = int(layer.lens[0])
    for t in range(behind, behind + layer.ring.shape[3] - int(layer.lens[0] - layer.lens[1])):
        layer.ring[:, :, :, t % layer.ring.shape[3]] = torch.nan
    return layer


def queries(layer: Layer, repeat: int, count: int) -> Tensor:
    b, _, g, _, d = layer.ring.shape
    q = torch.randn(b, count, g * repeat, d, generator=torch.Generator().manual_seed(5)).to(layer.ring.dtype)
    return q.transpose(1, 2)  # not contiguous, as a model has it


def exact(layer: Layer, q: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """fp64 attention over the stored values."""
    total, flushed = layer.lens.tolist()
    dim, g = layer.ring.shape[4], layer.ring.shape[2]
    held = layer.format.layout(g, dim, layer.ring.dtype).read(layer.pages[:, : flushed // layer.format.page])
    parts = [t.transpose(1, 2).flatten(2, 3).double() for t in layer.format.decode(held, layer.tables or [])]
    slots = torch.arange(flushed, total) % layer.ring.shape[3]
    k, v = (torch.cat((t, layer.ring[:, i][:, :, slots].double()), 2) for i, t in enumerate(parts))
    r = q.shape[1] // g
    s = q.double() @ k.repeat_interleave(r, 1).mT * scale
    if mask is not None:
        m = mask[..., :total]
        s = s.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else s + m.double()
    return torch.softmax(s, -1).nan_to_num(0.0) @ v.repeat_interleave(r, 1)


def run(kernel: Provider, layer: Layer, q: Tensor, mask: Tensor | None = None, scale: float = 0.125) -> Tensor:
    verdict = kernel.supports(kv_cache.problem("kv_attend", layer.format.spec, q.shape[1], layer.ring, q.shape[2]))
    if not verdict:
        pytest.skip(verdict.reason)
    return kernel.call(q, layer.pages, layer.ring, layer.lens, layer.tables or [], mask, scale, layer.format.spec)


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


@EACH
@pytest.mark.parametrize(("dtype", "dim", "repeat", "count", "tokens"), [
    (torch.float32, 64, 3, 1, 700), (torch.bfloat16, 64, 4, 1, 700), (torch.float16, 64, 1, 1, 333), (torch.bfloat16, 128, 6, 1, 600),
    (torch.float32, 128, 1, 3, 270),
    (torch.bfloat16, 96, 2, 1, 300), (torch.bfloat16, 64, 3, 1, 5),
])  # fmt: skip
def test_value(kernel: Provider, spec: str, dtype: torch.dtype, dim: int, repeat: int, count: int, tokens: int) -> None:
    layer = filled(spec, tokens, dim=dim, dtype=dtype)
    q = queries(layer, repeat, count)
    true = exact(layer, q, None, 0.125)
    plain = exact(layer, q.double(), None, 0.125).to(dtype)  # what one rounding of the result alone costs
    assert distance(run(kernel, layer, q), true) <= 2 * distance(plain, true) + OPS["kv_attend"].tolerance[dtype]


@EACH
def test_masks(kernel: Provider, spec: str) -> None:
    layer = filled(spec, 400)
    q = queries(layer, 2, 2)
    limit = layer.limit
    allowed = torch.rand(2, 1, 2, limit, generator=torch.Generator().manual_seed(3)) < 0.5
    allowed[1, :, :, :300] = False  # left padding over whole pages
    allowed[..., 400:] = False
    added = torch.zeros(1, 4, 1, limit).masked_fill(torch.rand(1, 4, 1, limit, generator=torch.Generator().manual_seed(4)) < 0.3, -torch.inf)
    added += torch.randn(1, 4, 1, limit, generator=torch.Generator().manual_seed(6))
    for mask in (allowed, added):
        true = exact(layer, q, mask, 0.125)
        assert distance(run(kernel, layer, q, mask), true) < 2e-6
    nothing = allowed.clone()
    nothing[0, 0, 1] = False
    y = run(kernel, layer, q, nothing)
    assert (y[0, :, 1] == 0).all() and distance(y, exact(layer, q, nothing, 0.125)) < 2e-6


@EACH
def test_agrees_with_the_reference(kernel: Provider, spec: str) -> None:
    layer = filled(spec, 300)
    q = queries(layer, 2, 1)
    held = kv_cache.attend_reference
    clean = Layer(layer.format, 370, layer.tables)
    clean.allocate(layer.ring[:, 0], layer.ring[:, 1])
    clean.append(*(torch.randn(2, 2, 300, 64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)))
    expected = held(q, clean.pages, clean.ring, clean.lens, clean.tables or [], None, 0.2, spec)
    torch.testing.assert_close(run(kernel, clean, q, None, 0.2), expected, rtol=2e-5, atol=2e-6)


@EACH
def test_threads_and_splits_agree(kernel: Provider, spec: str) -> None:
    layer = filled(spec, 3000, batch=1, heads=2)
    q = queries(layer, 2, 1)
    alone = run(kernel, layer, q)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        # other splits add the 3000 tokens in another order: a few roundings of the largest output
        assert (run(kernel, layer, q) - alone).abs().max() < 8 * torch.finfo(torch.float32).eps * alone.abs().max().clamp_min(1)
    finally:
        torch.set_num_threads(before)


@EACH
def test_nan_reaches_the_output(kernel: Provider, spec: str) -> None:
    layer = filled(spec, 300)
    k, v = (torch.randn(2, 2, 300, 64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    k[0, 1, 3, 5] = torch.nan
    fresh = Layer(spec, 300, layer.tables)
    fresh.allocate(k, v)
    fresh.append(k, v)
    y = run(kernel, fresh, queries(fresh, 2, 1))
    assert y[0, 2:].isnan().all() and y[0, :2].isfinite().all() and y[1].isfinite().all()


def test_wrong_tables_change_the_result() -> None:
    kernel = next(p for p in OWN if p.name == "cpu-portable-bfp")
    layer = filled("bfp(page=64,window=8,bits=4,block=16)", 300)
    q = queries(layer, 2, 1)
    right = run(kernel, layer, q)
    layer.tables = [t.flip(0) for t in layer.tables or []]
    assert distance(run(kernel, layer, q), right.double()) > 0.05


@pytest.mark.parametrize("name", kv_formats.CALLS)
def test_refusals_say_why(name: str) -> None:
    kernel = OPS["kv_attend"].providers[f"cpu-portable-{name}"]
    spec = next(s for s in SPECS if s.startswith(name))
    ring = filled(spec, 5).ring

    def reason(ring: Tensor = ring, count: int | None = 1, spec: str = spec) -> str:
        return kernel.supports(kv_cache.problem("kv_attend", spec, 4, ring, count)).reason

    assert reason() == "" and "dense" in reason(spec="dense") and "float64" in reason(ring.double())
    assert "dynamic" in reason(count=None) and "9 queries" in reason(count=9)


def test_bad_state_is_refused_before_anything_is_read() -> None:
    kernel = OPS["kv_attend"].providers["cpu-portable-mustafar"]
    layer = filled(SPECS[0], 300)
    q = queries(layer, 2, 1)
    for lens in ([300, 10], [300, 300 * 64], [10, 64], [3000, 64]):
        layer.lens.copy_(torch.tensor(lens))
        with pytest.raises(RuntimeError, match="lengths"):
            run(kernel, layer, q)


def test_every_build_is_tried() -> None:
    assert {p.name.split("-")[1] for p in OWN} == {isa.name for isa in build.ISAS}


def test_op_is_traceable() -> None:
    layer = filled(SPECS[0], 300)
    compiled = torch.compile(lambda q: layer.attend(q, kernel="cpu-portable-mustafar"), backend="aot_eager", fullgraph=True)
    q = queries(layer, 2, 1)
    args: list[Any] = [q]
    torch.testing.assert_close(compiled(*args), layer.attend(q, kernel="cpu-portable-mustafar"))
