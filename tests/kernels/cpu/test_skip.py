"""4-bit codes that skip inputs: the largest sums of pairs of channels, channels cut in parts, threads."""

from __future__ import annotations

import pytest
import torch

from effllm.lowering import providers
from effllm.lowering.op import OPS, Provider
from effllm.lowering.sparse_linear import problem
from effllm.runtime.layouts import input_major

providers.load("cpu")
OP = "sparse_bipolar_linear"


def _kernels() -> list[Provider]:
    p = problem(OP, 160, 4096, m=1, bits=4, group=32, density=1.0)
    return [k for k in OPS[OP].providers.values() if k.name.startswith("cpu-") and k.supports(p).ok]


def _call(kernel: Provider, x: torch.Tensor, codes: torch.Tensor, group: int, cut: float, threads: int) -> torch.Tensor:
    k, n = codes.shape
    p = problem(OP, n, k, m=1, bits=4, group=group, density=1.0)
    padded = input_major.units(n, 4) * 128
    scale = torch.full((-(-k // group) if group else 1, padded), 0.5)
    args = (x, torch.tensor([cut]), input_major.pack(codes, 4), scale, None, None, n, 4, group, 7.5, 4)
    return kernel.call(*args, problem=p, config={"threads": threads, "block": 2048})


@pytest.mark.parametrize("kernel", _kernels(), ids=lambda k: k.name)
@pytest.mark.parametrize("group", [16, 32, 128, 0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_codes_and_digits_do_not_overflow(kernel: Provider, group: int, sign: float) -> None:
    """All codes 15 and all activations the largest but for their low digit, which is -128: the sums are exact."""
    k, n = 256, 160
    top = 127 * 256.0
    x = torch.full((1, k), sign * (top - 128.0))  # digits 127 and -128, or 126 and 128 of the other sign
    x[:, ::16] = sign * top  # each segment's step is 1
    y = _call(kernel, x, torch.full((k, n), 15, dtype=torch.uint8), group, -1.0, 1)
    true = (x.double() * 7.5).sum()  # 2 * 0.5 * (15 - 7.5)
    torch.testing.assert_close(y.double(), true.expand(1, n), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kernel", _kernels(), ids=lambda k: k.name)
@pytest.mark.parametrize("density", [1.0, 0.4, 0.01, 0.0])
def test_channels_cut_in_parts(kernel: Provider, density: float) -> None:
    """Many channels are summed in parts: all of them count once, and the threads do not change a bit."""
    k, n = 4096 + 48, 300
    x = torch.randn(1, k).bfloat16()
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    cut = float(x.float().abs().flatten().kthvalue(max(1, int(k * (1 - density)))).values) if 0 < density < 1 else -1.0 if density else 1e9
    outs = [_call(kernel, x, codes, 32, cut, threads) for threads in (1, min(2, torch.get_num_threads()), 0)]
    kept = torch.where(x.double().abs() > cut, x.double(), 0.0)
    true = kept @ (codes.double() - 7.5)
    assert float((outs[0].double() - true).norm()) <= 0.005 * float(true.norm()) + 1e-12
    assert all(torch.equal(outs[0], y) for y in outs)
