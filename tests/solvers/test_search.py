"""Data-free scale search: theory it must meet, grids it must recover, weights it must refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from effllm.errors import CalibrationError, EffllmError, WeightError
from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.solvers import solve
from effllm.solvers.search import pays

GRIDS = ("none", "integer", "affine", "auto")


def error(w: Tensor, packed: Packed) -> float:
    """Squared error relative to the weight's own."""
    return float((w.double() - bipolar.unpack(packed).double()).square().sum() / w.double().square().sum())


def spread(n: int, k: int, group: int = 32, seed: int = 0) -> Tensor:
    """Random weights whose groups differ in scale by up to four decades."""
    torch.manual_seed(seed)
    g = -(-k // group)
    factor = 10 ** (4 * torch.rand(n, g) - 3)
    return torch.randn(n, k) * factor.repeat_interleave(group, 1)[:, :k]


# least mean squared error on N(0, 1): 1 - 2/pi, then the optimal uniform quantizers of each grid
@pytest.mark.parametrize(
    ("offset", "bits", "expected"),
    [("none", 1, 1 - 2 / math.pi), ("none", 2, 0.1196), ("none", 3, 0.0378), ("none", 4, 0.01168), ("integer", 3, 0.0409), ("integer", 4, 0.01192)],
)
def test_gaussian_optimum(offset: str, bits: int, expected: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 16384)
    packed = solve(w, Bipolar(bits=bits, group=0, offset=offset))
    assert error(w, packed) * float(w.square().mean()) == pytest.approx(expected, rel=0.01)


def test_one_bit_scale_is_the_mean_magnitude() -> None:
    w = spread(16, 128)
    packed = solve(w, Bipolar(bits=1, group=32, offset="none"))
    expected = w.view(16, 4, 32).abs().mean(-1)
    # one rounding to fp16, absolute near its smallest numbers
    torch.testing.assert_close(packed.tensors["scale"].float(), expected, rtol=2**-11, atol=2**-25)
    assert torch.equal(bipolar.unpack(packed) > 0, w > 0)


@pytest.mark.parametrize("grid", bipolar.GRIDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_weights_on_a_grid_are_recovered(bits: int, grid: str) -> None:
    torch.manual_seed(bits)
    n, k, group, top = 8, 128, 32, 2**bits - 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    edges = codes.view(n, -1, group)
    edges[..., 0], edges[..., 1] = 0, top
    if grid == "integer":
        # its largest code is one step short of its smallest: the range that the search starts from is the smaller one on both sides
        edges[..., 0] = min(1, top)
        edges.clamp_(min=min(1, top))
    scale = (2.0 ** torch.randint(-6, 3, (n, k // group))).half()
    minimum = torch.randint(-8, 8, scale.shape).half() if grid == "affine" else None
    w = bipolar.unpack(bipolar.make(codes, scale, minimum, k=k, bits=bits, group=group, grid=grid))
    if grid == "integer" and bits == 1:
        assert w.abs().max() == 0  # without its smallest code a 1-bit integer grid holds only zero
    packed = solve(w, Bipolar(bits=bits, group=group, offset={"symmetric": "none"}.get(grid, grid)))
    assert torch.equal(bipolar.unpack(packed), w)


@pytest.mark.parametrize("offset", GRIDS)
@pytest.mark.parametrize("group", [16, 32, 128, 0])
def test_more_bits_are_never_worse(offset: str, group: int) -> None:
    w = spread(16, 256, seed=3)
    errors = [error(w, solve(w, Bipolar(bits=b, group=group, offset=offset))) for b in range(2, 9)]
    # a bit is worth a factor of 4; half of that must show at every step
    assert all(b < a / 2 for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("offset", GRIDS)
def test_never_worse_than_rounding_to_the_largest(offset: str) -> None:
    w = spread(32, 256, seed=4)
    for bits in (2, 3, 4):
        top = 2**bits - 1
        x = w.view(32, 8, 32)
        s = (x.abs().amax(-1, keepdim=True) / top).half().float()
        plain = s * (2 * ((x / s + top) / 2).round().clamp(0, top) - top)
        found = (w - bipolar.unpack(solve(w, Bipolar(bits=bits, group=32, offset=offset)))).view_as(x).square().sum()
        assert found < (x - plain).square().sum()


def test_swapping_groups_swaps_results() -> None:
    w = spread(8, 128, seed=5)
    params = Bipolar(bits=4, group=32, offset="none")
    order = torch.tensor([2, 0, 3, 1])
    swapped = w.view(8, 4, 32)[:, order].reshape(8, 128)
    a, b = solve(w, params), solve(swapped, params)
    assert torch.equal(a.tensors["scale"][:, order], b.tensors["scale"])
    assert torch.equal(bipolar.unpack(a).view(8, 4, 32)[:, order].reshape(8, 128), bipolar.unpack(b))
    assert not torch.equal(a.tensors["scale"], b.tensors["scale"])


def test_truncated_codes_are_unbiased() -> None:
    """Over all codes, the first k planes of a bipolar weight have the mean and the mid-rise grid of a k-bit one."""
    u = torch.arange(256, dtype=torch.uint8).view(1, 256)
    full = bipolar.make(u, torch.ones(1, 1).half(), None, k=256, bits=8, group=0, grid="symmetric")
    for bits in range(1, 8):
        cut = bipolar.unpack(bipolar.truncate(full, bits)).double()
        lost = (bipolar.unpack(full).double() - cut).view(2**bits, -1)
        assert torch.equal(lost.sum(1), torch.zeros(2**bits, dtype=torch.double))
        step = 2.0 ** (8 - bits)
        assert torch.equal(cut.unique() / step, torch.arange(-(2**bits) + 1, 2**bits, 2, dtype=torch.double))


@pytest.mark.parametrize("k", [1, 7, 31, 33, 100])
@pytest.mark.parametrize("group", [16, 32, 0])
def test_partial_groups(k: int, group: int) -> None:
    torch.manual_seed(k)
    w = torch.randn(5, k)
    for offset in GRIDS:
        packed = solve(w, Bipolar(bits=8, group=group, offset=offset))
        assert packed.shape == (5, k) and bipolar.unpack(packed).shape == (5, k)
        assert error(w, packed) < 1e-4


@pytest.mark.parametrize("offset", GRIDS)
def test_zero_and_constant_groups(offset: str) -> None:
    w = spread(6, 64, seed=6)
    w[0] = 0.0
    w[1, :32] = 0.375
    w[2, 32:] = -0.375
    for bits in (1, 4, 8):
        got = bipolar.unpack(solve(w, Bipolar(bits=bits, group=32, offset=offset)))
        assert torch.equal(got[0], torch.zeros(64)) and got.isfinite().all()
        if offset in ("affine", "none"):
            torch.testing.assert_close(got[1, :32], w[1, :32], rtol=2**-10, atol=0)
            torch.testing.assert_close(got[2, 32:], w[2, 32:], rtol=2**-10, atol=0)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-12, 1e-6, 1.0, 1e4, 1e18, 1e37])
@pytest.mark.parametrize("offset", GRIDS)
def test_any_magnitude(size: float, offset: str) -> None:
    torch.manual_seed(7)
    w = torch.randn(8, 128)
    one = error(w, solve(w, Bipolar(bits=4, offset=offset)))
    packed = solve(w * size, Bipolar(bits=4, offset=offset))
    assert packed.tensors["scale"].isfinite().all()
    assert error(w * size, packed) < 1.1 * one
    assert (packed.tensors["scale"].dtype == torch.float32) == (not 1e-3 < size < 1e4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    w = torch.randn(8, 128).to(dtype)
    a, b = solve(w, Bipolar(bits=4)), solve(w.float(), Bipolar(bits=4))
    assert torch.equal(bipolar.unpack(a), bipolar.unpack(b))


def test_offset_only_where_it_pays() -> None:
    torch.manual_seed(9)
    w = torch.randn(64, 256)
    assert solve(w, Bipolar(bits=4)).attrs["grid"] != "affine"
    shifted = w + 3 * torch.randn(64, 8).repeat_interleave(32, 1)
    assert solve(shifted, Bipolar(bits=4)).attrs["grid"] == "affine"
    # 16 bits over 32 weights are half a bit each: a factor of 2 in squared error
    assert pays(0.49, 1.0, 32, 256, 8) and not pays(0.51, 1.0, 32, 256, 8)
    assert pays(0.49, 1.0, 16, 256, 4) and not pays(0.51, 1.0, 16, 256, 4)


def bad(value: float) -> Tensor:
    """A matrix with one bad number."""
    w = torch.ones(4, 32)
    w[3, 31] = value
    return w


@pytest.mark.parametrize(
    ("weight", "params", "code"),
    [
        (bad(float("nan")), Bipolar(), "E-WGT-NAN"),
        (bad(float("inf")), Bipolar(), "E-WGT-NAN"),
        (torch.empty(4, 32, device="meta"), Bipolar(), "E-WGT-META"),
        (torch.ones(4, 32, dtype=torch.int32), Bipolar(), "E-WGT-DTYPE"),
        (torch.ones(4, 32, dtype=torch.complex64), Bipolar(), "E-WGT-DTYPE"),
        (torch.full((4, 32), 1e300, dtype=torch.float64), Bipolar(), "E-WGT-RANGE"),
        (torch.ones(4), Bipolar(), "E-WGT-DIM"),
        (torch.ones(2, 2, 32), Bipolar(), "E-WGT-DIM"),
        (torch.ones(0, 32), Bipolar(), "E-WGT-DIM"),
        (torch.ones(4, 33), Bipolar(pad=False), "E-WGT-PAD"),
    ],
)
def test_refused_weights(weight: Tensor, params: Bipolar, code: str) -> None:
    with pytest.raises(WeightError) as caught:
        solve(weight, params)
    assert caught.value.code == code and caught.value.next_step
    assert isinstance(caught.value, EffllmError)


def test_gptq_without_statistics() -> None:
    with pytest.raises(CalibrationError) as caught:
        solve(torch.ones(4, 32), Bipolar(solver="gptq"))
    assert caught.value.code == "E-CAL-NONE"


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_weights_shipped_on_sixteen_levels_are_stored_almost_exactly(bits: int) -> None:
    """A finer affine grid holds a Q4_1 grid, up to the fp16 rounding of scale and minimum."""
    g = torch.Generator().manual_seed(bits)
    step, low = 0.01 + torch.rand(24, 4, 1, generator=g), torch.randn(24, 4, 1, generator=g)
    codes = torch.randint(0, 16, (24, 4, 32), generator=g)
    codes[..., 0], codes[..., 1] = 0, 15  # a quantizer uses both ends of its range
    w = (codes * step.half().float() + low.half().float()).view(24, 128)
    packed = solve(w, Bipolar(bits, group=32))
    assert packed.attrs["grid"] == "affine"
    assert float((bipolar.unpack(packed) - w).abs().max()) < 2e-3 * float(w.abs().max())
