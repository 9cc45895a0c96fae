"""Every provider of the N:M ops against fp64; layouts read back exactly; training through the packed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effllm.lowering.nm_linear as ops
from effllm.autotune import nm_inputs
from effllm.errors import KernelError, TuneError
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider
from effllm.runtime import formats, layouts
from effllm.runtime.formats import nm
from effllm.runtime.formats.base import Packed

providers.load("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FAMILY = ("nm_linear", "nm_bipolar_linear", "armor_linear")
HERE = [(op, p) for op in FAMILY for p in OPS[op].providers.values() if p.device in ("any", "cpu")]


def cases() -> list[Problem]:
    """Patterns, values, activations and odd shapes, each at least once for each op."""
    found = []
    values = [(2, 4, BF16), (4, 8, BF16), (6, 8, F16), (2, 4, F32), (1, 4, BF16), (3, 16, F16), (8, 16, BF16), (4, 4, BF16)]
    shapes = [(1, 1, 64), (2, 17, 96), (3, 48, 208), (16, 33, 336), (17, 70, 48), (129, 16, 80)]
    for i, (keep, of, stored) in enumerate(values):
        for j, dtype in enumerate((BF16, F32, F16)):
            m, n, k = shapes[(i + 2 * j) % 6]
            found.append(ops.problem("nm_linear", n, k, keep, of, m=m, dtype=dtype, values=stored))
    found.append(ops.problem("nm_linear", 5, 90, 2, 4, m=2, dtype=BF16, values=BF16))  # padded to whole groups
    found.append(ops.problem("nm_linear", 100, 64, 2, 4, m=0, dtype=BF16, values=BF16))
    coded = [(2, 4, 8, 32, False), (2, 4, 4, 128, False), (2, 4, 8, 16, True), (2, 4, 4, 0, True)]
    coded += [(6, 8, 3, 64, False), (4, 8, 8, 32, True), (1, 4, 5, 16, False)]
    for i, (keep, of, bits, group, affine) in enumerate(coded):
        for j, dtype in enumerate((BF16, F32, F16)):
            m, n, k = shapes[1 + (i + 2 * j) % 5]
            scale_dtype = F32 if i == 2 else F16
            found.append(ops.problem("nm_bipolar_linear", n, k, keep, of, m=m, dtype=dtype, bits=bits, group=group, affine=affine, scale_dtype=scale_dtype))
    # groups that are whole words of columns, where AVX-512 multiplies codes as they are; and 6:8, whose groups are not
    words = [(4, 8, 8, 0, False), (4, 8, 8, 32, True), (4, 8, 4, 128, False), (8, 16, 3, 64, True), (1, 4, 6, 16, False)]
    words += [(6, 8, 8, 0, True), (6, 8, 8, 128, False)]
    for i, (keep, of, bits, group, affine) in enumerate(words):
        m, n, k = [(1, 9, 1088), (2, 6, 336), (5, 5, 400), (1, 4, 208)][i % 4]
        for dtype in (BF16, F32):
            found.append(ops.problem("nm_bipolar_linear", n, k, keep, of, m=m, dtype=dtype, bits=bits, group=group, affine=affine))
    for i, block in enumerate((16, 32, 64)):
        for j, dtype in enumerate((BF16, F32)):
            found.append(ops.problem("armor_linear", 64, 192, 2, 4, m=(1, 5, 40)[(i + j) % 3], dtype=dtype, values=BF16, block=block))
        found.append(ops.problem("armor_linear", 128, 64, 6, 8, m=3, dtype=BF16, values=BF16, block=block))
        found.append(ops.problem("armor_linear", 64, 128, 2, 4, m=2, dtype=F16, bits=8, group=32, block=block))
    return found


def name(p: Problem) -> str:
    about = dict(p.detail)
    kept = f"w{p.bits}g{p.group}" if p.bits else about["values"]
    return f"{p.op}-{about['keep']}:{about['of']}-{kept}-b{about['block']}-{p.m}x{p.n}x{p.k}-{str(p.dtype)[6:]}"


def relative(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))


@pytest.mark.parametrize("problem", cases(), ids=name)
def test_value(problem: Problem) -> None:
    """At most twice as far from fp64 as plain torch in the same dtype, plus the op's floor; every provider and configuration."""
    packed = nm_inputs.weight(problem)
    g = torch.Generator().manual_seed(7)
    assert problem.m is not None
    x = (torch.randn(problem.m, problem.k, generator=g) * 2.0 ** torch.randint(-3, 4, (problem.m, 1), generator=g)).to(problem.dtype)
    bias = torch.randn(problem.n, generator=g) if problem.n % 2 else None
    true = torch.nn.functional.linear(x.double(), formats.get(packed.format).unpack(packed, torch.float64), None if bias is None else bias.double())
    plain = OPS[problem.op].reference(*nm_inputs.arguments(packed, problem.op, "nm_plain", x, bias))
    ran = 0
    for provider in OPS[problem.op].providers.values():
        if provider.device != "cpu" or not provider.supports(problem):
            continue
        args = nm_inputs.arguments(packed, problem.op, provider.layout, x, bias)
        assert provider.tuning is not None
        for config in [None, *(provider.tuning.configs(problem) if problem.m else ())]:
            y = provider.call(*args, problem=problem, config=config)
            assert y.shape == true.shape and y.dtype == problem.dtype
            if problem.m:
                assert relative(y, true) <= 2 * relative(plain, true) + OPS[problem.op].tolerance[problem.dtype], (provider.name, config)
        ran += 1
    assert ran >= 2, "portable and one more"


