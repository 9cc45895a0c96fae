"""Reading fewer bits of weights whose fp16 scales are near the top of their range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effllm.runtime.checkpoint import load, save
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.packed import packed_weights
from tests.runtime.checkpoints import skeleton, small


def weight(top: float, grid: str) -> Packed:
    """A (40, 40) 8-bit weight whose largest scale is `top`; with negative minima where the grid has them."""
    codes = (torch.arange(40 * 64).view(40, 64) * 37 % 256).to(torch.uint8)
    scale = torch.full((40, 2), 0.5, dtype=torch.float16)
    scale[7, 1] = top
    low = (-2 * scale.float()).to(torch.float16) if grid == "affine" else None
    return bipolar.make(codes, scale, low, k=40, bits=8, group=32, grid=grid)


def formula(source: Packed, bits: int) -> torch.Tensor:
    """The truncated value in fp64 from the codes: the dropped planes count as their mean."""
    u = bipolar.unpack_codes(source.tensors["planes"]).double().view(40, 2, 32)
    drop = 8 - bits
    kept = (u / 2**drop).floor() * 2**drop + (2**drop - 1) / 2
    s = source.tensors["scale"].double()[..., None]
    if "minimum" in source.tensors:
        w = 2 * s * kept + source.tensors["minimum"].double()[..., None]
    else:
        w = 2 * s * (kept - bipolar.zero_point(8, source.attrs["grid"]))
    return w.reshape(40, 64)[:, :40]


@pytest.mark.parametrize("grid", bipolar.GRIDS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_scales_that_overflow_become_fp32(grid: str, bits: int) -> None:
    source = weight(600.0, grid)  # 600 * 2^7 = 76,800 is beyond fp16, 600 * 2^6 is not
    got = bipolar.truncate(source, bits)
    bipolar.validate(got)
    assert {t.dtype for k, t in got.tensors.items() if k != "planes"} == {torch.float32 if bits == 1 else torch.float16}
    exact = bits == 1 or grid != "affine"  # a minimum in fp16 rounds
    torch.testing.assert_close(bipolar.unpack(got).double(), formula(source, bits), rtol=1e-6 if exact else 1e-3, atol=0.0 if exact else 40.0)


def test_meta_weights_truncate() -> None:
    source = weight(600.0, "affine").to("meta")
    assert bipolar.truncate(source, 1).tensors["scale"].dtype == torch.float16


def test_a_checkpoint_reads_and_saves_such_a_weight(tmp_path: Path) -> None:
    save(small(proj=weight(30000.0, "affine")), tmp_path / "a")
    model = load(tmp_path / "a", bits={"proj": 3}, model=skeleton())
    found = packed_weights(model)["proj.weight"].packed()
    assert torch.isfinite(bipolar.unpack(found)).all() and found.tensors["minimum"].dtype == torch.float32
    torch.testing.assert_close(bipolar.unpack(found).double(), formula(weight(30000.0, "affine"), 3), rtol=1e-5, atol=0.5)
    save(model, tmp_path / "b")
    again = packed_weights(load(tmp_path / "b", model=skeleton()))["proj.weight"].packed()
    assert all(torch.equal(t, found.tensors[k]) for k, t in again.tensors.items())
    with torch.no_grad():
        x = torch.ones(1, 40)
        torch.testing.assert_close(model.proj(x), torch.nn.functional.linear(x, model.proj.weight.dense(), model.proj.bias), rtol=1e-4, atol=100.0)
