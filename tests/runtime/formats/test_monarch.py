"""The Monarch format: the value of what is stored, the paper's tensors, padding, bytes, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError, WeightError
from effllm.runtime import formats
from effllm.runtime.formats import bipolar, dense, monarch
from effllm.runtime.formats.base import Packed

GRIDS = [(24, 60, 6, 6, 2), (64, 48, 4, 4, 3), (30, 17, 4, 3, 2), (5, 7, 7, 5, 1), (12, 8, 1, 1, 4), (33, 64, 2, 8, 5), (5, 9, 2, 4, 1)]


def factors(n: int, k: int, i: int, o: int, t: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, p = monarch.sizes(n, k, i, o)
    return torch.randn(i * o * t, p, generator=g, dtype=torch.float64), torch.randn(o * s, i * t, generator=g, dtype=torch.float64)


def store(n: int, k: int, i: int, o: int, t: int, strided: bool, dtype: torch.dtype = torch.float32) -> Packed:
    w1, w2 = factors(n, k, i, o, t)
    return monarch.make(dense.make(w1.to(dtype)), dense.make(w2.to(dtype)), shape=(n, k), blocks_in=i, blocks_out=o, strided=strided)


def published(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The two-stage product as the paper's code states it, written with index sums."""
    (i, _, p), (o, _, r) = first.shape, second.shape
    one = torch.einsum("kqp,bkp->bkq", first, x.view(-1, i, p)).reshape(-1, r, o).transpose(1, 2)
    return torch.einsum("lsr,blr->bls", second, one).transpose(1, 2).reshape(x.shape[0], -1)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_entry_is_its_formula(grid: tuple[int, ...], strided: bool) -> None:
    n, k, i, o, t = grid
    packed = store(*grid, strided)
    s, p = monarch.sizes(n, k, i, o)
    w1, w2 = packed.tensors["w1.values"].double(), packed.tensors["w2.values"].double()
    want = torch.zeros(n, k, dtype=torch.float64)
    for row in range(n):
        c, j = (row % o, row // o) if strided else divmod(row, s)
        for column in range(k):
            b, at = divmod(column, p)
            want[row, column] = sum(w2[c * s + j, b * t + r] * w1[(b * o + c) * t + r, at] for r in range(t))
    assert torch.allclose(monarch.unpack(packed, torch.float64), want, rtol=1e-12, atol=1e-12)


def test_square_rank_one_is_the_formula_of_the_paper() -> None:
    """M[(l, j), (k, i)] = L_j[l, k] R_k[j, i] with n = m^2, all blocks of rank one."""
    m = 5
    left, right = torch.randn(m, m, m, dtype=torch.float64), torch.randn(m, m, m, dtype=torch.float64)
    want = torch.einsum("jlk,kji->ljki", left, right).reshape(m * m, m * m)
    # class j holds rows l m + j; its rows are L_j[l], its first stage R_k[j]
    w1, w2 = monarch.of_published(right, left)
    packed = monarch.make(dense.make(w1.float()), dense.make(w2.float()), shape=(m * m, m * m), blocks_in=m, blocks_out=m, strided=True)
    assert torch.allclose(monarch.unpack(packed, torch.float64), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_published_tensors_mean_the_strided_form(grid: tuple[int, ...]) -> None:
    n, k, i, o, _ = grid
    w1, w2 = factors(*grid)
    first, second = monarch.to_published(w1, w2, i, o)
    back = monarch.of_published(first, second)
    assert torch.equal(back[0], w1) and torch.equal(back[1], w2)
    _, p = monarch.sizes(n, k, i, o)
    left, right = monarch.of_factors(w1, w2, i, o)
    w = monarch.of_blocks(left @ right, n, k, True)
    eye = torch.nn.functional.pad(torch.eye(k, dtype=torch.float64), (0, i * p - k))
    assert torch.allclose(published(eye, first, second)[:, :n], w.t(), atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_strided_is_contiguous_with_rows_permuted(grid: tuple[int, ...]) -> None:
    n, k, i, o, t = grid
    s, p = monarch.sizes(n, k, i, o)
    whole = (o * s, i * p, i, o, t)  # without cropping, rows (j, o) against (o, j)
    a, b = (monarch.unpack(store(*whole, strided), torch.float64) for strided in (True, False))
    order = torch.arange(o * s).view(o, s).t().reshape(-1)
    assert torch.equal(a, b[order])


@pytest.mark.parametrize("strided", [False, True])
def test_blocks_and_back(strided: bool) -> None:
    w = torch.randn(30, 17)
    blocks = monarch.to_blocks(w, 4, 7, strided)
    assert blocks.shape == (7, 4, 5, 5) and torch.equal(monarch.of_blocks(blocks, 30, 17, strided), w)


@pytest.mark.parametrize("bits", [0, 3, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bytes_are_those_of_the_formula(grid: tuple[int, ...], bits: int) -> None:
    packed = quantized(*grid, bits) if bits else store(*grid, False, torch.bfloat16)
    values = dict(zip(sympy.symbols("N K", positive=True, integer=True), grid[:2], strict=True))
    assert packed.nbytes == int(monarch.nbytes(**packed.attrs, bits=bits, group=16).subs(values))


def quantized(n: int, k: int, i: int, o: int, t: int, bits: int) -> Packed:
    parts = []
    for w in factors(n, k, i, o, t):
        codes = torch.randint(0, 2**bits, (w.shape[0], bipolar.padded(w.shape[1], 16)), dtype=torch.uint8)
        scale = torch.rand(w.shape[0], bipolar.groups(w.shape[1], 16)).half() + 0.1
        parts.append(bipolar.make(codes, scale, None, k=w.shape[1], bits=bits, group=16, grid="symmetric"))
    return monarch.make(*parts, shape=(n, k), blocks_in=i, blocks_out=o)


def test_bipolar_factors_mean_their_product() -> None:
    packed = quantized(30, 17, 4, 3, 2, 5)
    from effllm.runtime.formats import parts

    w1, w2 = (bipolar.unpack(parts.part(packed, key)).double() for key in ("w1", "w2"))
    left, right = monarch.of_factors(w1, w2, 4, 3)
    assert torch.equal(monarch.unpack(packed, torch.float64), monarch.of_blocks(left @ right, 30, 17, False))


def test_works_on_meta_tensors() -> None:
    packed = store(30, 17, 4, 3, 2, True).to("meta")
    formats.get("monarch").validate(packed)
    w = monarch.unpack(packed)
    assert w.shape == (30, 17) and w.device.type == "meta"


def _damaged(packed: Packed, change: str) -> Packed:
    attrs: dict[str, Any] = {**packed.attrs, "w1": {**packed.attrs["w1"]}}
    tensors = dict(packed.tensors)
    if change == "rank":
        attrs["rank"] = 3
    elif change == "no rank":
        del attrs["rank"]
    elif change == "rank above full":
        attrs["rank"] = 99
    elif change == "blocks":
        attrs["blocks_in"] = 1000
    elif change == "strided":
        attrs["strided"] = "yes"
    elif change == "no part":
        del attrs["w1"]
    elif change == "format":
        attrs["w1"]["format"] = "lowrank"
    elif change == "version":
        attrs["w1"]["version"] = 9
    elif change == "short":
        tensors["w2.values"] = tensors["w2.values"][:-1]
    elif change == "missing":
        del tensors["w2.values"]
    else:
        tensors["stray"] = torch.zeros(1)
    return Packed(packed.format, packed.version, packed.shape, tensors, attrs)


@pytest.mark.parametrize("change", ["rank", "no rank", "rank above full", "blocks", "strided", "no part", "format", "version", "short", "missing", "stray"])
def test_damage_is_refused(change: str) -> None:
    with pytest.raises(CheckpointError, match="E-CKP-SHAPE"):
        monarch.validate(_damaged(store(24, 60, 6, 6, 2, False), change))


@pytest.mark.parametrize("blocks", [(0, 1), (1, 0), (61, 1), (1, 25)])
def test_blocks_that_do_not_fit(blocks: tuple[int, int]) -> None:
    with pytest.raises(WeightError, match="E-WGT-BLOCKS"):
        monarch.sizes(24, 60, *blocks)


def test_published_tensors_that_do_not_fit() -> None:
    with pytest.raises(WeightError, match="E-WGT-SHAPE"):
        monarch.of_published(torch.zeros(2, 5, 3), torch.zeros(2, 4, 4))
