"""Monarch ops: every provider against fp64 on odd shapes, mutations that must show, gradients, compiled graphs, and the tuner's view of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.autotune import inputs, measure
from effllm.errors import KernelError, TuneError
from effllm.lowering import monarch_linear as ops
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider
from effllm.runtime.formats import bipolar, dense, monarch
from effllm.runtime.formats.base import Packed

providers.load("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A Monarch linear; bits 0 has factors of dtype `values`."""

    m: int
    n: int
    k: int
    i: int
    o: int
    t: int
    dtype: torch.dtype
    values: torch.dtype = torch.bfloat16
    strided: bool = False
    bias: bool = False
    bits: int = 0
    group: int = 16
    grid: str = "symmetric"

    def __str__(self) -> str:
        kind = f"w{self.bits}g{self.group}{self.grid[0]}" if self.bits else str(self.values)[6:]
        words = [word for word in ("strided", "bias") if getattr(self, word)]
        return "-".join([f"{self.m}x{self.n}x{self.k}", f"{self.o}x{self.i}r{self.t}", str(self.dtype)[6:], kind, *words])

    @property
    def op(self) -> str:
        return "monarch_bipolar_linear" if self.bits else "monarch_linear"


def cases() -> list[Case]:
    shapes = [(48, 64, 4, 4, 3), (30, 17, 4, 3, 2), (33, 100, 2, 8, 4), (5, 9, 2, 4, 1), (7, 5, 5, 7, 1)]
    shapes += [(200, 136, 4, 4, 17), (64, 96, 1, 1, 9), (96, 130, 4, 2, 33)]
    found = []
    for a, m in enumerate((1, 2, 3, 5, 16, 17, 129)):
        for b, (n, k, i, o, t) in enumerate(shapes):
            c = a + b
            found.append(Case(m, n, k, i, o, t, DTYPES[c % 3], DTYPES[(c + b) % 3], strided=b % 2 == a % 2, bias=c % 3 == 0))
            if b % 2 == a % 2:
                group, grid = (16, 32, 64, 0)[c % 4], bipolar.GRIDS[c % 3]
                found.append(Case(m, n, k, i, o, t, DTYPES[c % 3], strided=c % 4 == 0, bias=c % 2 == 0, bits=1 + c % 8, group=group, grid=grid))
    found.append(Case(0, 48, 64, 4, 4, 3, torch.bfloat16))
    found.append(Case(0, 48, 64, 4, 4, 3, torch.bfloat16, bits=4))
    found.append(Case(40, 48, 64, 4, 4, 3, torch.float32, torch.float32))
    return found


def pack(case: Case) -> Packed:
    """Random factors whose blocks differ by powers of two, so that a swapped block cannot hide."""
    g = torch.Generator().manual_seed(0)
    s, p = monarch.sizes(case.n, case.k, case.i, case.o)
    made = []
    for rows, columns in ((case.i * case.o * case.t, p), (case.o * s, case.i * case.t)):
        if not case.bits:
            w = torch.randn(rows, columns, generator=g) * 2.0 ** torch.randint(-4, 5, (rows, 1), generator=g)
            made.append(dense.make(w.to(case.values)))
            continue
        groups = bipolar.groups(columns, case.group)
        codes = torch.randint(0, 2**case.bits, (rows, bipolar.padded(columns, case.group)), generator=g, dtype=torch.uint8)
        scale = (torch.rand(rows, groups, generator=g) + 0.5) * 2.0 ** torch.randint(-4, 5, (rows, groups), generator=g) / 2**case.bits
        low = torch.randn(rows, groups, generator=g).half() if case.grid == "affine" else None
        made.append(bipolar.make(codes, scale.half(), low, k=columns, bits=case.bits, group=case.group, grid=case.grid))
    return monarch.make(*made, shape=(case.n, case.k), blocks_in=case.i, blocks_out=case.o, strided=case.strided)


def data(case: Case) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(case.m, case.k, generator=g) * 2.0 ** torch.randint(-3, 4, (case.m, 1), generator=g)).to(case.dtype)
    return x, torch.randn(case.n, generator=g).to(case.dtype) if case.bias else None


def problem(case: Case) -> Problem:
    return ops.problem_of(pack(case), case.dtype, "cpu", case.m)


def run(provider: Provider, case: Case, x: Tensor, bias: Tensor | None, config: Any = None, packed: Packed | None = None) -> Tensor:
    whole = packed or pack(case)
    more = {} if provider.tuning is None else {"problem": problem(case), "config": config}
    y: Tensor = provider.call(x, *ops.operands(whole, provider.layout), bias, *ops.scalars(whole), **more)
    return y


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))


