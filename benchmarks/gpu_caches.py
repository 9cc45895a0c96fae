"""Attention over compressed caches and over turned keys on a GPU: verified against fp64, captured from empty to full, timed beside dense attention.

Called by benchmarks/gpu.py. `verify` needs no GPU: on CPU tensors Triton's interpreter runs the kernels (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches import paging
from effllm.runtime.caches.layer import Layer
from effllm.runtime.caches.matryoshka import pack_tables

SPECS = (
    "kivi(bits=4)", "kivi(bits=2)", "kivi(bits=8)", "gear(bits=4)", "gear(bits=2,outliers=0)", "mustafar(sparsity=0.7)", "mustafar(sparsity=0.7,bits=4)",
    "bfp(bits=4)", "matryoshka(k=0.5,v=0.5)",
)  # fmt: skip
PACKED = ("kivi(bits=4)", "kivi(bits=2,page=32,group=32,window=8)", "mustafar(page=64,window=8,sparsity=0.7)", "mustafar(page=64,sparsity=0.5,bits=4)",
          "gear(bits=4)", "gear(bits=2,factors=8,rank=4,page=32,group=32,window=8)", "bfp(bits=4)", "bfp(bits=8,vbits=3,block=16,window=8)")  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORST = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}  # whatever plain torch does
HEADS, GROUPS, DIM = 32, 8, 128  # of the timed attention


def tables(spec: str, groups: int, dim: int, device: str) -> list[Tensor] | None:
    """Random orthogonal bases for Matryoshka."""
    if not spec.startswith("matryoshka"):
        return None
    bases = [torch.linalg.qr(torch.randn(groups, dim, dim)).Q for _ in range(2)]
    return [t.to(device) for t in pack_tables(bases[0], torch.randn(groups, dim), bases[1], torch.randn(groups, dim))]


def filled(spec: str, tokens: int, batch: int, groups: int, dim: int, dtype: torch.dtype, device: str) -> Layer:
    """A cache with random tokens, packed by plain torch."""
    k, v = (torch.randn(batch, groups, tokens, dim, device=device).to(dtype) for _ in range(2))
    layer = Layer(spec, tokens + 64, tables(spec, groups, dim, device))
    layer.allocate(k, v)
    paging.append(layer.format, layer.pages, layer.ring, layer.lens, layer.start, k, v, layer.tables or [])
    return layer


def exact(layer: Layer, q: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in fp64 over what the cache holds."""
    dim, groups = layer.ring.shape[4], layer.ring.shape[2]
    k, v = paging.decode(layer.format, layer.pages, groups, dim, torch.float64, layer.tables or [])
    near = torch.arange(layer.limit, device=q.device) % layer.ring.shape[3]
    old = (torch.arange(layer.limit, device=q.device) < layer.lens[1])[:, None]
    wide = [
        torch.where(old, torch.nn.functional.pad(t, (0, 0, 0, layer.ring.shape[3])), layer.ring[:, i].double().index_select(2, near))
        for i, t in enumerate((k, v))
    ]
    there = torch.arange(layer.limit, device=q.device) < layer.lens[0]
    seen = there.expand(1, 1, 1, -1) if mask is None else mask & there
    return torch.nn.functional.scaled_dot_product_attention(q.double(), *wide, seen, scale=dim**-0.5, enable_gqa=True)


def distance(y: Tensor, true: Tensor) -> float:
    """Relative error; NaN stays NaN."""
    return float((y.double() - true).norm() / true.norm())


def verify(
    device: str = "cuda", tokens: int = 700, dtypes: tuple[torch.dtype, ...] = DTYPES, specs: tuple[str, ...] = SPECS, packed: tuple[str, ...] = PACKED
) -> list[dict[str, Any]]:
    """Every format in every dtype, packing, and turned keys; raises SystemExit for a kernel that errs more than three times as much as plain torch."""
    from effllm.kernels.triton import kv_attend_launch, kv_ops
    from effllm.lowering.kv_cache import attend_reference

    kv_ops.register()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for spec in specs:
        for dtype in dtypes:
            layer = filled(spec, tokens, 2, 2, 64, dtype, device)
            q = torch.randn(2, 3, 8, 64, device=device).to(dtype).transpose(1, 2)[:, :, :1]
            for mask in (None, torch.arange(layer.limit, device=device) >= torch.tensor([0, 70], device=device).view(2, 1, 1, 1)):
                state = (layer.pages, layer.ring, layer.lens, layer.tables or [], mask, 64**-0.5, layer.format.spec)
                true = exact(layer, q, mask)
                for splits in (0, 1, 3):
                    got = distance(kv_attend_launch.attend(q, *state, splits), true)
                    plain = distance(attend_reference(q, *state), true)
                    row = {"op": "kv_attend", "spec": spec, "dtype": str(dtype), "splits": splits, "error": got, "plain": plain}
                    rows.append(judged(row, min(3 * plain + 2.0**-20, WORST[dtype])))
    return rows + packing(device, dtypes, packed) + turned(device, tokens, dtypes)


