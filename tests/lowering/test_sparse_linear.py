"""Every provider of the ops of activation sparsity against fp64; masks, NaN, limits, neutral thresholds; layouts read back exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import effllm.lowering.sparse_linear as ops
from effllm.autotune import inputs, skip_gain
from effllm.errors import TuneError
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar

providers.load("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DENSE = ("sparse_linear", "sparse_up_linear", "rsparse_linear")
CODED = ("sparse_bipolar_linear", "sparse_up_bipolar_linear")
HERE = [(op, p) for op in (*DENSE, *CODED) for p in OPS[op].providers.values() if p.device in ("any", "cpu")]
IDS = [f"{op}-{p.name}" for op, p in HERE]


def problem(op: str, n: int, k: int, **more: Any) -> Problem:
    """A problem of any of the ops, 4 bits in groups of 32 where it takes codes."""
    if op in CODED:
        more = {"bits": 4, "group": 32} | more
        more.pop("values", None)
    return ops.problem(op, n, k, **{"m": 1, "rank": 5 if op == "rsparse_linear" else 0} | more)


def cases() -> list[Problem]:
    """Shapes, rows, densities, limits and dtypes, each at least once for each op."""
    shapes = [(77, 53), (1, 1), (64, 64), (700, 33), (33, 700), (1300, 40), (130, 270)]
    rows, densities = (1, 2, 3, 4, 5, 17), (0.5, 0.0, 1.0, 0.3)
    kinds = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, BF16), (BF16, F16)]
    found = []
    for op in DENSE:
        for i in range(36):
            dtype, values = kinds[i % 7]
            (n, k), m, limit = shapes[(i + i // 7) % 7], rows[i % 6], (4, -1, 2)[i // 6 % 3]
            found.append(problem(op, n, k, m=m, density=densities[i % 4 if i % 12 else 1], limit=limit, dtype=dtype, values=values))
    coded = [(4, 32, False), (4, 32, True), (8, 64, True), (3, 128, False), (2, 16, True), (4, 0, False), (8, 0, True), (1, 64, False), (6, 32, False)]
    for op in CODED:
        for i in range(45):
            bits, group, affine = coded[i % 9]
            (n, k), m, limit = shapes[(i + i // 7) % 7], rows[i // 2 % 6], (4, -1, 2)[i // 6 % 3]
            scale_dtype = F32 if i % 4 == 3 else F16
            about: dict[str, Any] = {"bits": bits, "group": group, "affine": affine, "scale_dtype": scale_dtype}
            found.append(problem(op, n, k, m=m, density=densities[i % 4], limit=limit, dtype=(BF16, F32, F16)[i % 3], **about))
    return found


def name(p: Problem) -> str:
    about = dict(p.detail)
    stored = f"w{p.bits}g{p.group}{'a' if p.affine else ''}" if p.bits else about["values"]
    return f"{p.op}-{stored}-{p.m}x{p.n}x{p.k}-d{about['density']}-l{about['limit']}-{str(p.dtype)[6:]}"


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))


def call(provider: Provider, p: Problem, args: tuple[Any, ...]) -> Tensor:
    y: Tensor = provider.call(*args) if provider.tuning is None else provider.call(*args, problem=p, config=None)
    return y


def operands(provider: Provider, p: Problem) -> list[Any]:
    return list(inputs.make(p, provider.layout, 1).args[0])


@pytest.mark.parametrize("p", cases(), ids=name)
def test_value(p: Problem) -> None:
    """At most twice as far from fp64 as plain torch in the same dtype, plus the op's floor; every provider and configuration."""
    ran = 0
    for provider in OPS[p.op].providers.values():
        if provider.device == "cuda" or not provider.supports(p):
            continue
        made = inputs.make(p, provider.layout, 1)
        expected = made.expected()[0]
        for config in [None, *(provider.tuning.configs(p) if provider.tuning else ())]:
            more = {} if provider.tuning is None else {"problem": p, "config": config}
            y = provider.call(*made.args[0], **more)
            assert y.shape == (p.m, p.n) and y.dtype == p.dtype
            assert distance(y, expected.true) <= 2 * distance(expected.plain, expected.true) + OPS[p.op].tolerance[p.dtype], (provider.name, config)
            ran += 1
    assert ran >= 1


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_no_rows_and_leading_dimensions(op: str, provider: Provider) -> None:
    p = problem(op, 40, 96, m=6, dtype=F32, values=F32, limit=-1)
    if not provider.supports(p):
        pytest.skip(provider.supports(p).reason)
    args = operands(provider, p)
    flat = call(provider, p, tuple(args))
    first = 2 if "up" in op else 1
    wide = [a.view(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1) for a in args[:first]]
    assert distance(call(provider, p, (*wide, *args[first:])).reshape(6, 40), flat.double()) < 1e-6
    none = [a[:0] for a in args[:first]]
    assert call(provider, p, (*none, *args[first:])).shape == (0, 40)


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
@pytest.mark.parametrize("m", [1, 3, 6])
def test_nan_is_never_skipped(op: str, provider: Provider, m: int) -> None:
    """NaN in one row, below any threshold, makes that row NaN and no other; a NaN threshold skips nothing."""
    p = problem(op, 40, 96, m=m, dtype=F32, values=F32, limit=-1)
    if not provider.supports(p):
        pytest.skip(provider.supports(p).reason)
    args = operands(provider, p)
    up = "up" in op
    where = args[1] if up else args[0]
    where[0, 5] = float("nan")
    at = 2 if up else 1
    args[at] = torch.full_like(args[at], 1e30)
    y = call(provider, p, tuple(args))
    if up:  # one gate is one output
        assert y[0, 5].isnan() and not y[0, :5].isnan().any() and not y[0, 6:].isnan().any()
    else:
        assert y[0].isnan().all()
    assert not y[1:].isnan().any()
    where[0, 5] = 0.25
    args[at] = torch.full_like(args[at], float("nan"))
    everything = call(provider, p, tuple(args))
    args[at] = torch.full_like(args[at], -1.0)
    assert torch.equal(everything, call(provider, p, tuple(args)))


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_skipped_channels_do_not_count(op: str, provider: Provider) -> None:
    """An infinite threshold leaves the bias (nothing, where outputs are skipped; the low-rank branch of R-Sparse)."""
    p = problem(op, 40, 96, m=2, dtype=F32, values=F32)
    if not provider.supports(p):
        pytest.skip(provider.supports(p).reason)
    args = operands(provider, p)
    at, bias = (2, 4 if op == "sparse_up_linear" else 6) if "up" in op else (1, {"sparse_linear": 3, "rsparse_linear": 6}.get(op, 5))
    args[at] = torch.full_like(args[at], float("inf"))
    args[bias] = torch.randn(40)
    y = call(provider, p, tuple(args))
    if "up" in op:
        assert torch.equal(y, torch.zeros(2, 40))
    elif op == "rsparse_linear":
        x, u, v = args[0].double(), args[4].double(), args[5].double()
        assert distance(y, x @ v.t() @ u.t() + args[bias].double()) < 1e-5
    else:
        assert torch.equal(y, args[bias].expand(2, 40))


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_limit_decides_by_rows(op: str, provider: Provider) -> None:
    """At the limit thresholds apply, above it they do not, below zero they always do; the answer per row does not depend on the others."""
    for m, limit, skips in ((2, 2, True), (3, 2, False), (9, 4, False), (9, -1, True), (1, 0, False), (9, 16, True)):
        p = problem(op, 40, 96, m=m, dtype=F32, values=F32, limit=limit)
        if not provider.supports(p):
            pytest.skip(provider.supports(p).reason)
        args = operands(provider, dataclasses.replace(p, detail=tuple((k, 0.4 if k == "density" else v) for k, v in p.detail)))
        y = call(provider, p, tuple(args))
        lone = call(provider, p, (*(a[:1] for a in args[: 2 if "up" in op else 1]), *args[2 if "up" in op else 1 : -1], -1 if skips else 0))
        assert distance(y[:1], lone.double()) < 1e-5
        dense = call(provider, p, (*args[:-1], 0))
        assert (distance(y, dense.double()) > 0.05) == skips


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_rows_of_a_call_do_not_see_each_other(op: str, provider: Provider, m: int) -> None:
    """Rows with masks of their own, one of them reading nothing and one reading everything, are what they are alone."""
    p = problem(op, 130, 96, m=m, dtype=F32, values=F32, limit=8, density=0.5)
    if not provider.supports(p):
        pytest.skip(provider.supports(p).reason)
    args = operands(provider, p)
    head = 2 if "up" in op else 1
    where = args[head - 1]
    where[0] *= 1e-30
    where[m - 1] *= 1e4 if m > 1 else 1.0
    y = call(provider, p, tuple(args))
    for i in range(m):
        alone = call(provider, p, (*(a[i : i + 1] for a in args[:head]), *args[head:]))
        assert distance(y[i : i + 1], alone.double()) < 2e-6, i


