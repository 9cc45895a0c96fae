"""Inputs for every bipolar op: random codes and scales over a wide range, odd shapes, all grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effllm.runtime import layouts
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed


@dataclass(frozen=True)
class Case:
    """One problem of a bipolar linear."""

    bits: int
    group: int
    grid: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias: bool = False
    scale_dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        return f"w{self.bits}-g{self.group}-{self.grid}-{self.m}x{self.n}x{self.k}-{str(self.dtype)[6:]}{'-bias' if self.bias else ''}"


def make_packed(case: Case, seed: int = 0) -> Packed:
    """Random codes; scales over 2^-6 .. 2^6, so that a swapped or shifted scale cannot hide."""
    g = torch.Generator().manual_seed(seed)
    kp, groups = bipolar.padded(case.k, case.group), bipolar.groups(case.k, case.group)
    codes = torch.randint(0, 2**case.bits, (case.n, kp), generator=g, dtype=torch.uint8)
    scale = (torch.rand(case.n, groups, generator=g) + 0.5) * 2.0 ** torch.randint(-6, 7, (case.n, groups), generator=g) / 2**case.bits
    low = torch.randn(case.n, groups, generator=g) if case.grid == "affine" else None
    dtype = case.scale_dtype
    return bipolar.make(codes, scale.to(dtype), None if low is None else low.to(dtype), k=case.k, bits=case.bits, group=case.group, grid=case.grid)


def arguments(packed: Packed, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """codes, scale, minimum and zero point in a layout."""
    t = layouts.get(layout).repack(packed)
    a = packed.attrs
    return t["codes"], t["scale"], t.get("minimum"), bipolar.zero_point(a["bits"], a["grid"], a["source_bits"])


def all_cases() -> list[Case]:
    """Every bit width with every grid, every group, and the odd shapes, without the full product."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    grids = bipolar.GRIDS
    cases = []
    for i, bits in enumerate(range(1, 9)):
        for j, group in enumerate((0, 16, 32, 64, 128)):
            grid, dtype = grids[(i + j) % 3], dtypes[(i + 2 * j) % 3]
            m = (1, 2, 3, 16, 17, 129)[(i + j) % 6]
            n, k = ((1, 33), (17, 100), (48, 576), (33, 256), (64, 40))[(2 * i + j) % 5]
            cases.append(Case(bits, group, grid, m, n, k, dtype, bias=(i + j) % 2 == 0))
            cases.append(Case(bits, group, grids[(i + j + 1) % 3], 1, 40, 192, dtypes[(i + j) % 3]))
    cases.append(Case(4, 32, "affine", 0, 16, 64, torch.float32))
    cases.append(Case(4, 32, "affine", 5, 33, 100, torch.float32, True, torch.float32))
    cases.append(Case(8, 0, "symmetric", 1, 16, 2048, torch.float32))
    return cases
