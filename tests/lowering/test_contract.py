"""The generic contract: every provider of every bipolar op against fp64, on every case; opcheck; and mutations that must show.

A provider may be at most twice as far from fp64 as plain torch in the same dtype, plus the op's floor.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import effllm.lowering.bipolar_linear as ops
from effllm.lowering import providers
from effllm.lowering.op import OPS, Config, Problem, Provider
from effllm.runtime.formats import bipolar
from tests.lowering.cases import Case, all_cases, arguments, make_packed

providers.load("cpu")
LINEARS = ("bipolar_linear", "bipolar_linear_a8")
HERE = [(op, p) for op in LINEARS for p in OPS[op].providers.values() if p.device in ("any", "cpu")]
IDS = [f"{op}-{p.name}" for op, p in HERE]


def problem(op: str, case: Case) -> Problem:
    act = "a8" if op.endswith("a8") else "a16"
    return Problem(op, case.n, case.k, case.bits, case.group, case.grid == "affine", act, case.m, case.dtype, "cpu", case.scale_dtype)


def run(op: str, provider: Provider, case: Case, x: Tensor, bias: Tensor | None, config: Config | None = None, **change: Tensor) -> Tensor:
    codes, scale, minimum, zero = arguments(make_packed(case), provider.layout)
    scale = change.get("scale", scale)
    more = {} if provider.tuning is None else {"problem": problem(op, case), "config": config}
    if op == "bipolar_linear":
        return provider.call(x, codes, scale, minimum, bias, case.n, case.bits, case.group, zero, **more)
    xq, xs = ops.quantize_activation(x)
    return provider.call(xq, xs, codes, scale, minimum, bias, case.n, case.bits, case.group, zero, case.dtype, **more)


def exact(op: str, case: Case, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fp64 product, and plain torch's in the case's dtype (fp32 for int8 activations, rounded to the dtype)."""
    w = bipolar.unpack(make_packed(case))
    b = None if bias is None else bias.double()
    if op == "bipolar_linear":
        plain = torch.nn.functional.linear(x, w.to(case.dtype), None if bias is None else bias.to(case.dtype))
        true = torch.nn.functional.linear(x.double(), w.double(), b)
        return true, plain
    xq, xs = ops.quantize_activation(x)
    true = torch.nn.functional.linear(xq.double(), w.double()) * xs.double() + (0 if b is None else b)
    plain = torch.nn.functional.linear(xq.float() * xs, w, None if bias is None else bias.float()).to(case.dtype)
    return true, plain


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))


def data(case: Case) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(case.m, case.k, generator=g) * 2.0 ** torch.randint(-3, 4, (case.m, 1), generator=g)).to(case.dtype)
    return x, torch.randn(case.n, generator=g) if case.bias else None


def supported(op: str, provider: Provider, case: Case) -> None:
    verdict = provider.supports(problem(op, case))
    if not verdict:
        pytest.skip(verdict.reason)


@pytest.mark.parametrize("case", all_cases(), ids=str)
@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_value(op: str, provider: Provider, case: Case) -> None:
    supported(op, provider, case)
    x, bias = data(case)
    true, plain = exact(op, case, x, bias)
    own = [] if provider.tuning is None or not case.m else list(provider.tuning.configs(problem(op, case)))
    for config in [None, *own]:
        y = run(op, provider, case, x, bias, config)
        assert y.shape == true.shape and y.dtype == case.dtype
        if case.m:
            assert distance(y, true) <= 2 * distance(plain, true) + OPS[op].tolerance[case.dtype], config


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_swapped_scales_show(op: str, provider: Provider) -> None:
    case = Case(4, 32, "symmetric", 3, 32, 128, torch.float32)
    supported(op, provider, case)
    x, _ = data(case)
    packed = make_packed(case)
    packed.tensors["scale"] = packed.tensors["scale"].clone()
    packed.tensors["scale"][:, [0, 1]] = packed.tensors["scale"][:, [1, 0]]
    swapped = arguments(packed, provider.layout)[1]
    true, _ = exact(op, case, x, None)
    assert distance(run(op, provider, case, x, None, scale=swapped), true) > 0.05


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_strided_and_batched_activations(op: str, provider: Provider) -> None:
    case = Case(4, 32, "affine", 6, 24, 96, torch.float32)
    supported(op, provider, case)
    base = torch.randn(2, 96, 3).transpose(1, 2)  # (2, 3, 96), not contiguous
    y = run(op, provider, case, base, None)
    again = run(op, provider, case, base.contiguous().view(6, 96), None)
    assert y.shape == (2, 3, 24) and distance(y.reshape(6, 24), again.double()) < 1e-6


