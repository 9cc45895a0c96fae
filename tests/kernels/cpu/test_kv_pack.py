"""Packing by the op "kv_append" of every C++ build: the bytes of the format's own encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.kernels.cpu import kv_pack
from effllm.lowering import providers
from effllm.lowering.op import OPS, Provider
from effllm.runtime.caches.layer import Layer
from effllm.runtime.caches.matryoshka import pack_tables

providers.load("cpu")
SPECS = (
    "kivi(bits=2)",
    "kivi(bits=4,window=0)",
    "kivi(bits=8,page=32,group=16,window=5)",
    "kivi(bits=4,page=128,group=32,window=7)",
    "gear(bits=2)",
    "gear(bits=4,factors=8,rank=3,page=32,group=16)",
    "gear(bits=8,rank=0,outliers=0.1,group=32)",
    "gear(bits=2,outliers=0,rounds=2,loops=1,group=32,window=3)",
    "mustafar(page=64,sparsity=0.7)",
    "mustafar(page=128,window=3,sparsity=0.5)",
    "mustafar(page=64,sparsity=0)",
    "mustafar(page=64,sparsity=0.95,bits=8)",
    "mustafar(page=64,window=0,sparsity=0.4,bits=4)",
    "bfp(bits=4,vbits=4)",
    "bfp(bits=3,vbits=8,block=16,page=48,window=1,rule=raise)",
    "bfp(bits=2,vbits=5,block=16)",
    "matryoshka(k=0.5,v=0.25)",
    "matryoshka(page=48,window=3,k=7/48/1,v=31/8/33)",
    "matryoshka(page=30,window=0,k=full,v=17)",
)
SPOILED = (
    "kivi(bits=2)", "kivi(bits=8,group=16)", "gear(bits=4)", "gear(bits=4,outliers=0.2,factors=8)",
    "mustafar(page=64)", "mustafar(page=64,bits=4)", "bfp(bits=4)",
    "matryoshka(k=0.5,v=0.75)",
)  # fmt: skip
KERNELS = [p for p in OPS["kv_append"].providers.values() if p.prepare is not None]
EACH = pytest.mark.parametrize("kernel", KERNELS, ids=lambda p: p.name)


def tables(spec: str, heads: int, dim: int) -> list[Tensor] | None:
    g = torch.Generator().manual_seed(3)
    if spec.startswith("matryoshka"):
        uk, uv = (torch.linalg.qr(torch.randn(heads, dim, dim, generator=g)).Q for _ in range(2))
        return pack_tables(uk, torch.randn(heads, dim, generator=g), uv, torch.randn(heads, dim, generator=g))
    if not spec.startswith("bfp"):
        return None
    return [torch.stack([torch.randperm(dim, generator=g) for _ in range(heads)]) for _ in range(2)]


def pair(spec: str, dtype: torch.dtype, batch: int, heads: int, dim: int, start: list[int] | None = None) -> tuple[Layer, Layer]:
    """Two empty layers with room for 460 tokens."""
    out = []
    for _ in range(2):
        layer = Layer(spec, 460, tables(spec, heads, dim))
        layer.allocate(*(torch.zeros(batch, heads, 1, dim, dtype=dtype) for _ in range(2)))
        if start is not None:
            layer.start.copy_(torch.tensor(start))
        out.append(layer)
    return out[0], out[1]


def append(kernel: str, layer: Layer, k: Tensor, v: Tensor) -> None:
    torch.ops.effllm.kv_append(layer.pages, layer.ring, layer.lens, layer.start, k, v, layer.tables or [], layer.format.spec, kernel)


def ready(kernel: Provider, spec: str, layer: Layer) -> None:
    from effllm.errors import KernelError

    try:
        assert kernel.prepare is not None
        kernel.prepare()
    except KernelError as error:
        pytest.skip(error.cause)


def drawn(dtype: torch.dtype, batch: int, heads: int, tokens: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with outlier channels, values with few distinct magnitudes (ties), zero channels, a constant token; as a model has them: not contiguous."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, tokens, heads, dim, generator=g) * torch.exp(2 * torch.rand(1, 1, heads, dim, generator=g))
    v = torch.randint(-6, 7, (batch, tokens, heads, dim), generator=g) / 4
    v[..., 1] = 0
    k[:, 5] = 1.5
    k[:, :, :, 3] = 0
    return k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)


def same(a: Layer, b: Layer) -> None:
    for x, y in ((a.pages, b.pages), (a.ring.view(torch.uint8), b.ring.view(torch.uint8)), (a.lens, b.lens)):
        assert torch.equal(x, y)


@EACH
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.float16, 96), (torch.float32, 128)], ids=str)
def test_pages_are_those_of_the_encoder_however_tokens_arrive(kernel: Provider, spec: str, dtype: torch.dtype, dim: int) -> None:
    dim = 48 if dim == 96 and spec in ("kivi(bits=2)", "kivi(bits=4,window=0)", "gear(bits=2)") else dim  # groups of 64 channels, or of the whole head
    own, reference = pair(spec, dtype, 2, 3, dim)
    ready(kernel, spec, own)
    k, v = drawn(dtype, 2, 3, 420, dim)
    at = 0
    for n in (1, 200, 70, 1, 130, 18):
        for layer, name in ((own, kernel.name), (reference, "reference")):
            append(name, layer, k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
        same(own, reference)
    assert int(own.lens[1]) >= 256 and bool((own.pages != 0).any())


@EACH
@pytest.mark.parametrize("spec", ["kivi(bits=4)", "gear(bits=2)", "mustafar(page=64,bits=8)", "bfp(bits=4)", "matryoshka"])
def test_padding_in_front_of_a_row_widens_nothing(kernel: Provider, spec: str) -> None:
    own, reference = pair(spec, torch.bfloat16, 3, 2, 64, start=[0, 70, 128])
    ready(kernel, spec, own)
    k, v = drawn(torch.bfloat16, 3, 2, 300, 64)
    k[1, :, :70], v[1, :, :70] = 1000, -1000
    for layer, name in ((own, kernel.name), (reference, "reference")):
        append(name, layer, k, v)
    same(own, reference)
    held = own.format.layout(2, 64, torch.bfloat16).read(own.pages[1:2, 1])
    assert float(own.format.decode(held, own.tables or [])[0].abs().max()) < 100  # page 1 of row 1 holds padding and real tokens


@EACH
@pytest.mark.parametrize("spec", SPOILED)
def test_what_is_not_finite_decodes_as_from_the_encoder(kernel: Provider, spec: str) -> None:
    own, reference = pair(spec, torch.float32, 1, 2, 64)
    ready(kernel, spec, own)
    k, v = drawn(torch.float32, 1, 2, 200, 64, seed=1)
    nan, inf = torch.nan, torch.inf
    for x, (t, c), what in ((k, (3, 9), nan), (k, (70, 2), inf), (v, (5, 60), nan), (v, (90, 0), -inf), (k, (20, 5), 1e6), (v, (21, 5), -1e6)):
        x[0, 1, t, c] = what
    for layer, name in ((own, kernel.name), (reference, "reference")):
        append(name, layer, k, v)
    fmt, count = own.format, int(own.lens[1]) // own.format.page
    assert count
    for a, b in zip(*(fmt.decode(fmt.layout(2, 64, torch.float32).read(x.pages[:, :count]), x.tables or []) for x in (own, reference)), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and bool(a.isnan().any())
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@EACH
def test_a_full_cache_is_left_as_it_was(kernel: Provider) -> None:
    for spec in ("kivi(bits=4)", "gear(bits=4)", "mustafar(page=64)", "bfp(bits=4)", "matryoshka(k=0.5)"):
        layer, _ = pair(spec, torch.float32, 1, 1, 64)
        ready(kernel, spec, layer)
        k, v = drawn(torch.float32, 1, 1, layer.limit + 1, 64)
        append(kernel.name, layer, k[:, :, :300], v[:, :, :300])
        before = [t.clone() for t in (layer.pages, layer.ring, layer.lens)]
        with pytest.raises(RuntimeError, match="E-KVC-FULL"):
            append(kernel.name, layer, k[:, :, 300:], v[:, :, 300:])
        assert all(torch.equal(a, b) for a, b in zip(before, (layer.pages, layer.ring, layer.lens), strict=True))


def test_formats_with_a_packer_never_reach_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in prompts nor in steps, so a decoding loop has no such pause."""
    kernel = next(p for p in KERNELS if p.name == "cpu-portable")
    for spec in (s for s in SPECS if s.split("(")[0] in kv_pack.PACKERS):
        layer, _ = pair(spec, torch.bfloat16, 1, 3, 64)
        ready(kernel, spec, layer)

        def never(*_: object, spec: str = spec) -> None:
            raise AssertionError(spec)

        monkeypatch.setattr(type(layer.format), "encode", never)
        k, v = drawn(torch.bfloat16, 1, 3, 400, 64)
        append(kernel.name, layer, k, v)
        assert int(layer.lens[1])
