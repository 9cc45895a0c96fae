"""Large pages hold the same values, each tensor its own memory, and give it back."""

from __future__ import annotations

import mmap

import pytest
import torch

from effllm.runtime import pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_same_values_in_other_memory(dtype):
    x = torch.randint(0, 200, (70, 129)).to(dtype)
    y = pages.place(x)
    assert torch.equal(x, y) and y.dtype == dtype and y.is_contiguous() and y.data_ptr() % 64 == 0
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert y.data_ptr() != x.data_ptr()
    z = pages.place(x + 1)
    y.zero_()
    assert torch.equal(z, x + 1)


def test_small_and_strided_tensors_stay():
    small, strided = torch.zeros(10), torch.zeros(200, 200).t()
    assert pages.place(small) is small and pages.place(strided) is strided


def test_more_than_a_chunk():
    big = torch.arange((65 << 20) // 8)
    assert torch.equal(pages.place(big)[-5:], big[-5:])