@pytest.mark.parametrize(("op", "provider"), HERE, ids=IDS)
def test_nan_in_one_token_stays_there(op: str, provider: Provider) -> None:
    case = Case(4, 32, "symmetric", 3, 16, 64, torch.float32)
    supported(op, provider, case)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = run(op, provider, case, x, None)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


A16 = [p for op, p in HERE if op == "bipolar_linear"]


@pytest.mark.parametrize("provider", A16, ids=[p.name for p in A16])
def test_additive_in_the_input(provider: Provider) -> None:
    """y(a) + y(b) = y(a + b) up to the rounding of 16-bit activations."""
    case = Case(3, 64, "affine", 1, 32, 128, torch.float32)
    supported("bipolar_linear", provider, case)
    a, b = (torch.randint(-50, 51, (1, 128)).float() for _ in range(2))
    ya, yb, yc = (run("bipolar_linear", provider, case, t, None) for t in (a, b, a + b))
    assert torch.allclose(ya + yb, yc, rtol=1e-4, atol=1e-4 * float(yc.abs().max()))


NATIVE = [(op, p) for op, p in HERE if p.name != "reference" and p.supports(problem(op, Case(4, 32, "affine", 1, 32, 64, torch.float32)))]


@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_of_the_largest_codes_and_activations_do_not_overflow(op: str, provider: Provider, bits: int) -> None:
    """All codes at their largest, all activations at an end of their range: pair sums of 16 bits just hold what is added to them."""
    for group, m in ((16, 1), (32, 4), (128, 7), (0, 3)):
        case = Case(bits, group, "affine", m, 16, 256, torch.bfloat16)
        shape = (16, bipolar.groups(256, group))
        full = torch.full((16, 256), 2**bits - 1, dtype=torch.uint8)
        packed = bipolar.make(full, torch.rand(shape).half() + 0.5, torch.randn(shape).half(), k=256, bits=bits, group=group, grid="affine")
        codes, scale, minimum, zero = arguments(packed, provider.layout)
        w = bipolar.unpack(packed).double()
        for value in (-128, 127):
            more = {"problem": problem(op, case), "config": None}
            if op == "bipolar_linear":
                x = torch.full((m, 256), float(value), dtype=case.dtype)
                y = provider.call(x, codes, scale, minimum, None, 16, bits, group, zero, **more)
                true = x.double() @ w.T
            else:
                xq, xs = torch.full((m, 256), value, dtype=torch.int8), torch.ones(m, 1)
                y = provider.call(xq, xs, codes, scale, minimum, None, 16, bits, group, zero, case.dtype, **more)
                true = xq.double() @ w.T
            assert distance(y, true) < 0.01, (group, m, value)


@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_tokens_of_a_batch_are_as_alone(op: str, provider: Provider, bits: int) -> None:
    """Bit for bit, for every number of tokens that has a pass of its own."""
    case = Case(bits, 32, "affine", 7, 48, 160, torch.bfloat16)
    x, _ = data(case)
    whole = run(op, provider, case, x, None)
    for i in range(case.m):
        assert run(op, provider, dataclasses.replace(case, m=1), x[i : i + 1], None).equal(whole[i : i + 1]), i
    for m in (2, 3, 4):
        assert run(op, provider, dataclasses.replace(case, m=m), x[:m], None).equal(whole[:m]), m


