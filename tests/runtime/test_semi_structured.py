"""torch's semi-structured tensors: our plain-torch conversion against torch's own, both ways."""

from __future__ import annotations

import pytest
import torch
from torch.sparse import _semi_structured_conversions as theirs

from effllm.errors import WeightError
from effllm.runtime import semi_structured
from effllm.runtime.formats import nm
from tests.runtime.formats.test_nm import random_mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 128), (96, 64), (128, 256)])
def test_same_as_torch(n: int, k: int, dtype: torch.dtype) -> None:
    w = torch.where(random_mask(n, k, 2, 4), torch.randn(n, k), 0).to(dtype)
    values, meta = theirs.sparse_semi_structured_from_dense_cutlass(w)
    packed = nm.from_dense(w, None, 2, 4)
    ours = semi_structured.to_cutlass(packed)
    assert torch.equal(ours[0], values) and torch.equal(ours[1], meta)
    assert torch.equal(nm.unpack(semi_structured.from_cutlass(values, meta), dtype), w)
    assert torch.equal(theirs.sparse_semi_structured_to_dense_cutlass(*ours), w)


def test_short_groups_go_and_come_back() -> None:
    keep = random_mask(32, 64, 2, 4) & (torch.rand(32, 64) < 0.5)
    w = torch.where(keep, torch.randn(32, 64), 0).half()
    back = semi_structured.from_cutlass(*semi_structured.to_cutlass(nm.from_dense(w, None, 2, 4)))
    assert torch.equal(nm.unpack(back, torch.float16), w)
    assert torch.equal(theirs.sparse_semi_structured_to_dense_cutlass(*semi_structured.to_cutlass(back)), w)


def test_codes_of_eight_bits() -> None:
    w = torch.where(random_mask(32, 128, 2, 4), torch.randint(1, 128, (32, 128)), 0).to(torch.int8)
    values, meta = theirs.sparse_semi_structured_from_dense_cutlass(w)
    columns = semi_structured.unpack_meta(meta, torch.int8)
    assert torch.equal(w.gather(1, columns), values)
    assert torch.equal(semi_structured.pack_meta(columns, torch.int8), meta)


def test_refusals() -> None:
    good = nm.from_dense(torch.randn(32, 64).half(), random_mask(32, 64, 2, 4), 2, 4)
    with pytest.raises(WeightError, match="CUDA"):
        semi_structured.to_torch(good)
    for packed in (
        nm.from_dense(torch.randn(32, 64).half(), random_mask(32, 64, 4, 8), 4, 8),
        nm.from_dense(torch.randn(20, 64).half(), random_mask(20, 64, 2, 4), 2, 4),
        nm.from_dense(torch.randn(32, 64), random_mask(32, 64, 2, 4), 2, 4),
    ):
        with pytest.raises(WeightError, match="E-WGT-SEMI"):
            semi_structured.to_cutlass(packed)