@pytest.mark.parametrize(("op", "provider"), [x for x in HERE if x[1].tuning], ids=[i for i, x in zip(IDS, HERE, strict=True) if x[1].tuning])
def test_repeats_to_the_bit(op: str, provider: Provider) -> None:
    """The same bits on every call, threads and blocks included."""
    p = problem(op, 4200, 64, m=2, density=0.5)
    if not provider.supports(p):
        pytest.skip(provider.supports(p).reason)
    args = tuple(operands(provider, p))
    assert provider.tuning is not None
    first = call(provider, p, args)
    for config in provider.tuning.configs(p):
        assert torch.equal(provider.call(*args, problem=p, config=config), first), config


@pytest.mark.parametrize("op", [*DENSE, *CODED])
def test_composite_reads_its_problem_and_has_a_gradient(op: str) -> None:
    p = problem(op, 40, 96, m=3, dtype=F32, values=F32, density=0.5)
    graph_op = getattr(torch.ops.effllm, op)
    kernel, _ = providers.select(p)
    args = operands(kernel, p)
    assert OPS[op].problem(*args, kernel.name) == (p, kernel.name)  # type: ignore[misc]
    expected = inputs.make(p, kernel.layout, 1).expected()[0]
    assert distance(graph_op(*args, kernel.name), expected.true) <= 2 * distance(expected.plain, expected.true) + 2e-6
    x = args[0].requires_grad_()
    graph_op(x, *args[1:], kernel.name).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    if op == "sparse_linear":  # skipped inputs have no gradient, the others that of the dense linear
        read = ~(args[0].detach().abs() <= args[1])
        assert torch.allclose(x.grad, read * args[2].sum(1), atol=1e-5)


