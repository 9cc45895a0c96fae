"""The GPU word layout: exact inverse, field order, gathers, shapes."""

from __future__ import annotations

import pytest
import torch

from effllm.runtime import layouts
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import words


def packed(n: int, k: int, bits: int, group: int, grid: str = "symmetric", seed: int = 0) -> Packed:
    gen = torch.Generator().manual_seed(seed)
    kp, g = bipolar.padded(k, group), bipolar.groups(k, group)
    codes = torch.randint(0, 2**bits, (n, kp), generator=gen, dtype=torch.uint8)
    codes[:, k:] = 0
    scale = torch.rand(n, g, generator=gen).add(0.1).half()
    low = -torch.rand(n, g, generator=gen).half() if grid == "affine" else None
    return bipolar.make(codes, scale, low, k=k, bits=bits, group=group, grid=grid)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 16), (5, 40, 16), (16, 96, 32), (33, 130, 64), (17, 200, 128), (7, 77, 0), (20, 256, 0)])
def test_restore_is_the_inverse_of_repack(bits: int, n: int, k: int, group: int) -> None:
    for grid in ("symmetric", "affine"):
        before = packed(n, k, bits, group, grid)
        tensors = words.repack(before)
        for key, (shape, dtype) in words.fake_shapes((n, k), bits, group).items():
            if key in tensors:
                assert tuple(tensors[key].shape) == shape
                assert tensors[key].dtype == (dtype or torch.float16)
                assert tensors[key].is_contiguous()
        after = words.restore(tensors, before.shape, before.attrs)
        assert after.tensors.keys() == before.tensors.keys()
        for key, value in before.tensors.items():
            assert torch.equal(after.tensors[key], value), key


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_a_single_column_lands_where_the_docstring_says(p: int) -> None:
    columns = 32 // p
    for c in (0, 1, 2, columns - 1, columns, columns + 3):
        codes = torch.zeros(2, 64, dtype=torch.uint8)
        codes[1, c] = 2**p - 1
        weight = bipolar.make(codes, torch.ones(2, 2), None, k=64, bits=p, group=32, grid="symmetric")
        got = words.repack(weight)["codes"]
        want = (2**p - 1) << ((c % columns % 2) * 16 + (c % columns // 2) * p)
        assert int(got[c // columns, 1]) & 0xFFFFFFFF == want
        assert int((got != 0).sum()) == 1


def test_parts_are_stacked_most_significant_first() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0] = 0b1010011  # 4 + 2 + 1 bits: 1010, 01, 1
    weight = bipolar.make(codes, torch.ones(1, 1), None, k=32, bits=7, group=32, grid="symmetric")
    got = words.repack(weight)["codes"]
    assert got.shape == (7, 16)
    assert [int(v) for v in got[:, 0]] == [0b1010, 0, 0, 0, 0b01, 0, 1]


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_gather_equals_the_dense_rows(bits: int) -> None:
    weight = packed(21, 100, bits, 16, "affine")
    dense = bipolar.unpack(weight)
    t = words.repack(weight)
    for index in (None, torch.tensor([20, 0, 7, 7])):
        u, s, low = words.rows(t["codes"], t["scale"], t["minimum"], index, n=21, bits=bits, group=16)
        got = bipolar.dequantize(u, s, low, 0.0, 16)[:, :100]
        assert torch.equal(got, dense if index is None else dense[index])


def test_bytes_are_those_of_the_format_for_whole_tiles() -> None:
    weight = packed(64, 256, 3, 32, "affine")
    assert layouts.get("words") is words
    assert sum(t.numel() * t.element_size() for t in words.repack(weight).values()) == weight.nbytes