COMMON = [
    ops.problem("nm_linear", 40, 100, 2, 4, values=BF16), ops.problem("nm_bipolar_linear", 33, 72, 2, 4, bits=8, group=16),
    ops.problem("nm_bipolar_linear", 18, 320, 2, 4, bits=4, group=128, affine=True), ops.problem("armor_linear", 64, 96, 2, 4, values=BF16, block=32),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["nm_plain", "nm_rows", "nm_tiles", "nm_words"])
@pytest.mark.parametrize("problem", COMMON, ids=name)
def test_layouts_read_back(problem: Problem, layout: str) -> None:
    """The plain-torch decoder of each layout gives exactly the stored numbers."""
    packed = nm_inputs.weight(problem)
    core, wrappers = layouts.nm_plain.core_of(packed)
    found, t = layouts.get(layout), layouts.get(layout).repack(packed)
    w = ops.core_weight(
        t["values"], t.get("scale"), t.get("minimum"), t["index"], n=problem.n, k=problem.k, keep=2, of=4, bits=problem.bits,
        group=problem.group, zero=(2**problem.bits - 1) / 2, layout=layout,
    )  # fmt: skip
    assert torch.equal(w.float(), nm.unpack(core))
    for key, rows in wrappers.items():
        assert torch.equal(found.wrapper(t[key]), formats.armor.blocks(rows))


def test_tiles_refuse_other_patterns() -> None:
    with pytest.raises(KernelError, match="E-KRN-LAYOUT"):
        layouts.get("nm_tiles").repack(nm_inputs.weight(ops.problem("nm_linear", 16, 32, 4, 8, values=BF16)))
    tiles = OPS["nm_linear"].providers["cpu-avx512-tiles"]
    other = [(4, 8, BF16, BF16), (2, 4, F32, BF16), (2, 4, BF16, F32)]
    for p in (ops.problem("nm_linear", 16, 32, keep, of, values=values, dtype=dtype) for keep, of, values, dtype in other):
        assert not tiles.supports(p) and tiles.supports(p).reason
    assert not OPS["armor_linear"].providers["cpu-portable"].supports(ops.problem("armor_linear", 24, 24, 2, 4, values=BF16, block=8))


def test_a_problem_without_pattern_is_refused() -> None:
    with pytest.raises(TuneError, match="E-TUN-SHAPE"):
        nm_inputs.weight(Problem("nm_linear", 8, 8, 0, 0, False))


NATIVE = [(op, p) for op, p in HERE if p.device == "cpu"]


@pytest.mark.parametrize(("op", "provider"), NATIVE, ids=[f"{o}-{p.name}" for o, p in NATIVE])
def test_opcheck(op: str, provider: Provider) -> None:
    problem = {"nm_linear": COMMON[0], "nm_bipolar_linear": COMMON[1], "armor_linear": COMMON[3]}[op]
    verdict = provider.supports(problem)
    if not verdict:
        pytest.skip(verdict.reason)
    packed = nm_inputs.weight(problem)
    t = layouts.get(provider.layout).repack(packed)
    build = getattr(torch.ops, f"effllm_{provider.name.removesuffix('-tiles').replace('-', '_')}")
    own = build.nm_tiles if provider.name.endswith("tiles") else build.nm_rows
    assert provider.prepare is not None
    provider.prepare()
    x = torch.randn(2, problem.k).to(BF16)
    zero = (2**problem.bits - 1) / 2
    tensors = (x, t["values"], t.get("scale"), t.get("minimum"), t["index"], t.get("left"), t.get("right"), None)
    args = (*tensors, problem.n, 2, 4, problem.bits, problem.group, zero)
    torch.library.opcheck(own.default, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def graph_op(problem: Problem, packed: Packed, kernel: str, x: Tensor, **change: Tensor) -> Tensor:
    layout = OPS[problem.op].providers[kernel].layout
    args = list(nm_inputs.arguments(packed, problem.op, layout, x))
    if "values" in change:
        args[2 if problem.op == "armor_linear" else 1] = change["values"]
    y: Tensor = getattr(torch.ops.effllm, problem.op)(*args, kernel)
    return y


@pytest.mark.parametrize("problem", COMMON, ids=name)
def test_composite_runs_the_named_kernel(problem: Problem) -> None:
    packed, x = nm_inputs.weight(problem), torch.randn(2, 3, problem.k).transpose(0, 1).to(BF16)
    want = graph_op(problem, packed, "reference", x)
    for kernel, provider in OPS[problem.op].providers.items():
        if provider.device == "cpu" and provider.supports(problem):
            assert relative(graph_op(problem, packed, kernel, x), want.double()) < 2e-2


@pytest.mark.parametrize("kernel", ["reference", "cpu-portable"])
def test_gradients_by_finite_differences(kernel: str) -> None:
    """d loss / d values and / d x, in fp64 through the layout's tensors."""
    layout = OPS["nm_linear"].providers[kernel].layout
    packed = nm_inputs.weight(ops.problem("nm_linear", 5, 16, 2, 4, values=F32))
    t = layouts.get(layout).repack(packed)
    values, x = t["values"].double().requires_grad_(), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, a: torch.ops.effllm.nm_linear(a, v, t["index"], None, 5, 16, 2, 4, kernel), (values, x))


