"""The ops "kv_append", "kv_read" and "kv_attend": every provider against attention in fp64 over the decompressed values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError, KernelError
from effllm.lowering import providers
from effllm.lowering.op import OPS
from effllm.runtime.caches import paging
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.layer import Layer

providers.load("cpu")
KERNELS = [n for n in OPS["kv_attend"].providers if n.rpartition("-")[2] not in ("mustafar", "bfp", "matryoshka")]  # those: test_kv_formats.py
# name, heads, query heads per key head, head size, tokens, queries
SHAPES = [
    ("kivi(bits=4)", 2, 4, 64, 500, 1),
    ("kivi(bits=2,page=32,group=16,window=8)", 1, 8, 32, 203, 1),
    ("kivi(bits=8,page=128,window=0)", 3, 1, 128, 400, 1),
    ("kivi(bits=4,page=48,group=48,window=5)", 1, 3, 48, 49, 3),
    ("kivi(bits=4,group=16)", 2, 2, 80, 1, 1),
    ("gear(bits=2)", 2, 4, 64, 300, 2),
    ("gear(bits=4,rank=4,outliers=0.1,group=32)", 1, 5, 96, 333, 1),
    ("gear(bits=8,rank=0,outliers=0.05)", 1, 2, 64, 200, 1),
    ("gear(bits=4,rank=3,outliers=0)", 1, 6, 64, 260, 4),
    ("gear(bits=2,rank=3,factors=8)", 2, 3, 128, 260, 1),
    ("gear(bits=4,factors=8,page=32,group=16)", 1, 2, 80, 300, 2),
    ("kivi(bits=4,page=32,group=32)", 3, 2, 64, 2600, 1),  # long: pages first, heads within
]


def kernel_of(name: str, op: str = "kv_attend") -> str:
    found = OPS[op].providers[name]
    try:
        if found.prepare is not None:
            found.prepare()
    except KernelError as error:
        pytest.skip(error.cause)
    return name


def test_a_kernel_of_another_format_is_refused_with_its_reason() -> None:
    layer = build("gear(bits=2)", 1, 32, 100)
    q = torch.randn(2, 2, 1, 32)
    others = [name for name in OPS["kv_attend"].providers if name.rpartition("-")[2] in ("mustafar", "bfp", "matryoshka")]
    assert others
    for name in others:
        with pytest.raises(KernelError, match=r"is for .*, the cache is gear"):
            layer.attend(q, kernel=name)
    with pytest.raises(KernelError, match="unknown kernel 'nowhere'"):
        layer.attend(q, kernel="nowhere")


def build(text: str, heads: int, dim: int, tokens: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Layer:
    g = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(batch, heads, tokens, dim, generator=g) * torch.exp(2 * torch.rand(batch, heads, 1, dim, generator=g)) for _ in range(2))
    layer = Layer(text, tokens + 70)
    layer.allocate(k.to(dtype), v.to(dtype))
    layer.append(k.to(dtype), v.to(dtype))
    return layer


def exact(layer: Layer, q: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in fp64."""
    fmt, heads, dim, width = layer.format, layer.ring.shape[2], layer.ring.shape[4], layer.ring.shape[3]
    at = torch.arange(layer.limit)
    dense = []
    for i, t in enumerate(paging.decode(fmt, layer.pages, heads, dim, torch.float64, [])):
        near = layer.ring[:, i].double().index_select(2, at % width)
        dense.append(torch.where((at < layer.lens[1])[:, None], torch.nn.functional.pad(t, (0, 0, 0, width)), near))
    there = (at < layer.lens[0]).expand(1, 1, 1, -1)
    bias = torch.zeros(there.shape, dtype=torch.float64).masked_fill(~there, float("-inf"))
    if mask is not None:
        bias = bias + (torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask.double())
    return torch.nn.functional.scaled_dot_product_attention(q.double(), *dense, bias, enable_gqa=True).nan_to_num(0.0)


def masks(layer: Layer, batch: int, heads: int, queries: int, tokens: int) -> list[Tensor | None]:
    at, g = torch.arange(layer.limit), torch.Generator().manual_seed(0)
    padded = (at >= torch.tensor([0, min(70, tokens - 1)])[:batch].view(-1, 1, 1, 1)) & (at < tokens)
    holes = torch.rand(1, heads, queries, layer.limit, generator=g) < 0.5
    holes[..., 0] = True
    return [None, padded, holes, torch.where(padded, torch.randn(batch, 1, 1, layer.limit, generator=g), float("-inf"))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("text", "heads", "repeat", "dim", "tokens", "queries"), SHAPES)
