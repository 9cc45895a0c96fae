"""Linears of packed and low-rank weights have the gradient that finite differences give, in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effllm.lowering import providers
from effllm.lowering.op import OPS
from effllm.runtime.formats import bipolar
from tests.lowering.cases import Case, arguments, make_packed

providers.load("cpu")
F64 = torch.float64


def differences(f: Callable[[], Tensor], t: Tensor, step: float = 1e-3) -> Tensor:
    """Central differences of the scalar f() with respect to t, changed in place. f is linear or bilinear in t: no truncation error."""
    found = torch.zeros_like(t)
    with torch.no_grad():
        for i in range(t.numel()):
            flat = t.view(-1)
            before = flat[i].item()
            flat[i] = before + step
            up = f().item()
            flat[i] = before - step
            found.view(-1)[i] = (up - f().item()) / (2 * step)
            flat[i] = before
    return found


def check(op: Callable[..., Tensor], leaves: list[Tensor], compiled: str, exact: Callable[..., Tensor]) -> None:
    """Gradients of `op(*leaves)` (fp32) against differences of `exact` in fp64."""
    torch.manual_seed(1)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    run = torch.compile(op, backend=compiled) if compiled else op
    y = run(*leaves)
    assert y.requires_grad
    weights = torch.randn(y.shape, dtype=F64)
    (y.double() * weights).sum().backward()
    wide = [t.detach().double() for t in leaves]
    for leaf, t in zip(leaves, wide, strict=True):
        want = differences(lambda: (exact(*wide) * weights).sum(), t)
        assert leaf.grad is not None
        assert float((leaf.grad.double() - want).norm() / want.norm()) < 2e-5  # fp32 sums of tens of terms, twice


COMPILED = pytest.mark.parametrize("compiled", ["", "aot_eager"], ids=["eager", "aot_eager"])  # Inductor's own compiler costs seconds a test


@pytest.mark.parametrize(("kernel", "compiled"), [("reference", ""), ("cpu-portable", ""), ("cpu-portable", "inductor")])
def test_bipolar_linear(kernel: str, compiled: str) -> None:
    case = Case(4, 32, "affine", 3, 16, 40, torch.float32)
    codes, scale, minimum, zero = arguments(make_packed(case), OPS["bipolar_linear"].providers[kernel].layout)
    w = bipolar.unpack(make_packed(case), F64)
    x, bias = torch.randn(3, 40), torch.randn(16)

    def op(x: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.bipolar_linear(x, codes, scale, minimum, bias, 16, 4, 32, zero, kernel)
        return y

    check(op, [x, bias], compiled, lambda x, bias: torch.nn.functional.linear(x, w, bias))


def test_merged_bipolar_linear() -> None:
    case = Case(3, 32, "symmetric", 2, 16, 64, torch.float32)
    packs = [make_packed(case, seed) for seed in (0, 1)]
    parts = [arguments(p, "tile16") for p in packs]
    w = torch.cat([bipolar.unpack(p, F64) for p in packs])

    def op(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.bipolar_linear_many(x, [p[0] for p in parts], [p[1] for p in parts], [], 3, 32, parts[0][3], "cpu-portable")
        return y

    check(op, [torch.randn(2, 64)], "", lambda x: x @ w.T)


@pytest.mark.parametrize(("kernel", "compiled"), [("reference", ""), ("cpu-portable", ""), ("cpu-portable", "inductor")])
def test_lowrank_linear(kernel: str, compiled: str) -> None:
    channels = torch.tensor([3, 7])

    def op(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.lowrank_linear(x, a, b, channels, None, bias, kernel)
        return y

    leaves = [torch.randn(3, 20), torch.randn(12, 7), torch.randn(5, 20), torch.randn(12)]
    check(op, leaves, compiled, lambda x, a, b, bias: torch.cat([x @ b.T, x[:, channels]], 1) @ a.T + bias)


@COMPILED
def test_siblings(compiled: str) -> None:
    def op(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.lowrank_linear_many(x, [a, c], [b, d], [], "cpu-portable")
        return y

    leaves = [torch.randn(3, 20), torch.randn(12, 5), torch.randn(5, 20), torch.randn(8, 3), torch.randn(3, 20)]
    check(op, leaves, compiled, lambda x, a, b, c, d: torch.cat([x @ b.T @ a.T, x @ d.T @ c.T], 1))


@COMPILED
@pytest.mark.parametrize("index", [torch.uint16, torch.int32])
def test_sparse(index: torch.dtype, compiled: str) -> None:
    columns = torch.tensor([1, 4, 0, 9, 3]).to(index)
    rows = torch.tensor([0, 2, 2, 3, 5], dtype=torch.int32)
    row = torch.tensor([0, 0, 2, 3, 3])

    def op(x: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.sparse_lowrank_linear(x, a, b, values, columns, rows, None, "cpu-portable")
        return y

    def exact(x: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        return x @ b.T @ a.T + x @ torch.zeros(4, 10, dtype=F64).index_put((row, columns.long()), values).T

    check(op, [torch.randn(2, 10), torch.randn(4, 2), torch.randn(2, 10), torch.randn(5)], compiled, exact)


@COMPILED
def test_bipolar_factors(compiled: str) -> None:
    a, b = make_packed(Case(8, 32, "symmetric", 1, 16, 24, torch.float32)), make_packed(Case(4, 32, "affine", 1, 24, 40, torch.float32), 1)
    wa, wb = bipolar.unpack(a, F64), bipolar.unpack(b, F64)
    first, second = arguments(b, "tile16"), arguments(a, "tile16")

    def op(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.lowrank_bipolar_linear(x, *second[:3], *first[:3], None, None, 16, 24, 8, 32, second[3], 4, 32, first[3], "cpu-portable")
        return y

    check(op, [torch.randn(2, 40)], compiled, lambda x: x @ wb.T @ wa.T)


def test_kernels_run_where_no_gradient_is_asked_for() -> None:
    x, a, b = torch.randn(1, 64).requires_grad_(), torch.randn(32, 8), torch.randn(8, 64)
    with torch.no_grad():
        y = torch.ops.effllm.lowrank_linear(x, a, b, None, None, None, "cpu-portable")
    assert not y.requires_grad
    own = torch.ops.effllm_cpu_portable.lowrank(x.detach(), [a], [b], None, [], None, None, None, None)
    assert torch.equal(y, own)
