"""Block floating point: exact powers, error bounds, both exponent rules, packing, bytes."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CacheError
from effllm.runtime.formats.kv import bfp


def data(dim: int = 64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 50, dim, generator=g, dtype=torch.float64)
    return x * 2.0 ** torch.randint(-20, 20, (2, 3, 50, 1), generator=g)


@pytest.mark.parametrize("mantissa", range(2, 9))
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("rule", bfp.RULES)
def test_error_bound(mantissa: int, block: int, rule: str) -> None:
    x = data()
    y = bfp.decode(bfp.encode(x, mantissa, block, rule), mantissa, torch.float64)
    most = x.unflatten(-1, (-1, block)).abs().amax(-1, keepdim=True)
    e = torch.floor(torch.log2(most))
    step = torch.exp2(e - mantissa + 2)
    error = (y - x).unflatten(-1, (-1, block)).abs()
    if rule == "clip":  # half a step, except for what exceeds the largest code: up to one
        over = x.unflatten(-1, (-1, block)).abs() > ((1 << (mantissa - 1)) - 1) * step
        assert (error <= torch.where(over, step, step / 2)).all()
        assert (error > step / 2).any()
    else:
        raised = (most / step).round() > (1 << (mantissa - 1)) - 1
        assert (error <= torch.where(raised, step, step / 2)).all()


def test_powers_of_two_are_exact() -> None:
    x = 2.0 ** torch.arange(-64, 64).double()
    for mantissa in (4, 8):
        alone = x[:, None].expand(-1, 16)
        assert torch.equal(bfp.decode(bfp.encode(alone, mantissa, 16), mantissa, torch.float64), alone)


def test_top_of_the_binade() -> None:
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1] = 1.95, 1.0
    clip, rise = (bfp.decode(bfp.encode(x, 4, 16, rule), 4) for rule in bfp.RULES)
    assert clip[0, :2].tolist() == [1.75, 1.0] and rise[0, :2].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("mantissa", [4, 8])
def test_zero_and_not_finite(mantissa: int) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    x[0] = 0
    x[1, 40], x[2, 3] = torch.nan, torch.inf
    y = bfp.decode(bfp.encode(x, mantissa, 32), mantissa)
    assert (y[0] == 0).all()
    assert y[1, 32:].isnan().all() and y[1, :32].isfinite().all()
    assert y[2, :32].isnan().all() and y[2, 32:].isfinite().all()


def test_packing() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(bfp.unpack4(bfp.pack4(codes)), codes)
    assert bfp.pack4(codes)[0] == (0b1000 | 0 << 4)  # channel 0 is -8, channel 8 is 0


def test_more_bits_and_smaller_blocks_are_closer() -> None:
    x = data(128)
    x[..., 7] *= 50

    def error(mantissa: int, block: int) -> float:
        return float((bfp.decode(bfp.encode(x, mantissa, block), mantissa, torch.float64) - x).norm())

    by_bits = [error(m, 32) for m in range(2, 9)]
    by_block = [error(4, n) for n in (16, 32, 64, 128)]
    assert by_bits == sorted(by_bits, reverse=True) and by_block == sorted(by_block)


@pytest.mark.parametrize(("mantissa", "block"), [(4, 64), (4, 16), (3, 32), (8, 32)])
def test_bytes(mantissa: int, block: int) -> None:
    stored = bfp.encode(data(128), mantissa, block)
    assert sum(t.nbytes for t in stored) == 2 * 3 * 50 * bfp.token_bytes(128, mantissa, block)
    assert bfp.token_bytes(128, 4, 64) == 66


def test_bad_input() -> None:
    x = torch.zeros(2, 64)
    wrong = (("E-KVC-BITS", 1, 32, "clip"), ("E-KVC-BITS", 9, 32, "clip"), ("E-KVC-GROUP", 4, 48, "clip"), ("E-KVC-RULE", 4, 32, "up"))
    for code, mantissa, block, rule in wrong:
        with pytest.raises(CacheError) as caught:
            bfp.encode(x, mantissa, block, rule)
        assert caught.value.code == code