def judged(row: dict[str, Any], bound: float) -> dict[str, Any]:
    """The row, if its error is within the bound; NaN is not."""
    if not row["error"] <= bound:
        raise SystemExit(f"wrong result: {row}, bound {bound:.2e}")
    return row


def packing(device: str, dtypes: tuple[torch.dtype, ...], specs: tuple[str, ...]) -> list[dict[str, Any]]:
    """Pages as plain torch packs them: the share of bytes that differ (a division may round another way on a GPU)."""
    from effllm.kernels.triton import kv_append_launch

    rows = []
    for spec in specs:
        for dtype in dtypes:
            k, v = (torch.randn(2, 2, 150, 64, device=device).to(dtype) for _ in range(2))
            layers = [Layer(spec, 160) for _ in range(2)]
            for layer in layers:
                layer.allocate(k, v)
            for a, b in ((0, 90), (90, 91), (91, 150)):
                states = [tuple(getattr(x, n) for n in ("pages", "ring", "lens", "start")) for x in layers]
                about = layers[0].tables or []
                kv_append_launch.append(*states[0], k[:, :, a:b], v[:, :, a:b], about, layers[0].format.spec)
                paging.append(layers[1].format, *states[1], k[:, :, a:b], v[:, :, a:b], about)
            if not all(torch.equal(getattr(layers[0], n), getattr(layers[1], n)) for n in ("ring", "lens")):
                raise SystemExit(f"wrong ring or lengths: {spec} {dtype}")
            share = float((layers[0].pages != layers[1].pages).double().mean())
            rows.append(judged({"op": "kv_append", "spec": spec, "dtype": str(dtype), "error": share}, 1e-3))
    return rows


