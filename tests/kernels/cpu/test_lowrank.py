"""The low-rank kernels of every instruction set of this machine against fp64: dense and bipolar factors, channels, sparse parts, siblings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from effllm.autotune import inputs
from effllm.errors import TuneError
from effllm.lowering import lowrank_bipolar_linear as packed
from effllm.lowering import lowrank_linear as dense
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider

providers.load("cpu")
ROWS = (1, 2, 3, 5, 8, 16, 17)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SIZES = ((48, 96, 16), (17, 33, 7), (113, 257, 31), (80, 64, 40))  # N, K, rank
OPERATORS = ("lowrank_linear", "lowrank_linear_many", "sparse_lowrank_linear", "lowrank_bipolar_linear", "lowrank_bipolar_linear_many")
HERE = [(op, p) for op in OPERATORS for p in OPS[op].providers.values() if p.device in ("any", "cpu")]
IDS = [f"{op}-{p.name}" for op, p in HERE]


def problems(op: str) -> list[Problem]:
    """Every number of rows, dtype, size and grid at least once."""
    found = []
    for i, m in enumerate(ROWS):
        (n, k, rank), dtype = SIZES[i % 4], DTYPES[i % 3]
        if op.endswith("many"):
            n, rank = 112, 64
        if "bipolar" in op:
            bits, group = 1 + i, (0, 16, 32, 64, 128)[i % 5]
            grids: dict[str, Any] = {"bits": bits, "group": group, "affine": i % 2 == 0, "b_bits": 8 - i, "b_group": 32, "b_affine": i % 3 == 0}
            found.append(packed.problem_of(op, n, k, rank, m=m, dtype=dtype, **grids))
            continue
        channels = 5 * (i % 3) if op == "lowrank_linear" else 0
        nonzeros = n * k // 20 + i if op == "sparse_lowrank_linear" else 0
        for factor in (dtype, torch.bfloat16):
            found.append(dense.problem_of(op, n, k, rank, factor, m=m, dtype=dtype, channels=channels, nonzeros=nonzeros))
        if op != "sparse_lowrank_linear" and rank < n:
            found.append(dense.problem_of(op, n, k, rank, dtype, m=m, dtype=dtype, pivoted=True))
    return found


def call(provider: Provider, problem: Problem, args: tuple[Any, ...], config: Any = None) -> torch.Tensor:
    more = {} if provider.tuning is None else {"problem": problem, "config": config}
    y: torch.Tensor = provider.call(*args, **more)
    return y


def distance(y: torch.Tensor, true: torch.Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


def supported(provider: Provider, problem: Problem) -> None:
    verdict = provider.supports(problem)
    if not verdict:
        pytest.skip(verdict.reason)


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_value(op: str, provider: Provider) -> None:
    for problem in problems(op):
        supported(provider, problem)
        made = inputs.make(problem, provider.layout, 1)
        (expected,) = made.expected()
        limit = 2 * distance(expected.plain, expected.true) + OPS[op].tolerance[problem.dtype]
        for config in [None] if provider.tuning is None else [None, *provider.tuning.configs(problem)]:
            y = call(provider, problem, made.args[0], config)
            assert y.dtype == problem.dtype and y.shape == (problem.m, problem.n)
            assert distance(expected.pick(y), expected.true) <= limit, (problem, config)


def small(op: str, provider: Provider, **change: Any) -> tuple[Problem, list[Any]]:
    problem = dataclasses.replace(next(p for p in problems(op) if p.m == 2), dtype=torch.float32, **change)
    supported(provider, problem)
    return problem, list(inputs.make(problem, provider.layout, 1).args[0])


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_strided_batched_and_empty_activations(op: str, provider: Provider) -> None:
    problem, args = small(op, provider, m=6)
    base = torch.randn(2, problem.k, 3).transpose(1, 2)
    y = call(provider, problem, (base, *args[1:]))
    again = call(provider, problem, (base.contiguous().view(6, problem.k), *args[1:]))
    assert y.shape == (2, 3, problem.n) and torch.allclose(y.reshape(6, -1), again, rtol=0, atol=1e-5 * float(again.abs().max()))
    assert call(provider, problem, (base[:0], *args[1:])).shape == (0, 3, problem.n)


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_nan_in_one_token_stays_there(op: str, provider: Provider) -> None:
    problem, args = small(op, provider, m=3)
    args[0][1, problem.k - 1] = float("nan")
    y = call(provider, problem, tuple(args))
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize(("op", "provider"), [h for h in HERE if "many" not in h[0]], ids=[i for i in IDS if "many" not in i])
@pytest.mark.parametrize("path", ["one by one", "products"])
def test_bias_is_added_once(op: str, provider: Provider, path: str) -> None:
    problem, args = small(op, provider)
    config = {"path": "products", "threads": 0} if path == "products" and "bipolar" not in op else None
    at = {"lowrank_linear": 5, "sparse_lowrank_linear": 6, "lowrank_bipolar_linear": 8}[op]
    without = call(provider, problem, tuple(args), config)
    bias = args[at] = torch.randn(problem.n).bfloat16()
    y = call(provider, problem, tuple(args), config)
    assert torch.allclose(y, without + bias.float(), rtol=1e-5, atol=1e-5 * float(y.abs().max()))


NATIVE = [(op, p) for op, p in HERE if p.name != "reference"]


@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
def test_memory_past_the_operands_is_not_read(op: str, provider: Provider) -> None:
    """Operands inside larger buffers of NaN, or of the largest integers, give what they give alone."""
    problem, args = small(op, provider)
    alone = call(provider, problem, tuple(args))

    def guarded(value: Any) -> Any:
        if isinstance(value, list):
            return [guarded(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        fill = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
        room = torch.full((value.numel() + 256,), fill, dtype=value.dtype)
        inside = room[128 : 128 + value.numel()].view(value.shape)
        return inside.copy_(value)

    assert torch.equal(call(provider, problem, tuple(guarded(a) for a in args)), alone)


@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
def test_threads_do_not_change_the_result(op: str, provider: Provider, rows: int) -> None:
    problem, args = small(op, provider, m=rows)  # 17 rows: activations are prepared by more than one thread too
    path = "registers" if "bipolar" in op else "fused"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = [call(provider, problem, tuple(args), {"path": path, "threads": 1})]
        torch.set_num_threads(2)
        found += [call(provider, problem, tuple(args), {"path": path, "threads": t}) for t in (1, 2, 2, 2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], y) for y in found)


CHECKED = [h for h in NATIVE if h[0] in ("lowrank_linear", "lowrank_bipolar_linear_many")]


@pytest.mark.parametrize(("op", "provider"), CHECKED, ids=[f"{o}-{p.name}" for o, p in CHECKED])
def test_opcheck(op: str, provider: Provider) -> None:
    _, args = small(op, provider)
    space = getattr(torch.ops, f"effllm_{provider.name.replace('-', '_')}")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if op == "lowrank_linear":
        x, a, b, channels, pivots, bias = args
        operands = (x, [a], [b], channels, [] if pivots is None else [pivots], bias, None, None, None)
        torch.library.opcheck(space.lowrank.default, operands, test_utils=tests)
    else:
        torch.library.opcheck(space.lowrank_bipolar.default, (*args[:7], None, 0, 0, *args[7:]), test_utils=tests)


@pytest.mark.parametrize("provider", [p for o, p in NATIVE if o == "lowrank_linear"], ids=lambda p: p.name)
def test_factors_that_do_not_fit_are_refused(provider: Provider) -> None:
    problem, (x, a, b, *rest) = small("lowrank_linear", provider)
    for wrong in ((x, a, b[:-1]), (x, a[:, :-1], b), (x[:, :-1], a, b)):
        with pytest.raises(RuntimeError, match="do not fit"):
            call(provider, problem, (*wrong, *rest))
    with pytest.raises(RuntimeError, match="channel"):
        call(provider, problem, (x, torch.cat([a, a[:, :1]], 1), b, torch.tensor([problem.k]), None, None))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(TuneError, match="E-TUN-SHAPE"):
        inputs.make(dense.problem_of("lowrank_linear", 32, 32, 0, torch.bfloat16, m=1), "dense", 1)
    with pytest.raises(TuneError, match="E-TUN-SHAPE"):
        inputs.make(packed.problem_of("lowrank_bipolar_linear", 32, 32, 8, bits=9, group=32, affine=False, m=1), "tile16", 1)


@pytest.mark.parametrize("op", OPERATORS)
def test_the_graph_op_names_its_problem(op: str) -> None:
    provider = OPS[op].providers["cpu-portable"]
    for problem in problems(op):
        args = inputs.make(problem, provider.layout, 1).args[0]
        read = OPS[op].problem
        assert read is not None
        assert read(*args, "cpu-portable#12345678") == (problem, "cpu-portable")


@pytest.mark.parametrize("op", OPERATORS)
def test_model_counts_the_stored_bytes_and_prefers_few_calls_for_few_rows(op: str) -> None:
    about: dict[str, Any] = {"bits": 4, "group": 32, "affine": False} if "bipolar" in op else {"factor": torch.bfloat16}
    of = packed.problem_of if "bipolar" in op else dense.problem_of
    problem = of(op, 1024, 1024, 256, m=1, **about)
    tuning = OPS[op].providers["cpu-avx512"].tuning
    assert tuning is not None
    nbytes = inputs.make(problem, OPS[op].providers["cpu-avx512"].layout, 1).nbytes
    vectors = 2 * 2 * 1024 + (2 * 2 * 256 if "bipolar" in op else 0)  # x and y, and the intermediate of two linears
    assert tuning.predict(problem, tuning.first(problem)).nbytes == pytest.approx(nbytes + vectors, rel=0.01)
    assert tuning.first(problem)["path"] in ("fused", "registers")
    seconds = [tuning.predict(problem.at(m), tuning.first(problem.at(m))).seconds for m in (1, 4, 16, 64, 512)]
    assert seconds == sorted(seconds)
