"""KIVI: the quantizer's bound, packing, byte table, and what attention sees."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CacheError
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.codes import dequantize, pack, quantize, unpack
from effllm.runtime.caches.layer import Layer


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_round_trips_and_has_the_documented_order(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 48, 64), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed, f = pack(codes, bits), 8 // bits
    assert packed.shape == (3, 3, 64 // (4 * f), 64)
    assert torch.equal(unpack(packed, bits), codes)
    for row, column in ((0, 0), (17, 5), (47, 63), (31, 32)):
        quad, i = divmod(column, 4)
        j, field = divmod(quad, f)
        byte = int(packed[1, row // 16, j, 4 * (row % 16) + i])
        assert byte >> (bits * field) & (2**bits - 1) == int(codes[1, row, column])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 64, 32, generator=g) * torch.exp(2 * torch.randn(5, 1, 32, generator=g)) + torch.randn(5, 1, 32, generator=g)
    codes, scale, low = quantize(x, bits, 32)
    error = (x - dequantize(codes, scale, low, 32)).abs().reshape(5, 2, 32, 32)
    # rounding the minimum moves the grid by 2^-11 of it, rounding the step stretches it by 2^-11 a step
    bound = scale.float() * (0.5 + 2**bits * 2.0**-11) + low.float().abs() * 2.0**-11 + 2.0**-24
    assert (error <= bound[:, :, None, :]).all()
    assert float(error.max()) > 0.3 * float(scale.max())  # and it is used


def test_constant_groups_are_exact_and_codes_reach_both_ends() -> None:
    x = torch.full((1, 32, 2), 0.5)
    x[0, :, 1] = torch.linspace(-3, 3, 32)
    codes, scale, low = quantize(x, 4, 32)
    assert torch.equal(dequantize(codes, scale, low, 32)[..., 0], x[..., 0])
    assert codes[0, :, 1].min() == 0 and codes[0, :, 1].max() == 15


@pytest.mark.parametrize(("text", "dim", "share"), [("kivi(bits=4)", 128, 28.1), ("kivi(bits=2,group=32)", 128, 18.8), ("kivi(bits=2)", 128, 15.6)])
def test_bytes_are_those_of_the_paper(text: str, dim: int, share: float) -> None:
    for heads in (1, 8):
        assert parse(text).bytes_per_token(heads, dim, torch.bfloat16) / (4 * heads * dim) * 100 == pytest.approx(share, abs=0.06)
        layout = parse(text).layout(heads, dim, torch.bfloat16)
        assert layout.page == layout.payload  # nothing is lost to alignment at this size


def test_eight_bits_are_close_and_more_bits_are_closer() -> None:
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(1, 2, 256, 64, generator=g), torch.randn(1, 2, 256, 64, generator=g)
    errors = []
    for bits in (2, 4, 8):
        layer = Layer(f"kivi(bits={bits})", 256)
        layer.allocate(k, v)
        layer.append(k, v)
        errors.append([float((a[:, :, :256] - b).norm() / b.norm()) for a, b in zip(layer.read(), (k, v), strict=True)])
    assert all(a > 3 * b for a, b in zip(errors[0], errors[1], strict=True)) and all(a > 3 * b for a, b in zip(errors[1], errors[2], strict=True))
    assert max(errors[2]) < 1e-2


@pytest.mark.parametrize(("heads", "dim", "text"), [(2, 40, "kivi(group=16)"), (2, 96, "kivi(group=64)"), (1, 72, "kivi")])
def test_head_sizes_that_do_not_fit(heads: int, dim: int, text: str) -> None:
    x = torch.zeros(1, heads, 1, dim)
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        Layer(text, 64).allocate(x, x)
