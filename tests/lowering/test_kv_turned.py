"""The op "kv_attend_turned": attention over packed keys that stand elsewhere than they were packed for, every provider against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.lowering import kv_cache, providers
from effllm.lowering.op import OPS, Provider
from effllm.runtime.caches.layer import Layer
from effllm.runtime.rotary import rotate, shift_angles, turns
from tests.kernels.cpu.test_kv_formats import filled

providers.load("cpu")
SPECS = (
    "kivi(bits=4)", "kivi(bits=2,page=32,group=16,window=8)", "kivi(bits=8,page=128,window=0)", "gear(bits=4,rank=3,outliers=0.05,group=32)",
    "dense(page=16,window=8)", "mustafar(page=64,window=8,sparsity=0.7)", "mustafar(page=128,window=0,sparsity=0.7,bits=4)",
    "bfp(page=64,window=8,bits=4,vbits=8,block=16)", "matryoshka(page=64,window=8,k=24,v=0.75)", "matryoshka(page=48,window=5,k=8/16,v=31/1)",
)  # fmt: skip
HERE = [p for p in OPS["kv_attend_turned"].providers.values() if p.device in ("any", "cpu")]
OMEGA = 10000.0 ** (-torch.arange(24, dtype=torch.float64) / 24)  # 48 of 64 channels turn
SHIFTS = [0, 7, -300, 45]


def rows_of(count: int, kind: str) -> Tensor:
    """Table rows of the slots: one turn for all, segments that end inside pages, or every slot its own."""
    at = torch.arange(count)
    return {"one": torch.full((count,), 2), "segments": (at // 53) % 4, "mixed": (at * 7) % 4}[kind].to(torch.int32)


def call(provider: Provider, layer: Layer, q: Tensor, mask: Tensor | None, row: Tensor, layout: str, shifts: list[int] = SHIFTS) -> Tensor:
    verdict = provider.supports(kv_cache.problem("kv_attend_turned", layer.format.spec, q.shape[1], layer.ring, q.shape[2]))
    if not verdict:
        pytest.skip(verdict.reason)
    try:
        if provider.prepare is not None:
            provider.prepare()
    except KernelError as error:
        pytest.skip(error.cause)
    cos, sin = turns(shift_angles(shifts, OMEGA), q.dtype)
    return provider.call(q, layer.pages, layer.ring, layer.lens, layer.tables or [], mask, row, cos, sin, layout, 0.125, layer.format.spec)


def exact(layer: Layer, q: Tensor, mask: Tensor | None, row: Tensor, layout: str) -> Tensor:
    """fp64 attention over the stored values, keys turned pair by pair."""
    total, flushed = (int(i) for i in layer.lens)
    dim, g = layer.ring.shape[4], layer.ring.shape[2]
    held = layer.format.layout(g, dim, layer.ring.dtype).read(layer.pages[:, : flushed // layer.format.page])
    parts = [t.transpose(1, 2).flatten(2, 3).double() for t in layer.format.decode(held, layer.tables or [])]
    slots = torch.arange(flushed, total) % layer.ring.shape[3]
    k, v = (torch.cat((t, layer.ring[:, i][:, :, slots].double()), 2) for i, t in enumerate(parts))
    cos, sin = turns(shift_angles(SHIFTS, OMEGA), torch.float64)
    k = rotate(k, cos[row[:total]], sin[row[:total]], layout)
    r = q.shape[1] // g
    s = q.double() @ k.repeat_interleave(r, 1).mT * 0.125
    if mask is not None:
        s = s.masked_fill(~mask[..., :total], -torch.inf) if mask.dtype == torch.bool else s + mask[..., :total].double()
    return torch.softmax(s, -1).nan_to_num(0.0) @ v.repeat_interleave(r, 1)


def clean(layer: Layer) -> None:
    """The reference decodes all pages and multiplies hidden slots by 0; what was never written is poisoned by `filled`."""
    layer.ring.nan_to_num_(0.0)
    layer.pages[:, int(layer.lens[1]) // layer.format.page :] = 0


def queries(layer: Layer, repeat: int, count: int) -> Tensor:
    b, _, g, _, d = layer.ring.shape
    return torch.randn(b, count, g * repeat, d, generator=torch.Generator().manual_seed(5)).to(layer.ring.dtype).transpose(1, 2)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("provider", HERE, ids=lambda p: p.name)
def test_turned_attention_is_right(provider: Provider, spec: str) -> None:
    for dtype, kind, layout, repeat, count in (
        (torch.float32, "segments", "half", 3, 1), (torch.float32, "mixed", "interleaved", 2, 2), (torch.bfloat16, "segments", "half", 4, 1),
        (torch.float32, "one", "half", 1, 1),
    ):  # fmt: skip
        tokens = 2600 if kind == "one" else 400  # long enough for kernels that walk pages first and heads within
        layer = filled(spec, tokens, dtype=dtype)
        if provider.name == "reference":
            clean(layer)
        q = queries(layer, repeat, count)
        row = rows_of(layer.limit, kind)
        hidden = torch.arange(layer.limit) % 5 != 3
        mask = (hidden & (torch.arange(layer.limit) < tokens - 20))[None, None, None]
        for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)) if dtype == torch.float32 else (mask,):
            want = exact(layer, q, m, row, layout)
            y = call(provider, layer, q, m, row, layout)
            off = float((y.double() - want).norm() / want.norm())
            assert off < (3e-5 if dtype == torch.float32 else 1.2e-2), (off, kind, dtype)


@pytest.mark.parametrize("provider", HERE, ids=lambda p: p.name)
def test_no_turn_is_plain_attention(provider: Provider) -> None:
    layer = filled("kivi(bits=4)", 300)
    clean(layer)
    q, row = queries(layer, 2, 1), torch.zeros(layer.limit, dtype=torch.int64)
    y = call(provider, layer, q, None, row, "half")
    name = provider.name
    assert torch.equal(y, layer.attend(q, None, 0.125, kernel=name)) or float((y - layer.attend(q, None, 0.125, kernel=name)).abs().max()) < 1e-6


@pytest.mark.parametrize("provider", [p for p in HERE if p.name != "reference"], ids=lambda p: p.name)
def test_rows_that_leave_the_table_are_refused(provider: Provider) -> None:
    name = provider.name.rsplit("-", 1)[-1]
    layer = filled(next((s for s in SPECS if s.startswith(name)), SPECS[0]), 200)
    q = queries(layer, 1, 1)
    for row in (torch.full((layer.limit,), 4), torch.zeros(layer.limit - 1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="row"):
            call(provider, layer, q, None, row, "half")