def test_gradients_of_tiles_reach_their_place() -> None:
    """The gradient in the tiled layout is the dense gradient at the kept columns, in the tiles' order."""
    problem = COMMON[0]
    packed = nm_inputs.weight(problem)
    t = layouts.get("nm_tiles").repack(packed)
    values = t["values"].float().requires_grad_()
    x, dy = torch.randn(4, problem.k), torch.randn(4, problem.n)
    torch.ops.effllm.nm_linear(x, values, t["index"], None, problem.n, problem.k, 2, 4, "cpu-avx512-tiles").backward(dy)
    dense = torch.nn.functional.pad(dy.t() @ x, (0, nm.padded(problem.k, 4) - problem.k))
    assert values.grad is not None
    got = layouts.get("nm_tiles").values(values.grad, problem.n, problem.k, 2, 4)
    assert torch.allclose(got, dense.gather(1, nm.columns_of(packed)), atol=1e-4)


def test_gradients_of_armor() -> None:
    packed = nm_inputs.weight(ops.problem("armor_linear", 8, 16, 2, 4, values=F32, block=4))
    args: list[Any] = list(nm_inputs.arguments(packed, "armor_linear", "nm_plain", torch.randn(2, 16)))
    for i in (0, 1, 2, 6):
        args[i] = args[i].double().requires_grad_()
    sizes = (8, 16, 2, 4, 0, 0, 0.0, "reference")

    def run(x: Tensor, a: Tensor, v: Tensor, b: Tensor) -> Tensor:
        y: Tensor = torch.ops.effllm.armor_linear(x, a, v, None, None, args[5], b, None, *sizes)
        return y

    assert torch.autograd.gradcheck(run, (args[0], args[1], args[2], args[6]))


def test_masked_training_under_compile() -> None:
    """Steps through the compiled op lower the loss, change the values, and cannot leave the pattern."""
    problem = ops.problem("nm_linear", 24, 32, 2, 4, values=F32)
    packed = nm_inputs.weight(problem)
    provider = OPS["nm_linear"].providers["cpu-portable"]
    t = layouts.get(provider.layout).repack(packed)
    values = torch.nn.Parameter(t["values"].clone())
    x = torch.randn(64, 32)
    target = x @ torch.randn(32, 24)

    def loss(v: Tensor) -> Tensor:
        return (torch.ops.effllm.nm_linear(x, v, t["index"], None, 24, 32, 2, 4, provider.name) - target).square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    step = torch.optim.Adam([values], lr=0.1)
    first = float(loss(values.detach()))
    for _ in range(60):
        step.zero_grad()
        compiled(values).backward()
        step.step()
    with torch.no_grad():
        assert float(loss(values)) < 0.5 * first
    assert not torch.equal(values, t["values"])


def test_cost_model_prefers_expansion_for_prompts() -> None:
    """Few tokens read the compressed weight, a prompt does not; the bytes are those that are stored."""
    p = ops.problem("nm_linear", 4096, 4096, 2, 4, values=BF16)
    tiles = OPS["nm_linear"].providers["cpu-avx512-tiles"].tuning
    assert tiles is not None
    assert tiles.first(p)["path"] == "registers" and tiles.first(p.at(2048))["path"] == "expand"
    config = {"path": "registers", "threads": 1}
    for made in (
        ops.problem("nm_linear", 64, 4096, 2, 4, values=BF16), ops.problem("nm_bipolar_linear", 64, 4096, 2, 4, bits=8, group=64),
        ops.problem("armor_linear", 64, 1024, 2, 4, values=BF16, block=32), ops.problem("nm_linear", 64, 4096, 6, 8, values=F32),
    ):  # fmt: skip
        tuning = OPS[made.op].providers["cpu-avx512"].tuning
        assert tuning is not None
        activations = 2 * (made.k + made.n)
        assert tuning.predict(made, config).nbytes - activations == pytest.approx(nm_inputs.weight(made).nbytes, rel=1e-6)
