"""The CPU layout of long weights, which is made part by part."""

from __future__ import annotations

import pytest
import torch

from effllm.runtime.formats import bipolar
from effllm.runtime.layouts import tile16
from tests.lowering.cases import Case, make_packed


@pytest.mark.parametrize("n", [2048, 2049, 4096 + 16, 4113])
@pytest.mark.parametrize("bits", [3, 8])
def test_long_weights_come_back_as_they_were(n, bits):
    packed = make_packed(Case(bits, 32, "affine", 1, n, 70, torch.float32))
    tensors = tile16.repack(packed)
    again = tile16.restore(tensors, packed.shape, packed.attrs)
    assert all(again.tensors[key].equal(packed.tensors[key]) for key in packed.tensors)
    rows = torch.tensor([0, n // 2, n - 1])
    u, *_ = tile16.rows(tensors["codes"], tensors["scale"], tensors["minimum"], rows, n=n, bits=bits, group=32)
    assert u[:, :70].equal(bipolar.unpack_codes(packed.tensors["planes"])[rows][:, :70])