def test_attention_is_right(kernel: str, text: str, heads: int, repeat: int, dim: int, tokens: int, queries: int) -> None:
    kernel_of(kernel)
    layer = build(text, heads, dim, tokens)
    q = torch.randn(2, queries, heads * repeat, dim, generator=torch.Generator().manual_seed(1)).transpose(1, 2)  # strided as in models
    for mask in masks(layer, 2, heads * repeat, queries, tokens):
        want = exact(layer, q, mask)
        # a score is a sum of up to 128 products of magnitude 100 / sqrt(128): fp32 leaves 1e-5 of it, and so much of each weight
        plain = (layer.attend(q, mask, kernel="reference").double().nan_to_num(0.0) - want).abs().max()
        bound = 5e-5 * want.abs().max() if kernel == "reference" else 2 * plain + 5e-6 * want.abs().max()
        assert (layer.attend(q, mask, kernel=kernel).double().nan_to_num(0.0 if kernel == "reference" else float("nan")) - want).abs().max() < bound


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_sixteen_bits(kernel: str, dtype: torch.dtype, bound: float) -> None:
    kernel_of(kernel)
    layer = build("gear(bits=4)", 2, 64, 400, dtype)
    q = torch.randn(2, 8, 1, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = exact(layer, q, None)
    assert (layer.attend(q, kernel=kernel).double() - want).norm() < bound * want.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_swapping_scales_changes_the_result(kernel: str) -> None:
    kernel_of(kernel)
    layer = build("kivi(bits=4,group=32)", 1, 64, 300, batch=1)
    q = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(3))
    before = layer.attend(q, kernel=kernel)
    layout = layer.format.layout(1, 64, torch.float32)
    for name in ("kscale", "vscale"):
        held = layout.read(layer.pages)
        held[name] = held[name].flip(-2)
        kept = layer.pages.clone()
        layer.pages.copy_(layout.write(held))
        assert (layer.attend(q, kernel=kernel) - before).abs().max() > 1e-3 * before.abs().max()
        layer.pages.copy_(kept)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_without_keys_is_zero_and_nan_stays_nan(kernel: str) -> None:
    kernel_of(kernel)
    layer = build("kivi(bits=4,page=32,group=32,window=8)", 1, 32, 100)
    q = torch.randn(2, 2, 1, 32, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 1, 1, layer.limit, dtype=torch.bool)
    mask[1] = False
    out = layer.attend(q, mask, kernel=kernel)
    if kernel != "reference":  # torch gives NaN or zero there, depending on its version
        assert not out[1].any()
    assert out[0].isfinite().all()
    k = torch.randn(2, 1, 100, 32)
    k[0, 0, 3, 5] = float("nan")
    layer.reset()
    layer.append(k, torch.randn(2, 1, 100, 32))
    out = layer.attend(q, kernel=kernel)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("kernel", [p.name for p in OPS["kv_append"].providers.values()])
def test_append_by_every_provider_gives_the_same_bytes(kernel: str) -> None:
    kernel_of(kernel, "kv_append")
    g = torch.Generator().manual_seed(5)
    k, v = (torch.randn(2, 150, 2, 32, generator=g).transpose(1, 2) for _ in range(2))  # strided as in models
    made = []
    for name in (kernel, "reference"):
        layer = Layer("gear(bits=4,page=32,group=16,window=8)", 150)
        layer.allocate(k, v)
        for a, b in ((0, 70), (70, 71), (71, 75), (75, 150)):
            torch.ops.effllm.kv_append(layer.pages, layer.ring, layer.lens, layer.start, k[:, :, a:b], v[:, :, a:b], [], layer.format.spec, name)
        made.append(layer)
    assert all(torch.equal(getattr(made[0], n), getattr(made[1], n)) for n in ("pages", "ring", "lens", "start"))


@pytest.mark.parametrize("kernel", [p.name for p in OPS["kv_append"].providers.values()])
def test_a_full_cache_refuses_and_stays(kernel: str) -> None:
    kernel_of(kernel, "kv_append")
    layer = build("kivi(bits=4,page=32,group=32,window=8)", 1, 32, 30)
    room = layer.limit - 30
    before = [getattr(layer, n).clone() for n in ("pages", "ring", "lens")]
    x = torch.randn(2, 1, room + 1, 32)
    with pytest.raises((CacheError, RuntimeError), match="E-KVC-FULL"):
        torch.ops.effllm.kv_append(layer.pages, layer.ring, layer.lens, layer.start, x, x, [], layer.format.spec, kernel)
    assert all(torch.equal(a, getattr(layer, n)) for a, n in zip(before, ("pages", "ring", "lens"), strict=True))
    torch.ops.effllm.kv_append(layer.pages, layer.ring, layer.lens, layer.start, x[:, :, 1:], x[:, :, 1:], [], layer.format.spec, kernel)
    assert int(layer.lens[0]) == layer.limit


def test_splits_do_not_change_the_result() -> None:
    kernel = next((k for k in KERNELS if k != "reference"), None)
    if kernel is None:
        pytest.skip("no compiled kernel")
    kernel_of(kernel)
    layer = build("kivi(bits=4)", 1, 64, 3000, batch=1)
    q = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(6))
    threads, outs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):  # four runs of pages a thread
            torch.set_num_threads(n)
            outs.append(layer.attend(q, kernel=kernel))
    finally:
        torch.set_num_threads(threads)
    assert all((o - outs[0]).abs().max() < 1e-6 * outs[0].abs().max() for o in outs[1:])


def test_the_kernels_refuse_other_formats_with_a_reason() -> None:
    from effllm.lowering.kv_cache import problem

    layer = build("dense(page=16,window=8)", 1, 32, 40)
    rated = providers.verdicts(problem("kv_attend", parse("dense").spec, 1, layer.ring, 1))
    assert [p.name for p, v in rated if v] == ["reference"]
    assert all(any(why in v.reason for why in ("dense pages", "the cache is dense", "lacks", "runs on")) for _, v in rated if not v)


def test_read_op_is_what_the_layer_reads() -> None:
    layer = build("kivi(bits=4)", 1, 64, 200)
    k, v = torch.ops.effllm.kv_read(layer.pages, layer.ring, layer.lens, [], layer.format.spec)
    want = paging.read(layer.format, layer.pages, layer.ring, layer.lens, [])
    assert torch.equal(k, want[0]) and torch.equal(v, want[1])