@pytest.mark.parametrize("op", [*DENSE, *CODED])
def test_dynamic_rows_decide_without_a_guard(op: str) -> None:
    """One compiled graph of the reference serves rows on both sides of the limit."""
    p = problem(op, 24, 32, m=8, dtype=F32, values=F32, density=0.4)
    args = operands(OPS[op].providers["reference"], p)
    head = 2 if "up" in op else 1
    graph_op = getattr(torch.ops.effllm, op)
    traces = 0

    def count(gm: Any, _: Any) -> Any:
        nonlocal traces
        traces += 1
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: graph_op(*a, *args[head:], "reference"), backend=count, dynamic=True)
    for m in (8, 3, 2, 7):
        few = [a[:m].clone() for a in args[:head]]  # a view would be guarded by its base
        assert torch.allclose(compiled(*few), graph_op(*few, *args[head:], "reference"), atol=1e-5)
    assert traces == 1


@pytest.mark.parametrize("op", [*DENSE, *CODED])
def test_opcheck(op: str) -> None:
    p = problem(op, 48, 64, m=2, dtype=F32, values=F32)
    provider, _ = providers.select(p)
    if provider.name == "reference":
        pytest.skip("no compiled kernel here")
    from effllm.kernels.cpu.skip import OPERATIONS

    args = operands(provider, p)
    own = getattr(getattr(torch.ops, f"effllm_{provider.name.replace('-', '_')}"), OPERATIONS[op][0])
    call(provider, p, tuple(args))
    torch.library.opcheck(own.default, tuple(args), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("op", ["sparse_linear", "rsparse_linear", "sparse_up_linear"])
def test_wrong_shapes_are_refused(op: str) -> None:
    p = problem(op, 40, 96, m=1, dtype=F32, values=F32)
    provider, _ = providers.select(p)
    if provider.name == "reference":
        pytest.skip("no compiled kernel here")
    args = operands(provider, p)
    at = 2 if "up" in op else 1
    for wrong in (torch.zeros(3), args[at].double()):
        with pytest.raises(RuntimeError, match="thresholds"):
            call(provider, p, (*args[:at], wrong, *args[at + 1 :]))
    with pytest.raises(RuntimeError, match=r"fit|inputs|one per input"):
        call(provider, p, (torch.randn(1, 95), *args[1:at], torch.zeros(1), *args[at + 1 :]))


@pytest.mark.parametrize("layout", ["input_major", "row_major"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_layouts_read_back_exactly(layout: str, bits: int) -> None:
    found = layouts.get(layout)
    for group, grid in ((0, "affine"), (16, "symmetric"), (32, "integer")):
        n, k = 77, 53
        codes = torch.randint(0, 2**bits, (n, bipolar.padded(k, group)), dtype=torch.uint8)
        codes[:, k:] = 0
        scale = torch.rand(n, bipolar.groups(k, group)).half()
        packed = bipolar.make(codes, scale, torch.randn_like(scale) if grid == "affine" else None, k=k, bits=bits, group=group, grid=grid)
        tensors = found.repack(packed)
        back = found.restore(tensors, packed.shape, packed.attrs)
        assert all(torch.equal(back.tensors[key], packed.tensors[key]) for key in packed.tensors)
        shapes = found.fake_shapes(packed.shape, bits, group)
        assert all(tuple(t.shape) == shapes[key][0] for key, t in tensors.items())
        size = {"n": n} if layout == "input_major" else {"k": k}
        zero = bipolar.zero_point(bits, grid)
        dense = found.weight(tensors["codes"], tensors["scale"], tensors.get("minimum"), bits=bits, group=group, zero=zero, **size)
        assert torch.equal(dense.t() if layout == "input_major" else dense, bipolar.unpack(packed))


def test_swapped_channels_show() -> None:
    """The tolerance of `test_value` sees two channels of codes, or two rows of scales, that changed places."""
    p = problem("sparse_bipolar_linear", 64, 64, m=1, dtype=F32, density=1.0)
    for provider in OPS[p.op].providers.values():
        if provider.device == "cuda" or not provider.supports(p):
            continue
        true = inputs.make(p, provider.layout, 1).expected()[0].true
        for which, a, b in ((2, 3, 4), (3, 0, 1)):
            args = operands(provider, p)
            args[which] = args[which].clone()
            args[which][[a, b]] = args[which][[b, a]]
            assert distance(call(provider, p, tuple(args)), true) > 1e-2


def test_gain_falls_with_density_and_rows() -> None:
    for op in (*DENSE, *CODED):
        gains = [skip_gain.gain(problem(op, 8192, 2048, density=d)).speedup for d in (0.25, 0.5, 0.75, 1.0)]
        assert gains == sorted(gains, reverse=True)
        assert op in CODED or gains[0] > 1
        wide = [skip_gain.gain(problem(op, 8192, 2048, density=0.5, m=m)).sparse for m in (1, 2, 4)]
        assert wide == sorted(wide)
        limits = [skip_gain.limit(problem(op, 8192, 2048, density=d)) for d in (0.1, 0.5, 1.0)]
        assert limits == sorted(limits, reverse=True) and limits[0] <= 4
        assert op in CODED or limits[0] > 0
    assert skip_gain.limit(problem("sparse_linear", 8192, 2048, density=0.5), least=100.0) == 0
    assert not skip_gain.gain(problem("sparse_linear", 64, 64, dtype=torch.float64)).kernel


@pytest.mark.parametrize("op", DENSE)
def test_operands_that_cannot_be(op: str) -> None:
    with pytest.raises(TuneError):
        inputs.make(problem(op, 8, 8, density=1.5), "dense", 1)
    with pytest.raises(TuneError):
        inputs.make(problem(op, 8, 8, rank=0 if op == "rsparse_linear" else 3), "dense", 1)
