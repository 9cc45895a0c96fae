"""Sorted block floating point: order is undone, sorting helps and costs nothing, bytes, bad settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.layer import Layer
from effllm.solvers.kv.ksort import channel_order


def states() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    size = torch.ones(2, 1, 64)
    size[:, :, torch.randperm(64, generator=g)[:6]] = 12
    return torch.randn(2, 2, 300, 64, generator=g) * size, torch.randn(2, 2, 300, 64, generator=g)


def error(spec: str, order: Tensor | None = None) -> float:
    k, v = states()
    layer = Layer(spec, 300, None if order is None else [order, torch.arange(64).repeat(2, 1)])
    layer.allocate(k, v)
    layer.append(k, v)
    return float((layer.read()[0][:, :, :300] - k).norm())


def test_sorting_helps_below_whole_heads() -> None:
    k, _ = states()
    order = channel_order(k.square().mean((0, 2)))
    for block in (16, 32):
        assert error(f"bfp(block={block})", order) < 0.9 * error(f"bfp(block={block})")
    assert error("bfp(block=64)", order) == pytest.approx(error("bfp(block=64)"), rel=1e-5)


def test_more_bits_are_closer_and_eight_are_close() -> None:
    k, _ = states()
    errors = [error(f"bfp(bits={b},vbits={b})") for b in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * float(k.norm())


def test_bytes() -> None:
    layout = parse("bfp(bits=4,vbits=4,block=64)").layout(2, 128, torch.bfloat16)
    assert layout.payload == 2 * 64 * 2 * 66 and layout.page <= 1.01 * layout.payload
    assert parse("bfp(bits=4,vbits=8,block=32)").bytes_per_token(1, 64, torch.bfloat16) == 34 + 66


@pytest.mark.parametrize("spec", ["bfp(bits=1)", "bfp(vbits=9)", "bfp(rule=up)"])
def test_bad_settings(spec: str) -> None:
    k, v = states()
    with pytest.raises(CacheError, match="E-KVC-VALUE"):
        Layer(spec, 300).allocate(k, v)


def test_block_that_does_not_divide_the_head() -> None:
    k, v = states()
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        Layer("bfp(block=48)", 300).allocate(k, v)
