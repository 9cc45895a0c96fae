"""The op "sparsify" and the low-rank branch beside coded weights: values, limits, dynamic rows, NaN, schema."""

from __future__ import annotations

import pytest
import torch

from effllm.lowering import sparsify
from effllm.lowering.op import OPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "limit", "sparse"), [(1, 4, True), (4, 4, True), (5, 4, False), (5, -1, True), (1, 0, False)])
def test_small_entries_are_zero_in_calls_of_few_rows(dtype: torch.dtype, rows: int, limit: int, sparse: bool) -> None:
    x = torch.randn(1, rows, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.rand(33, generator=torch.Generator().manual_seed(1))
    want = torch.where(x.float().abs() <= t, 0.0, x.float()).to(dtype) if sparse else x
    got = torch.ops.effllm.sparsify(x, t, limit)
    assert torch.equal(got, want) and got.dtype == dtype and got.data_ptr() != x.data_ptr()
    assert bool((got == 0).any()) == sparse


def test_nan_and_infinite_thresholds() -> None:
    x = torch.tensor([[float("nan"), 2.0, 3.0, 0.0]])
    got = OPS["sparsify"].reference(x, torch.tensor([9.0, torch.inf, -1.0, -1.0]), 4)[0]
    assert got[0].isnan() and got[1:].tolist() == [0.0, 3.0, 0.0]


def test_dynamic_rows_decide_inside_one_graph() -> None:
    graphs: list[int] = []

    def count(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(1)
        return gm.forward

    t = torch.tensor([0.5])
    call = torch.compile(lambda x: torch.ops.effllm.sparsify(x, t, 4), backend=count, dynamic=True, fullgraph=True)
    for rows in (2, 3, 4, 5, 9):
        x = torch.linspace(-1, 1, rows * 7).view(rows, 7)
        assert torch.equal(call(x), torch.where(x.abs() <= 0.5, 0.0, x) if rows <= 4 else x)
    assert len(graphs) == 1


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.effllm.sparsify.default, (torch.randn(2, 8), torch.rand(8), 4))


def test_what_is_dropped_goes_through_the_low_rank() -> None:
    g = torch.Generator().manual_seed(2)
    x, u, v, t = torch.randn(3, 16, generator=g), torch.randn(8, 2, generator=g), torch.randn(2, 16, generator=g), torch.full((16,), 0.7)
    rest = torch.where(x.abs() <= 0.7, x, 0.0)
    assert torch.allclose(sparsify.low_rank_rest(x, t, u, v, 4), rest @ v.t() @ u.t(), atol=1e-5)
    assert not sparsify.low_rank_rest(x, t, u, v, 2).any()  # a dense call