def exact(case: Case, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fp64 product with the format's dense weight; and plain torch's two stages in the case's dtype."""
    whole = pack(case)
    true = torch.nn.functional.linear(x.double(), monarch.unpack(whole, torch.float64), None if bias is None else bias.double())
    first = OPS[case.op].providers["reference"]
    plain: Tensor = first.call(x, *ops.operands(whole, first.layout), bias, *ops.scalars(whole))
    return true, plain


HERE = [(op, p) for op in ("monarch_linear", "monarch_bipolar_linear") for p in OPS[op].providers.values() if p.device in ("any", "cpu")]
IDS = [f"{op}-{p.name}" for op, p in HERE]


def supported(op: str, provider: Provider, case: Case) -> None:
    if case.op != op:
        pytest.skip("a case of the other op")
    verdict = provider.supports(problem(case))
    if not verdict:
        pytest.skip(verdict.reason)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_value(case: Case) -> None:
    x, bias = data(case)
    true, plain = exact(case, x, bias)
    for op, provider in HERE:
        if op != case.op or not provider.supports(problem(case)):
            continue
        own = [] if provider.tuning is None or not case.m else list(provider.tuning.configs(problem(case)))
        for config in [None, *own]:
            with measure.poisoned():
                y = run(provider, case, x, bias, config)
            assert y.shape == true.shape and y.dtype == case.dtype
            if case.m:
                assert distance(y, true) <= 2 * distance(plain, true) + OPS[op].tolerance[case.dtype], (provider.name, config)


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
@pytest.mark.parametrize("part", ["w1", "w2"])
def test_swapped_blocks_show(op: str, provider: Provider, part: str) -> None:
    case = Case(3, 48, 64, 4, 4, 4, torch.float32, torch.float32, bits=4 if "bipolar" in op else 0)
    supported(op, provider, case)
    x, _ = data(case)
    whole = pack(case)
    rows = whole.attrs[part]["shape"][0] // 4
    for key in [name for name in whole.tensors if name.startswith(f"{part}.")]:
        t = whole.tensors[key].clone()
        axis = 1 if key.endswith("planes") else 0
        a, b = t.narrow(axis, 0, rows).clone(), t.narrow(axis, rows, rows).clone()
        t.narrow(axis, 0, rows).copy_(b)
        t.narrow(axis, rows, rows).copy_(a)
        whole.tensors[key] = t
    true, _ = exact(case, x, None)
    assert distance(run(provider, case, x, None, packed=whole), true) > 0.05


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
@pytest.mark.parametrize("m", [6, 60])
def test_strided_and_batched_activations(op: str, provider: Provider, m: int) -> None:
    case = Case(m, 24, 96, 4, 3, 4, torch.float32, torch.float32, bits=8 if "bipolar" in op else 0)
    supported(op, provider, case)
    base = torch.randn(2, 96, m // 2).transpose(1, 2)  # (2, m / 2, 96), not contiguous
    y = run(provider, case, base, None)
    again = run(provider, case, base.contiguous().view(m, 96), None)
    assert y.shape == (2, m // 2, 24) and distance(y.reshape(m, 24), again.double()) < 1e-6


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_nan_in_one_token_stays_there(op: str, provider: Provider) -> None:
    case = Case(3, 16, 64, 4, 4, 2, torch.float32, torch.float32, bits=4 if "bipolar" in op else 0)
    supported(op, provider, case)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = run(provider, case, x, None)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [0, 4])
def test_threads_change_nothing(threads: int, bits: int) -> None:
    """Large enough for several tasks a block; equal bits whatever the number of threads."""
    case = Case(2, 512, 768, 4, 4, 96, torch.bfloat16, bits=bits, group=32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, _ = data(case)
        path = "codes" if bits else "gemv"
        for op, provider in HERE:
            if op == case.op and provider.tuning is not None and provider.supports(problem(case)):
                a = run(provider, case, x, None, {"path": path, "threads": threads})
                b = run(provider, case, x, None, {"path": path, "threads": 0})
                assert torch.equal(a, b), provider.name
    finally:
        torch.set_num_threads(before)


NATIVE = [(op, p) for op, p in HERE if p.name != "reference" and p.supports(problem(Case(2, 48, 64, 4, 4, 3, torch.float32, bits=4 if "bip" in op else 0)))]


@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
def test_opcheck(op: str, provider: Provider) -> None:
    case = Case(2, 48, 64, 4, 4, 3, torch.float32, bits=4 if "bipolar" in op else 0)
    whole = pack(case)
    run(provider, case, data(case)[0], None)  # loads the library
    own = getattr(getattr(torch.ops, f"effllm_{provider.name.replace('-', '_')}"), op).default
    args = (data(case)[0], *ops.operands(whole, provider.layout), None, *ops.scalars(whole))
    torch.library.opcheck(own, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def graph_op(case: Case, kernel: str) -> Any:
    """The graph op with a stored weight, as a function of x, w1, w2 and bias."""

    def call(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.effllm.monarch_linear(x, w1, w2, bias, case.n, case.i, case.o, case.strided, kernel)
        return y

    return call


def kernel_of(case: Case) -> str:
    return providers.select(problem(case))[0].name


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(12, 8, 2, 2, 2), (7, 9, 2, 3, 1)], ids=str)
def test_gradients_against_finite_differences(shape: tuple[int, ...], strided: bool) -> None:
    n, k, i, o, t = shape
    case = Case(3, n, k, i, o, t, torch.float64, torch.float32, strided)
    whole = pack(case)
    args = [torch.randn(3, k, dtype=torch.float64), *(w.double() / 8 for w in ops.operands(whole, "dense")), torch.randn(n, dtype=torch.float64)]
    ready = [a.clone().requires_grad_() for a in args]
    assert torch.autograd.gradcheck(graph_op(case, "reference"), ready)


@pytest.mark.parametrize("wants", [(True, False, False, False), (False, True, False, False), (False, False, True, True)], ids=str)
def test_compiled_gradients_equal_eager_ones(wants: tuple[bool, ...]) -> None:
    """Under torch.compile the op decomposes before autograd, so the graph has a backward; against fp64 finite differences in one direction."""
    case = Case(4, 30, 34, 4, 3, 2, torch.float32, torch.float32, True)
    call = graph_op(case, kernel_of(case))
    args = [data(case)[0], *(w / 8 for w in ops.operands(pack(case), "dense")), torch.randn(30)]
    torch.compiler.reset()
    compiled = torch.compile(call, backend="inductor", dynamic=False)
    grads = []
    for f in (call, compiled):
        ready = [a.clone().requires_grad_(w) for a, w in zip(args, wants, strict=True)]
        (f(*ready).square().sum()).backward()
        grads.append([r.grad for r in ready if r.requires_grad])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    step = [torch.randn_like(a).double() if w else torch.zeros_like(a).double() for a, w in zip(args, wants, strict=True)]
    loss = [ops.reference(*(a.double() + e * d for a, d in zip(args, step, strict=True)), case.n, case.i, case.o, True).square().sum() for e in (1e-5, -1e-5)]
    slope = sum(float((g.double() * d).sum()) for g, d in zip(grads[1], [d for d, w in zip(step, wants, strict=True) if w], strict=True))
    assert slope == pytest.approx(float(loss[0] - loss[1]) / 2e-5, rel=1e-3)


def test_inference_runs_the_kernel_and_training_does_not() -> None:
    case = Case(2, 48, 64, 4, 4, 3, torch.float32, torch.float32)
    if kernel_of(case) == "reference":
        pytest.skip("no compiled kernels here")
    call = graph_op(case, kernel_of(case))
    x, (w1, w2) = data(case)[0], ops.operands(pack(case), "dense")
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, example: Any) -> Any:
        from torch._functorch.aot_autograd import aot_module_simplified

        def inner(g: torch.fx.GraphModule, _: Any) -> Any:
            seen.extend(str(node.target) for node in g.graph.nodes if node.op == "call_function")
            return g.forward

        return aot_module_simplified(gm, example, fw_compiler=inner)

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(call, backend=backend)(x, w1, w2, None)
    assert any("effllm_cpu" in s for s in seen)
    seen.clear()
    torch.compiler.reset()
    torch.compile(call, backend=backend)(x, w1.clone().requires_grad_(), w2, None)
    assert seen and not any("effllm_cpu" in s for s in seen)


def test_compiled_with_dynamic_rows() -> None:
    case = Case(3, 48, 64, 4, 4, 3, torch.float32, torch.float32)
    call = graph_op(case, kernel_of(case))
    w1, w2 = ops.operands(pack(case), "dense")
    torch.compiler.reset()
    compiled = torch.compile(call, backend="inductor", dynamic=True)
    with torch.no_grad():
        for m in (2, 5, 60):
            x = torch.randn(m, 64)
            assert torch.allclose(compiled(x, w1, w2, None), ops.reference(x, w1, w2, None, 48, 4, 4, False), rtol=1e-4, atol=1e-3)


TUNED = [Case(m, 96, 130, 4, 2, 16, torch.bfloat16, strided=m == 2, bits=bits, grid="affine" if m > 2 else "symmetric") for m in (1, 2, 40) for bits in (0, 4)]


@pytest.mark.parametrize("case", TUNED, ids=str)
def test_the_tuner_can_make_run_and_verify_it(case: Case) -> None:
    for op, provider in HERE:
        if op != case.op or provider.tuning is None or not provider.supports(problem(case)):
            continue
        made = inputs.make(problem(case), provider.layout, copies=2)
        read, _ = OPS[op].problem(*made.args[1], provider.name)  # type: ignore[misc]
        assert read == problem(case)
        for config in provider.tuning.configs(problem(case)):
            assert provider.tuning.legal(problem(case), config)
            assert provider.tuning.predict(problem(case), config).seconds > 0
            outcome = measure.verify(provider, problem(case), config, made)
            assert outcome.status == "ok", (provider.name, config, outcome.reason)


def test_a_wrong_kernel_is_noticed_by_the_tuner() -> None:
    case = TUNED[0]
    wrong = dataclasses.replace(OPS["monarch_linear"].providers["reference"], call=lambda x, w1, w2, *tail, **_: ops.reference(x, w1, w2.flip(0), *tail))
    assert measure.verify(wrong, problem(case), None).status == "wrong"


def test_problems_without_sizes_are_refused() -> None:
    with pytest.raises(TuneError, match="E-TUN-SHAPE"):
        inputs.make(dataclasses.replace(problem(TUNED[0]), detail=()), "dense")
    with pytest.raises(TuneError, match="E-TUN-SHAPE"):
        inputs.make(dataclasses.replace(problem(TUNED[1]), bits=9), "planes")


ILLEGAL = [{}, {"path": "gemv"}, {"path": "gemv", "threads": 99}, {"path": "matmul", "threads": 1}, {"path": "codes", "threads": 0}]


@pytest.mark.parametrize("config", ILLEGAL, ids=str)
def test_illegal_configurations(config: dict[str, Any]) -> None:
    for p in OPS["monarch_linear"].providers.values():
        if p.tuning is not None and p.device == "cpu":
            verdict = p.tuning.legal(problem(TUNED[0]), config)
            assert not verdict and verdict.reason


def test_predictions_grow_with_the_work() -> None:
    from effllm.kernels.cpu.monarch import MonarchTuning  # the model needs no such processor

    tuning = MonarchTuning("avx512")
    times = [tuning.predict(dataclasses.replace(problem(TUNED[0]), n=n, k=4096).at(1), {"path": "gemv", "threads": 1}).seconds for n in (512, 4096, 16384)]
    assert times == sorted(times) and times[2] > 2 * times[0]
    large = Problem("monarch_linear", 4096, 4096, 0, 0, False, dtype=torch.bfloat16, detail=ops.detail(4, 4, 256, False, "bfloat16"))
    assert tuning.first(large.at(1))["path"] == "gemv" and tuning.first(large.at(512))["path"] == "matmul"


@pytest.mark.parametrize("change", ["w1", "w2", "n", "bias", "dtype"])
def test_operands_that_do_not_fit_are_refused(change: str) -> None:
    case = Case(2, 48, 64, 4, 4, 3, torch.float32, torch.float32)
    x, (w1, w2), n, bias = data(case)[0], ops.operands(pack(case), "dense"), 48, None
    if change == "w1":
        w1 = w1[:-1]
    elif change == "w2":
        w2 = w2[:, :-1]
    elif change == "n":
        n = 60
    elif change == "bias":
        bias = torch.zeros(5)
    else:
        w1 = w1.double()
    for op, p in NATIVE:
        if op == "monarch_linear":
            with pytest.raises(RuntimeError, match="effllm"):
                p.call(x, w1, w2, bias, n, 4, 4, False, problem=problem(case), config={"path": "gemv", "threads": 0})


def test_factors_of_unknown_type_are_refused_with_a_reason() -> None:
    odd = dataclasses.replace(problem(TUNED[0]), detail=ops.detail(4, 2, 16, False, "float64"))
    chosen, why = providers.select(odd)
    assert chosen.name == "reference" and ("float64" in why or "no compiled" in why)
    with pytest.raises(KernelError, match="E-KRN-NAME"):
        torch.ops.effllm.monarch_linear(torch.randn(2, 4), torch.randn(4, 4), torch.randn(4, 4), None, 4, 1, 1, False, "cpu-avx9")