def turned(device: str, tokens: int, dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Any]]:
    """Attention over turned keys against fp64, in both layouts."""
    from effllm.kernels.triton.rotated_launch import attention
    from effllm.lowering.pie import rotated_attention_reference
    from effllm.runtime.rotary import rotate, shift_angles, turns

    rows = []
    for dtype in dtypes:
        for layout in ("half", "interleaved"):
            q, k, v = (torch.randn(1, h, n, 64, device=device).to(dtype) for h, n in ((8, 1), (2, tokens), (2, tokens)))
            angles = shift_angles([0, -7, 12345], 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32))
            row = (torch.arange(tokens, device=device) * 3 // tokens).int()
            cos, sin = (t.to(device) for t in turns(angles))
            fine = tuple(t.to(device) for t in turns(angles, torch.float64))
            true = rotated_attention_reference(q.double(), k.double(), v.double(), None, row.long(), *fine, layout, 0.125)
            moved = rotate(k, cos[row.long()], sin[row.long()], layout).to(dtype)
            plain = distance(torch.nn.functional.scaled_dot_product_attention(q, moved, v, scale=0.125, enable_gqa=True), true)
            got = distance(attention(q, k, v, None, row, cos, sin, layout, 0.125), true)
            rows.append(judged({"op": "rotated_attention", "dtype": str(dtype), "layout": layout, "error": got, "plain": plain}, 2 * plain + 2.0**-20))
    return rows


def captured(spec: str) -> dict[str, Any]:
    """One CUDA graph of append and attention, replayed from empty to full and once more: right at every length, and the overflow is told."""
    from effllm.kernels.triton import kv_append_launch, kv_attend_launch

    k, v, q = (torch.randn(1, h, 1, 64, device="cuda", dtype=torch.bfloat16) for h in (2, 2, 8))
    layer = Layer(spec, 200)
    layer.allocate(k, v)
    state, name, about = (layer.pages, layer.ring, layer.lens), layer.format.spec, layer.tables or []

    def step() -> Tensor:
        kv_append_launch.append(*state, layer.start, k, v, about, name)
        return kv_attend_launch.attend(q, *state, about, None, 0.125, name)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    layer.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    layer.reset()
    worst = 0.0
    for n in range(layer.limit):
        for t in (k, v, q):
            t.normal_()
        graph.replay()
        if int(layer.lens[0]) != n + 1:
            raise SystemExit(f"{spec}: {int(layer.lens[0])} tokens after {n + 1} replays")
        worst = max(worst, distance(y, exact(layer, q, None)))
    before = layer.pages.clone()
    graph.replay()
    torch.cuda.synchronize()
    try:
        kv_append_launch.check(layer.ring.device)
    except CacheError as error:
        told = error.code
    else:
        raise SystemExit(f"{spec}: an append past the capacity was lost")
    if not torch.equal(before, layer.pages) or int(layer.lens[0]) != layer.limit:
        raise SystemExit(f"{spec}: an append past the capacity wrote to the cache")
    return judged({"op": "captured", "spec": spec, "replays": layer.limit + 1, "told": told, "error": worst}, 2e-2)


def timed(tokens: int, graph_seconds: Callable[[list[Callable[[], Any]]], tuple[float, float]], copies: Callable[[int], int]) -> list[dict[str, Any]]:
    """Decoding attention at a context, all splits, beside dense attention; several caches in turns, so that each is read from memory."""
    from effllm.autotune import machines
    from effllm.kernels.triton import kv_attend_launch, kv_cost

    q = torch.randn(1, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    dense_bytes = 2 * GROUPS * tokens * DIM * 2
    dense = [torch.randn(2, 1, GROUPS, tokens, DIM, device="cuda", dtype=q.dtype) for _ in range(copies(dense_bytes))]

    def plain(x: Tensor) -> Callable[[], Any]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, x[0], x[1], enable_gqa=True)

    base, _ = graph_seconds([plain(x) for x in dense])
    del dense
    rows = []
    for spec in SPECS:
        fmt = filled(spec, 300, 1, GROUPS, DIM, q.dtype, "cuda").format
        count = min(16, copies(int(tokens * fmt.bytes_per_token(GROUPS, DIM, q.dtype))))
        first = filled(spec, tokens, 1, GROUPS, DIM, q.dtype, "cuda")
        layers = [(first.pages.clone(), first.ring.clone()) for _ in range(count)]

        def call(i: int, splits: int, first: Layer = first, layers: list[tuple[Tensor, Tensor]] = layers) -> Callable[[], Any]:
            about = (first.tables or [], None, DIM**-0.5, first.format.spec, splits)
            return lambda: kv_attend_launch.attend(q, *layers[i], first.lens, *about)

        measured = {s: graph_seconds([call(i, s) for i in range(count)])[0] for s in kv_cost.SPLITS}
        best = min(measured, key=lambda s: measured[s])
        shape = kv_cost.Shape(1, GROUPS, DIM, kv_attend_launch.rows_of(HEADS // GROUPS), tokens, first.ring.shape[3], q.dtype)
        machine = machines.gpu("cuda")
        chosen = kv_cost.best(fmt, shape, machine)
        row = {"op": "kv_attend", "spec": spec, "tokens": tokens, "us": measured[best] * 1e6, "splits": best, "dense_us": base * 1e6}
        row["times"] = base / measured[best]
        row |= {"chosen": chosen, "chosen_us": measured[chosen] * 1e6, "predicted_us": kv_cost.predict(fmt, shape, chosen, machine).seconds * 1e6}
        rows.append(row | {"all_us": {str(s): t * 1e6 for s, t in measured.items()}})
    return rows


def predict(target: str) -> list[dict[str, Any]]:
    """The cost model's figures for a class of GPU that need not be there."""
    from effllm.autotune import gpus
    from effllm.kernels.triton import kv_cost
    from effllm.runtime.caches.base import parse

    machine, rows = gpus.constants(gpus.by_class(target)), []
    for tokens in (4096, 32768):
        shape = kv_cost.Shape(1, GROUPS, DIM, 8, tokens, 128, torch.bfloat16)
        dense = kv_cost.dense_seconds(shape, machine)
        for spec in SPECS:
            chosen = kv_cost.best(parse(spec), shape, machine)
            found = kv_cost.predict(parse(spec), shape, chosen, machine)
            row = {"spec": spec, "tokens": tokens, "us": found.seconds * 1e6, "splits": chosen, "of_bound": found.bound / found.seconds}
            rows.append(row | {"dense_us": dense * 1e6, "times": dense / found.seconds})
    return rows


def print_predictions(target: str) -> None:
    """One line a format and context."""
    print(f"caches, one bf16 query, {HEADS} heads over {GROUPS} key heads of {DIM}, dense attention taken at 85 % of the bandwidth:")
    for r in predict(target):
        print(f"{r['spec']} {r['tokens']} tokens: {r['us']:.1f} us, dense {r['dense_us']:.1f} us, x{r['times']:.2f}, {r['splits']} splits")
