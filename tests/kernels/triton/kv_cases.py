"""Cases of compressed caches in Triton's interpreter: prints one JSON object per case."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# format, key heads, query heads per key head, head size, tokens, queries, dtype, mask, splits
ATTEND: tuple[tuple[str, int, int, int, int, int, str, str, int], ...] = (
    ("kivi(bits=4)", 2, 4, 64, 200, 1, "float32", "none", 2),
    ("kivi(bits=2,page=32,group=16,window=8)", 1, 8, 32, 120, 1, "float16", "padded", 4),
    ("kivi(bits=8,window=0)", 2, 1, 128, 130, 1, "float32", "holes", 1),
    ("kivi(bits=4,page=48,group=48,window=5)", 1, 3, 48, 150, 3, "float32", "added", 2),
    ("kivi(bits=4,page=48,group=48,window=5)", 1, 2, 96, 150, 1, "float16", "none", 3),
    ("kivi(bits=4,group=16)", 2, 2, 80, 1, 1, "float32", "none", 2),
    ("gear(bits=2)", 2, 4, 64, 200, 2, "float32", "padded-added", 2),
    ("gear(bits=4,rank=4,outliers=0.1,group=32)", 1, 5, 96, 200, 1, "float16", "none", 2),
    ("gear(bits=4,rank=3,outliers=0)", 1, 6, 64, 190, 4, "float32", "holes", 2),
    ("gear(bits=2,factors=8)", 2, 3, 64, 200, 1, "float32", "padded", 2),
    ("gear(bits=4,rank=3,factors=8,page=48,group=16)", 1, 2, 80, 150, 2, "float16", "none", 2),
    ("mustafar(page=64,window=8,sparsity=0.7)", 2, 3, 64, 200, 1, "float32", "padded", 2),
    ("mustafar(page=64,window=8,sparsity=0.5,bits=8)", 1, 1, 40, 150, 2, "float16", "none", 2),
    ("mustafar(page=128,window=0,sparsity=0.7,bits=4)", 1, 4, 96, 300, 1, "float32", "holes", 2),
    ("bfp(page=64,window=8,bits=4,vbits=8,block=16)", 2, 3, 64, 200, 1, "float32", "padded", 2),
    ("bfp(page=16,window=0,bits=3,vbits=4,block=32)", 1, 1, 128, 100, 2, "float16", "none", 2),
    ("bfp(page=32,window=0,bits=4,vbits=6,block=16)", 1, 2, 96, 100, 1, "float32", "added", 3),
    ("bfp(page=32,window=0,bits=4,vbits=4,block=64)", 1, 4, 64, 100, 1, "float32", "none", 1),
    ("matryoshka(page=64,window=8,k=24,v=0.75)", 2, 3, 64, 200, 1, "float32", "padded", 2),
    ("matryoshka(page=48,window=5,k=8/16,v=31/1)", 2, 2, 40, 150, 2, "float16", "none", 2),
    ("kivi(bits=4)", 2, 4, 64, 200, 1, "bfloat16", "padded", 2),
    ("kivi(bits=2,page=32,group=32,window=8)", 1, 4, 64, 120, 1, "bfloat16", "none", 2),
    ("kivi(bits=8,page=32,group=32,window=8)", 1, 2, 32, 90, 2, "bfloat16", "none", 1),
    ("gear(bits=4,page=32,group=32,window=8,factors=8)", 1, 4, 64, 120, 1, "bfloat16", "added", 2),
    ("mustafar(page=64,window=8,sparsity=0.5)", 1, 3, 64, 150, 1, "bfloat16", "none", 2),
    ("bfp(page=32,window=0,bits=4,vbits=8,block=16)", 1, 3, 64, 100, 1, "bfloat16", "none", 2),
    ("matryoshka(page=32,window=5,k=20,v=31)", 1, 2, 40, 90, 1, "bfloat16", "none", 2),
)
# format, head size, dtype: keys and values of 2 rows by 2 heads, one row padded
APPEND: tuple[tuple[str, int, str], ...] = (
    ("kivi(bits=4,page=32,group=16,window=8)", 80, "float32"), ("kivi(bits=2,page=48,group=48,window=3)", 48, "float16"),
    ("kivi(bits=8,page=64,group=64,window=0)", 64, "bfloat16"),
    ("mustafar(page=64,window=8,sparsity=0.7)", 48, "float32"), ("mustafar(page=128,window=0,sparsity=0.5,bits=4)", 64, "float16"),
    ("mustafar(page=64,window=3,sparsity=0.6,bits=8)", 80, "bfloat16"),
    ("gear(page=64,window=8,bits=4,group=32)", 64, "bfloat16"), ("gear(page=48,window=3,bits=2,group=16,rank=3,factors=8,outliers=0.06)", 48, "float32"),
    ("gear(page=64,window=12,bits=8,rank=1,rounds=2,loops=1)", 128, "float16"), ("gear(page=64,window=12,bits=2,group=16,outliers=0)", 80, "float16"),
    ("bfp(page=64,window=8,bits=4,vbits=8,block=16)", 80, "float32"), ("bfp(page=48,window=3,bits=3,vbits=2,block=64,rule=raise)", 128, "bfloat16"),
    ("bfp(page=20,window=0,bits=8,vbits=5,block=32,rule=raise)", 64, "float16"),
)  # fmt: skip
# projections are summed in another order than the reference's: values, not bytes
PROJECT: tuple[tuple[str, int, str], ...] = (
    ("matryoshka(page=64,window=8,k=24,v=0.75)", 64, "float32"), ("matryoshka(page=48,window=3,k=7/64,v=31/1)", 80, "float16"),
    ("matryoshka(page=20,window=0,k=full,v=0.5)", 128, "bfloat16"),
)  # fmt: skip
NAN = (
    "gear(page=64,window=0,bits=4,group=32)", "gear(page=64,window=0,bits=2,rank=0,outliers=1)",
    "gear(page=48,window=0,bits=4,group=16,outliers=0.1,factors=8)", "bfp(page=32,window=0,bits=4,vbits=8)", "matryoshka(page=32,window=0,k=20,v=31)",
)  # fmt: skip
NOTHING = ("kivi(bits=4,page=32,group=32,window=8)", "gear(bits=2,page=32,group=32,window=8)", "mustafar(page=64,window=8,sparsity=0.5)",
           "bfp(page=32,window=8,bits=4,block=16)", "matryoshka(page=32,window=8,k=full,v=full)")  # fmt: skip


def tables_for(spec: str, heads: int, dim: int):  # type: ignore[no-untyped-def]
    """Random bases and means, or orders of channels."""
    import torch

    from effllm.runtime.caches.matryoshka import pack_tables

    g = torch.Generator().manual_seed(9)
    if spec.startswith("matryoshka"):
        uk, uv = (torch.linalg.qr(torch.randn(heads, dim, dim, generator=g)).Q for _ in range(2))
        return pack_tables(uk, torch.randn(heads, dim, generator=g), uv, torch.randn(heads, dim, generator=g))
    if spec.startswith("bfp"):
        return [torch.stack([torch.randperm(dim, generator=g) for _ in range(heads)]) for _ in range(2)]
    return None


def exact(layer, q, mask, scale: float):  # type: ignore[no-untyped-def]
    """fp64 attention over the stored values."""
    import torch

    total, flushed = layer.lens.tolist()
    groups, dim = layer.ring.shape[2], layer.ring.shape[4]
    held = layer.format.layout(groups, dim, layer.ring.dtype).read(layer.pages[:, : flushed // layer.format.page])
    parts = [t.transpose(1, 2).flatten(2, 3).double() for t in layer.format.decode(held, layer.tables or [])]
    slots = torch.arange(flushed, total) % layer.ring.shape[3]
    k, v = (torch.cat((t, layer.ring[:, i][:, :, slots].double()), 2) for i, t in enumerate(parts))
    repeat = q.shape[1] // groups
    s = q.double() @ k.repeat_interleave(repeat, 1).mT * scale
    if mask is not None:
        m = mask[..., :total]
        s = s.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else s + m.double()
    return torch.softmax(s, -1).nan_to_num(0.0) @ v.repeat_interleave(repeat, 1)


def layer_of(spec: str, heads: int, dim: int, tokens: int, dtype: str, batch: int = 2, nan: bool = False):  # type: ignore[no-untyped-def]
    """A cache filled by the reference; what no token is in is 255 in the pages and NaN in the ring."""
    import torch

    from effllm.runtime.caches import paging
    from effllm.runtime.caches.layer import Layer
    g = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(batch, heads, tokens, dim, generator=g) * torch.rand(batch, heads, 1, dim, generator=g).mul(2).exp() for _ in range(2))
    k, v = (x.to(getattr(torch, dtype)) for x in (k, v))
    if nan:
        k[0, 0, 3, 5] = float("nan")
    layer = Layer(spec, tokens + 70, tables_for(spec, heads, dim))
    layer.allocate(k, v)
    layer.pages.fill_(255)
    layer.ring.fill_(float("nan"))
    paging.append(layer.format, layer.pages, layer.ring, layer.lens, layer.start, k, v, layer.tables or [])
    return layer


def mask_of(kind: str, layer, heads: int, queries: int, tokens: int):  # type: ignore[no-untyped-def]
    """A mask over all slots of the cache."""
    import torch

    g, at = torch.Generator().manual_seed(0), torch.arange(layer.limit)
    padded = (at >= torch.tensor([0, min(70, tokens - 1)]).view(-1, 1, 1, 1)) & (at < tokens)
    holes = torch.rand(1, heads, queries, layer.limit, generator=g) < 0.5
    holes[..., 0] = True
    added = torch.randn(2, 1, queries, layer.limit, generator=g).masked_fill(~padded, float("-inf"))
    by_token = torch.where(padded, torch.randn(2, 1, 1, layer.limit, generator=g), float("-inf"))
    return {"none": None, "padded": padded, "holes": holes, "added": added, "padded-added": by_token}[kind]


def attend(case: tuple[Any, ...]) -> dict[str, Any]:
    """Relative errors of the kernel and of the reference in the same dtype; the same with other splits."""
    import torch

    from effllm.kernels.triton import kv_attend_launch as launch
    from effllm.lowering.kv_cache import attend_reference

    spec, heads, repeat, dim, tokens, count, dtype, kind, splits = case
    layer = layer_of(spec, heads, dim, tokens, dtype)
    q = torch.randn(2, count, heads * repeat, dim, generator=torch.Generator().manual_seed(5)).to(layer.ring.dtype).transpose(1, 2)  # strided as in models
    mask = mask_of(kind, layer, heads * repeat, count, tokens)
    state = (layer.pages, layer.ring, layer.lens, layer.tables or [], mask, dim**-0.5, layer.format.spec)
    y = launch.attend(q, *state, splits)
    layer.ring.nan_to_num_(0.0)  # the reference reads what no token is in
    layer.pages[:, int(layer.lens[1]) // layer.format.page :] = 0
    true, plain = exact(layer, q, mask, dim**-0.5), attend_reference(q, *state).nan_to_num(0.0)
    size = true.norm()
    error, other = (float((x.double() - true).norm() / size) for x in (y, plain))
    return {"error": error, "plain": other, "dtype": str(y.dtype), "shape": list(y.shape)}


def nothing(spec: str) -> dict[str, Any]:
    """A row that attends to nothing is zero; NaN in a key makes its row NaN and no other."""
    import torch

    from effllm.kernels.triton import kv_attend_launch as launch

    out = {}
    for nan in (False, True):
        layer = layer_of(spec, 1, 32, 100, "float32", nan=nan)
        mask = torch.ones(2, 1, 1, layer.limit, dtype=torch.bool)
        mask[1] = nan
        q = torch.randn(2, 2, 1, 32, generator=torch.Generator().manual_seed(4))
        y = launch.attend(q, layer.pages, layer.ring, layer.lens, layer.tables or [], mask, 0.2, layer.format.spec, 2)
        first, second = bool(y[0].isnan().all() if nan else y[0].isfinite().all()), bool(y[1].isfinite().all() if nan else not y[1].any())
        out |= {"spread": first, "others": second} if nan else {"finite": first, "zero": second}
    return out


def append(case: tuple[str, int, str]) -> dict[str, Any]:
    """Whether the bytes are those of the reference, chunk by chunk, and whether a full cache refuses and stays."""
    import torch

    from effllm.errors import CacheError
    from effllm.kernels.triton import kv_append_launch as launch
    from effllm.kernels.triton import kv_flush_launch
    from effllm.runtime.caches import paging
    from effllm.runtime.caches.layer import Layer

    spec, dim, dtype = case
    kv_flush_launch.SCRATCH = 1 << (26 if dtype == "float16" else 0)  # what borrows memory packs all pages in one launch, or one by one
    g = torch.Generator().manual_seed(5)
    k, v = (torch.randn(2, 330, 2, dim, generator=g).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(2))
    k[0, 0, 40], k[0, 1, 60, 7], v[0, 0, 2] = k[0, 0, 40].abs().max(), 30.0, 0.0  # ties, an outlier, a group of nothing
    layers = [Layer(spec, 150, tables_for(spec, 2, dim)) for _ in range(2)]
    tables, same, errors = layers[0].tables or [], [], []
    for layer in layers:
        layer.allocate(k, v)
        layer.set_start(torch.tensor([0, 37]))
    for a, b in ((0, 70), (70, 71), (71, 140)):
        launch.append(*(getattr(layers[0], n) for n in ("pages", "ring", "lens", "start")), k[:, :, a:b], v[:, :, a:b], tables, spec)
        paging.append(layers[1].format, *(getattr(layers[1], n) for n in ("pages", "ring", "lens", "start")), k[:, :, a:b], v[:, :, a:b], tables)
        same += [torch.equal(getattr(layers[0], n), getattr(layers[1], n)) for n in ("pages", "ring", "lens")]
    errors = projected(*layers, k, v) if spec.startswith("matryoshka") else []
    room = layers[0].limit - 140
    before = [getattr(layers[0], n).clone() for n in ("pages", "ring", "lens")]
    error = ""
    try:
        launch.append(*(getattr(layers[0], n) for n in ("pages", "ring", "lens", "start")), k[:, :, : room + 1], v[:, :, : room + 1], tables, spec)
    except CacheError as raised:
        error = f"{raised.code} {raised.cause}"
    kept = all(torch.equal(a, getattr(layers[0], n)) for a, n in zip(before, ("pages", "ring", "lens"), strict=True))
    launch.check(k.device)  # raised once
    return {"same": same, "error": error, "kept": kept, "limit": layers[0].limit, "errors": errors}


def projected(ours, reference, k, v):  # type: ignore[no-untyped-def]
    """The largest error of each side's projections in units of what their dtype and sums may cost: half a rounding, and D of fp32 over all terms."""
    import torch

    fmt, (_, heads, _, dim) = ours.format, k.shape
    pages = int(ours.lens[1]) // fmt.page
    held = [fmt.layout(heads, dim, k.dtype).read(layer.pages[:, :pages]) for layer in (ours, reference)]
    out = []
    for name, x, u, mean, ranks in zip("kv", (k, v), ours.tables[::2], ours.tables[1::2], fmt.ranks(heads, dim), strict=True):
        size = ((x.double() - mean[:, None].double()).abs().amax((0, 2))[:, None] * u.double().abs()).sum(1)  # (heads, D), of any token
        terms = torch.cat([size[g, :r].repeat(fmt.page) for g, r in enumerate(ranks)])
        a, b = (h[name].double() for h in held)
        most = torch.finfo(k.dtype).eps * torch.maximum(a.abs(), b.abs()) + (dim + 2) * 2.0**-24 * terms  # the other one may round the other way
        out.append(float(((a - b).abs() / most).max()))
    return out


