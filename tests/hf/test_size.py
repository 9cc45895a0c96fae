"""Weight bytes per decode step, against counts by hand."""

from __future__ import annotations

import torch

from effllm.hf.size import weight_size
from effllm.runtime.formats import bipolar
from effllm.runtime.packed import PackedLinear
from effllm.runtime.weights import BipolarWeight
from tests.hf.tiny import tiny_llama

LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
BODY = 2 * LAYER + 64


def test_tied_embedding_is_read_once_as_the_head():
    size = weight_size(tiny_llama())
    assert size.count == BODY + 64 * 64
    assert size.read == size.held == 2 * size.count
    assert size.bits_per_weight == 16


def test_untied_embedding_is_read_by_one_row():
    size = weight_size(tiny_llama(torch.float32, tied=False))
    assert size.read == 4 * (BODY + 64 * 64 + 64)
    assert size.held == 4 * (BODY + 2 * 64 * 64)


def test_packed_weight_counts_its_stored_bytes():
    codes = torch.randint(0, 16, (48, 64), dtype=torch.uint8)
    packed = bipolar.make(codes, torch.ones(48, 2, dtype=torch.float16), None, k=64, bits=4, group=32, grid="symmetric")
    linear = PackedLinear(BipolarWeight(packed, kernel="reference"), torch.zeros(48))
    size = weight_size(torch.nn.Sequential(linear))
    assert size.read == 48 * 64 // 2 + 48 * 2 * 2 + 48 * 4
    assert size.count == 48 * 64 + 48
