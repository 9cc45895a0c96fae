"""Bitmap format: exact counts, element order, round trips, byte formula, quantized payload."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CacheError
from effllm.runtime.formats.kv import bitmap

SIDES = pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])


def data(dim: int, pages: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, pages * bitmap.PAGE, dim, generator=g, dtype=torch.float64)
    return (x * 2.0 ** torch.randint(-6, 7, (*x.shape[:-1], 1), generator=g)).to(dtype)


@pytest.mark.parametrize(("dim", "sparsity", "kept"), [(128, 0.7, 39), (64, 0.7, 20), (128, 0.5, 64), (80, 0.0, 80), (100, 0.29, 71), (32, 0.99, 1)])
def test_exact_count_and_largest(dim: int, sparsity: float, kept: int) -> None:
    x = data(dim, 1)
    mask = bitmap.keep_mask(x, bitmap.keep_count(dim, sparsity))
    assert (mask.sum(-1) == kept).all()  # k-th value thresholds keep one more
    least = torch.where(mask, x.abs(), torch.inf).amin(-1)
    most = torch.where(mask, 0.0, x.abs()).amax(-1)
    assert (least >= most).all()


def test_ties_keep_the_first() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 2.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert bitmap.keep_mask(x, 3).tolist() == [[False, True, True, True, False, False], [True, True, True, False, False, False]]


def test_nan_is_kept_and_stays() -> None:
    x = data(64, 1)
    x[0, 0, 5, 7] = torch.nan
    for keys in (True, False):
        y = bitmap.decode(bitmap.encode(x, 0.9, keys=keys), 64, keys=keys, dtype=x.dtype)
        assert y[0, 0, 5, 7].isnan() and y.isnan().sum() == 1


@SIDES
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 192])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_round_trip_is_exact(dim: int, sparsity: float, keys: bool) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x = data(dim, dtype=dtype)
        stored = bitmap.encode(x, sparsity, keys=keys)
        assert torch.equal(bitmap.decode(stored, dim, keys=keys, dtype=dtype), bitmap.prune(x, sparsity))
        if sparsity == 0:
            assert torch.equal(bitmap.decode(stored, dim, keys=keys, dtype=dtype), x)


def test_element_order() -> None:
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[0, 0] = mask[1, 63] = mask[2, 1] = True
    made = bitmap.words(mask)
    assert made.tolist() == [1, torch.iinfo(torch.int64).min, 2]
    assert torch.equal(bitmap.bits_of(made), mask)


def test_tiles_of_keys_run_along_tokens() -> None:
    x = torch.zeros(bitmap.PAGE, 64, dtype=torch.float64)
    x[64 + 3, 5] = 7  # token 67 lies in block 1
    x[:, 0] += 1e-3
    stored = bitmap.encode(x, 63 / 64, keys=True)
    assert stored.bitmap.shape == (1, 4, 64) and stored.bitmap[0, 1, 5] == 1 << 3
    assert stored.values[0, 127] == 7  # the last of block 1: channel 5 comes after channel 0
    values = bitmap.encode(x, 63 / 64, keys=False)
    assert values.bitmap.shape == (1, 256, 1) and values.bitmap[0, 67, 0] == 1 << 5 and values.values[0, 67] == 7


@SIDES
def test_pages_are_independent(keys: bool) -> None:
    x = data(64, 3, torch.bfloat16)
    whole = bitmap.encode(x, 0.7, keys=keys, bits=8)
    for page in range(3):
        one = bitmap.encode(x[:, :, page * 256 : (page + 1) * 256], 0.7, keys=keys, bits=8)
        for a, b in zip(whole, one, strict=True):
            assert torch.equal(a[:, :, page], b[:, :, 0])


@SIDES
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_bytes(dim: int, bits: int, keys: bool) -> None:
    for sparsity in (0.5, 0.7):
        stored = bitmap.encode(data(dim, 1, torch.bfloat16)[:1, :1], sparsity, keys=keys, bits=bits)
        assert sum(t.nbytes for t in stored if t is not None) == bitmap.page_bytes(dim, sparsity, keys=keys, bits=bits)


def test_seventy_percent_is_below_the_published_share() -> None:
    for dim in (64, 128):
        both = sum(bitmap.page_bytes(dim, 0.7, keys=keys) for keys in (True, False))
        assert both / (2 * 2 * dim * bitmap.PAGE) <= 0.46


@SIDES
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_error_is_half_a_step(bits: int, keys: bool) -> None:
    x = data(64, 1, torch.float32)
    stored = bitmap.encode(x, 0.5, keys=keys, bits=bits)
    y, pruned = bitmap.decode(stored, 64, keys=keys, bits=bits), bitmap.prune(x, 0.5)
    assert stored.scale is not None
    step = stored.scale.flatten(-3, -2)[..., 1:].float()
    # half a step, and what fp16 rounds off the least value and, over all levels, off the step
    slack = pruned.abs().amax(-1, keepdim=True) * 2**-10
    assert ((y - pruned).abs() <= step / 2 + slack).all()
    assert torch.equal(y != 0, pruned != 0)
    assert (y.sign() == pruned.sign()).all()


@SIDES
def test_constant_tokens_quantize_exactly(keys: bool) -> None:
    x = torch.full((256, 64), -0.5)
    assert torch.equal(bitmap.decode(bitmap.encode(x, 0.5, keys=keys, bits=4), 64, keys=keys, bits=4), bitmap.prune(x, 0.5))


def test_bad_input() -> None:
    for code, call in (
        ("E-KVC-SPARSITY", lambda: bitmap.keep_count(64, 1.0)),
        ("E-KVC-SPARSITY", lambda: bitmap.keep_count(64, -0.1)),
        ("E-KVC-PAGE", lambda: bitmap.encode(torch.zeros(255, 64), 0.5, keys=True)),
        ("E-KVC-BITS", lambda: bitmap.encode(torch.zeros(256, 64), 0.5, keys=True, bits=3)),
    ):
        with pytest.raises(CacheError) as caught:
            call()
        assert caught.value.code == code