@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
def test_opcheck(op: str, provider: Provider) -> None:
    case = Case(4, 32, "affine", 2, 32, 64, torch.float32)
    codes, scale, minimum, zero = arguments(make_packed(case), provider.layout)
    x, _ = data(case)
    own = getattr(torch.ops, f"effllm_{provider.name.replace('-', '_')}")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    tail = (codes, scale, minimum, None, case.n, case.bits, case.group, zero)
    if op == "bipolar_linear":
        torch.library.opcheck(own.linear.default, (x, *tail), test_utils=tests)
    else:
        torch.library.opcheck(own.linear_a8.default, (*ops.quantize_activation(x), *tail, torch.float32), test_utils=tests)


@pytest.mark.parametrize("name", [f"{o}-{p.name}" for o, p in NATIVE])
def test_merged_equals_apart(name: str) -> None:
    op, kernel = name.split("-", 1)
    a8 = op.endswith("a8")
    cases = [dataclasses.replace(Case(4, 32, "affine", 3, 32, 96, torch.float32), n=n) for n in (32, 16, 48)]
    packs = [arguments(make_packed(c, seed), "tile16") for seed, c in enumerate(cases)]
    x = torch.randn(3, 96)
    head = ops.quantize_activation(x) if a8 else (x,)
    tail = (torch.float32,) if a8 else ()
    lists = [[p[i] for p in packs] for i in range(3)]
    one = problem(op, cases[0])
    merged = OPS[f"{op}_many"].providers[kernel].call(*head, *lists, 4, 32, packs[0][3], *tail, problem=one)
    apart = [OPS[op].providers[kernel].call(*head, *p[:3], None, c.n, 4, 32, p[3], *tail, problem=one) for p, c in zip(packs, cases, strict=True)]
    assert torch.equal(merged, torch.cat(apart, -1))


def test_embedding_reads_every_layout() -> None:
    case = Case(5, 32, "affine", 1, 37, 80, torch.float32)
    packed = make_packed(case)
    ids = torch.tensor([[0, 36, 5], [16, 15, 31]])
    want = bipolar.unpack(packed)[ids]
    for kernel in OPS["bipolar_linear"].providers.values():
        if kernel.device in ("any", "cpu"):
            codes, scale, minimum, zero = arguments(packed, kernel.layout)
            got = torch.ops.effllm.bipolar_embedding(ids, codes, scale, minimum, 37, 80, 5, 32, zero, torch.float32, kernel.name)
            assert torch.equal(got, want)


@pytest.mark.parametrize("kernel", [p.name for p in OPS["decode_attention"].providers.values() if p.device in ("any", "cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_decode_attention(kernel: str, dtype: torch.dtype, mask: str) -> None:
    provider = OPS["decode_attention"].providers[kernel]
    verdict = provider.supports(Problem("decode_attention", 6, 40, 0, 0, False, dtype=dtype))
    if not verdict:
        pytest.skip(verdict.reason)
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 6, 3, 40, generator=g).to(dtype)
    k, v = (torch.randn(2, 70, 2, 40, generator=g).to(dtype).transpose(1, 2) for _ in range(2))  # strided, as caches are
    m = None if mask == "none" else torch.rand(2, 1, 3, 70, generator=g) > 0.3 if mask == "bool" else torch.randn(1, 6, 3, 70, generator=g).to(dtype)
    score = q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2) * 0.3
    if m is not None:
        score = score.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else score + m.double()
    true = score.softmax(-1) @ v.double().repeat_interleave(3, 1)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, m, scale=0.3, enable_gqa=True)
    y = provider.call(q, k, v, m, 0.3)
    assert distance(y, true) <= 2 * distance(plain, true) + OPS["decode_attention"].tolerance[dtype] / 10


def test_every_registered_op_is_covered() -> None:
    """Each op is named by the contract tests here, by those of its own file, or by those of the worker that verifies candidates."""
    folder = Path(__file__).parent
    tests = "".join(path.read_text() for part in (folder, folder.parent / "kernels" / "cpu", folder.parent / "autotune") for path in part.glob("*.py"))
    missing = [name for name in OPS if not re.search(rf"\b{name}\b", tests)]
    assert not missing, f"no contract test names {missing}"
