"""The op "prompt_attention": every provider against fp64, for masks of every kind, odd sizes and strides; and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem

providers.load("cpu")
OP = OPS["prompt_attention"]
NAMES = [p.name for p in OP.providers.values() if p.device in ("any", "cpu")]
OURS = [n for n in NAMES if n != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# heads, key heads, queries, keys, size, size of values
SIZES = [(6, 2, 70, 150, 64, 64), (4, 4, 33, 33, 72, 40), (9, 3, 130, 257, 40, 96), (2, 1, 1, 65, 20, 20), (5, 1, 3, 3, 128, 128), (1, 1, 200, 64, 33, 7)]


def made(sizes: tuple[int, ...], dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups, queries, keys, size, value = sizes
    g = torch.Generator().manual_seed(1)
    q = torch.randn(batch, queries, heads, size, generator=g).to(dtype).transpose(1, 2)  # strided, as projections are
    k, v = (torch.randn(batch, groups, keys + 5, d, generator=g).to(dtype)[:, :, :keys] for d in (size, value))  # and caches
    return q, k, v


def mask_of(kind: str, q: Tensor, k: Tensor) -> Tensor | None:
    b, h, n, s = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    g = torch.Generator().manual_seed(2)
    behind = torch.arange(s - n, s)[:, None] - torch.arange(s)
    masks = {
        "none": None,
        "causal": None,
        "triangle": (behind >= 0)[None, None],
        "window": ((behind >= 0) & (behind < 40))[None, None],
        "padding": (torch.arange(s)[None, :] >= torch.tensor([0, s // 2])[:, None])[:, None, None].expand(b, 1, n, s),
        "heads": torch.rand(b, h, n, s, generator=g) > 0.4,
        "float": torch.randn(1, h, n, s, generator=g).to(q.dtype),
        "hidden": torch.where(behind >= 0, 0.0, -torch.inf).to(q.dtype)[None, None],
        "strided": (torch.rand(1, 1, s, n, generator=g) > 0.5).transpose(2, 3),
    }
    return masks[kind]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    score = scale * q.double() @ k.double().repeat_interleave(repeat, 1).transpose(-1, -2)
    if causal:
        score = score.masked_fill(~torch.ones(score.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask.double()
    return (score.softmax(-1).nan_to_num(0.0) @ v.double().repeat_interleave(repeat, 1)).transpose(1, 2)


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


def usable(kernel: str, dtype: torch.dtype) -> None:
    verdict = OP.providers[kernel].supports(Problem(OP.name, 6, 40, 0, 0, False, dtype=dtype))
    if not verdict:
        pytest.skip(verdict.reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", NAMES)
def test_every_mask_and_size(kernel: str, dtype: torch.dtype) -> None:
    usable(kernel, dtype)
    for i, sizes in enumerate(SIZES):
        for kind in ("none", "causal", "triangle", "window", "padding", "heads", "float", "hidden", "strided")[i % 2 :: 2]:
            q, k, v = made(sizes, dtype)
            mask = mask_of(kind, q, k)
            args = (q, k, v, mask, kind == "causal", 0.2)
            if kernel == "reference" and kind in ("triangle", "window", "hidden") and sizes[2] > sizes[3]:
                continue  # rows without keys: torch's kernels differ in what they give
            true = exact(*args)
            assert distance(OP.providers[kernel].call(*args), true) < 8 * torch.finfo(dtype).eps, (sizes, kind)


@pytest.mark.parametrize("kernel", OURS)
def test_what_hidden_keys_hold_does_not_matter(kernel: str) -> None:
    usable(kernel, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = made((6, 2, 70, 200, 64, 64), dtype)
        mask = torch.zeros(1, 1, 70, 200, dtype=torch.bool)
        mask[..., 3:130] = torch.rand(70, 127, generator=torch.Generator().manual_seed(4)) > 0.3
        before = OP.providers[kernel].call(q, k, v, mask, False, 0.1)
        for t in (k, v):
            t[:, :, :3], t[:, :, 130:] = torch.nan, torch.inf
        assert torch.equal(OP.providers[kernel].call(q, k, v, mask, False, 0.1), before)
        hidden = torch.where(mask, 0.0, -torch.inf)
        assert torch.equal(OP.providers[kernel].call(q, k, v, hidden, False, 0.1), before)


@pytest.mark.parametrize("kernel", OURS)
def test_nan_reaches_those_who_attend_to_it_and_empty_rows_are_zero(kernel: str) -> None:
    usable(kernel, torch.float32)
    q, k, v = made((6, 2, 70, 100, 64, 64), torch.float32)
    mask = torch.ones(1, 1, 70, 100, dtype=torch.bool).tril(30)
    mask[:, :, 7] = False
    k[0, 1, 40] = torch.nan  # seen by queries 10 and later of heads 3 to 5
    y = OP.providers[kernel].call(q, k, v, mask, False, 0.1)
    bad = y.isnan().any(-1)
    assert bad[0, 10:, 3:].all() and not bad[0, :10].any() and not bad[0, :, :3].any() and not bad[1].any()
    assert (y[:, 7] == 0).all()
    assert OP.providers[kernel].call(q[:, :, :0], k, v, None, False, 0.1).shape == (2, 0, 6, 64)


@pytest.mark.parametrize("kernel", OURS)
def test_bad_input_is_refused(kernel: str) -> None:
    usable(kernel, torch.float32)
    q, k, v = made((6, 2, 8, 9, 16, 16), torch.float32)
    call = OP.providers[kernel].call
    for args in ((q, k[..., :8], v, None, False, 1.0), (q, k, v[:, :, :8], None, False, 1.0), (q[:, :5], k, v, None, False, 1.0), (q, k.bfloat16(), v, None, False, 1.0),
                 (q, k, v, torch.ones(1, 1, 8, 9, dtype=torch.bool), True, 1.0), (q, k, v, torch.ones(1, 1, 8, 5, dtype=torch.bool), False, 1.0)):  # fmt: skip
        with pytest.raises(RuntimeError, match="effllm"):
            call(*args)