def nan_append(spec: str) -> dict[str, Any]:
    """What is not finite in a key or value: decodes as the reference's pages do."""
    import torch

    from effllm.kernels.triton import kv_append_launch as launch
    from effllm.runtime.caches import paging
    from effllm.runtime.caches.layer import Layer

    k, v = (torch.randn(1, 1, 140, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    k[0, 0, 3, 5], v[0, 0, 9, 2], k[0, 0, 70, 1] = float("nan"), float("nan"), float("inf")
    reads = []
    for ours in (True, False):
        layer = Layer(spec, 150, tables_for(spec, 1, 32))
        layer.allocate(k, v)
        tables = layer.tables or []
        state = (layer.pages, layer.ring, layer.lens, layer.start, k, v, tables)
        if ours:
            launch.append(*state, spec)
        else:
            paging.append(layer.format, *state)
        reads.append(paging.read(layer.format, layer.pages, layer.ring, layer.lens, tables))
    near = 1e-4 if spec.startswith("matryoshka") else 0.0  # sums in another order
    equal = [torch.allclose(a, b, 0, near, equal_nan=True) for a, b in zip(*reads, strict=True)]
    return {"equal": equal, "bad": bool(reads[0][0].isnan().any() and reads[0][1].isnan().any())}


def ops(spec: str) -> dict[str, Any]:
    """torch's own checks of both graph ops, with the launchers standing in for the CUDA kernels."""
    import torch

    from effllm.kernels.triton import kv_append_launch, kv_ops

    for name, call in (("kv_append", kv_append_launch.append), ("kv_attend", kv_ops.attend)):
        torch.library.impl(f"effllm_triton_kv::{name}", "CPU", call)
    layer, own = layer_of(spec, 1, 32, 60, "float32", batch=1), torch.ops.effllm_triton_kv
    layer.ring.nan_to_num_(0.0)  # the checks compare inputs, and NaN is unlike itself
    k, q = torch.randn(1, 1, 2, 32), torch.randn(1, 2, 1, 32)
    which = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(own.kv_append.default, (layer.pages, layer.ring, layer.lens, layer.start, k, k, [], spec), test_utils=which)
    state = (layer.pages, layer.ring, layer.lens, [], None, 0.2, spec)
    more = torch.library.opcheck(own.kv_attend.default, (q, *state), test_utils=(*which, "test_aot_dispatch_dynamic"))
    return found | {f"attend {n}": r for n, r in more.items()}


def main() -> None:
    """All cases, in order."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from interpreter_bf16 import patch

    patch()
    torch.set_num_threads(1)
    odd = (APPEND[0][0], "mustafar(page=64,window=0,sparsity=0.5,bits=8)", *NAN)
    runs: tuple[Any, ...] = ((attend, ATTEND), (nothing, NOTHING), (append, (*APPEND, *PROJECT)), (nan_append, odd), (ops, NOTHING[:1]))
    for what, items in runs:
        for item in items:
            print(json.dumps({"name": f"{what.__name__} {item}", **what(item)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
