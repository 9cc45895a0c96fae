"""Mustafar: neutral setting, what is stored, bytes, quality falls with sparsity, bad settings."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CacheError
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.layer import Layer
from effllm.runtime.formats.kv import bitmap


def states(seed: int = 0, tokens: int = 700, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 2, tokens, dim, generator=g) for _ in range(2))
    return k, v


def filled(spec: str, k: torch.Tensor, v: torch.Tensor) -> Layer:
    layer = Layer(spec, k.shape[2])
    layer.allocate(k, v)
    layer.append(k, v)
    return layer


def test_no_sparsity_is_dense() -> None:
    k, v = states()
    layer = filled("mustafar(sparsity=0)", k, v)
    keys, values = layer.read()
    assert int(layer.lens[1]) == 512 and torch.equal(keys[:, :, :700], k) and torch.equal(values[:, :, :700], v)


def test_pages_hold_the_pruned_tokens_and_the_window_is_whole() -> None:
    k, v = states()
    layer = filled("mustafar(sparsity=0.7)", k, v)
    for x, y in zip((k, v), layer.read(), strict=True):
        assert torch.equal(y[:, :, :512], bitmap.prune(x[:, :, :512], 0.7))
        assert torch.equal(y[:, :, 512:700], x[:, :, 512:])
    assert layer.format.window <= 700 - 512


@pytest.mark.parametrize(("sparsity", "bits", "most"), [(0.5, 16, 0.65), (0.7, 16, 0.46), (0.7, 4, 0.20)])
@pytest.mark.parametrize("dim", [64, 128])
def test_bytes(sparsity: float, bits: int, most: float, dim: int) -> None:
    f = parse(f"mustafar(sparsity={sparsity},bits={bits})")
    layout = f.layout(3, dim, torch.bfloat16)
    formula = 3 * sum(bitmap.page_bytes(dim, sparsity, keys=keys, bits=bits) for keys in (True, False))
    assert layout.payload == formula and layout.page <= 1.01 * formula
    assert layout.page / (f.page * 3 * dim * 4) <= most


def test_quality_falls_with_sparsity_and_bits() -> None:
    k, v = states(1)
    q = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(2))
    true = filled("mustafar(sparsity=0)", k, v).attend(q, kernel="reference")

    def error(spec: str) -> float:
        return float((filled(spec, k, v).attend(q, kernel="reference") - true).norm())

    rising = [error(f"mustafar(sparsity={s})") for s in (0, 0.25, 0.5, 0.7, 0.9)]
    assert rising == sorted(rising) and rising[0] < 1e-5 < rising[1]
    assert error("mustafar(sparsity=0,bits=4)") > error("mustafar(sparsity=0,bits=8)") > rising[0]


@pytest.mark.parametrize("spec", ["mustafar(sparsity=1)", "mustafar(sparsity=-0.1)", "mustafar(page=100)", "mustafar(bits=5)"])
def test_bad_settings(spec: str) -> None:
    with pytest.raises(CacheError):
        parse(spec)
