"""Step programs by hand: the interpreter's instructions against plain torch, levels, and memory that is used again."""

from __future__ import annotations

import pytest
import torch

from effllm.kernels.cpu import ensure
from effllm.kernels.cpu.build import ISAS, missing
from effllm.lowering.bipolar_linear import embedding
from effllm.lowering.glu import ACTIVATIONS, glu
from effllm.lowering.norm import rms_norm
from effllm.lowering.rotate import rotate
from effllm.lowering.step_code import BINARY, UNARY, Builder
from effllm.runtime.step import StepProgram
from tests.lowering.cases import all_cases, arguments, make_packed

AVAILABLE = [isa for isa in ISAS if not missing(isa)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def run(isa, build, tensors, inputs):
    """Outputs of a program: `build(builder, values)` returns the values that are wanted."""
    ensure(isa)
    builder = Builder()
    values = [builder.external(t) for t in inputs]
    code = builder.finish(build(builder, values))
    return StepProgram(code, isa.namespace)(*tensors), code


def near(a, b, dtype):
    return float((a.float() - b.float()).abs().max()) <= EPS[dtype] * max(1.0, float(b.float().abs().max()))


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", UNARY)
def test_unary(isa, dtype, op):
    x = torch.cat([torch.linspace(-30, 30, 157), torch.tensor([0.0, 1e-4, -1e-4])]).to(dtype)[None]
    plain = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
             "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "neg": torch.neg, "cos": torch.cos, "sin": torch.sin}[op]  # fmt: skip

    def build(b, v):
        y = b.produce(x.shape, dtype)
        b.emit("unary", [y, v[0]], (UNARY.index(op),))
        return [y]

    (y,), _ = run(isa, build, [x], [x])
    assert near(y, plain(x.double()), dtype)


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("count", [1, 40])
def test_above_a_threshold(isa, count):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    bound = torch.rand(count, generator=torch.Generator().manual_seed(1))
    x[0, 3], x[1, 5] = float("nan"), -float(bound[5 % count])  # what equals its threshold goes

    def build(b, v):
        y = b.produce(x.shape, x.dtype)
        b.emit("binary", [y, v[0], v[1].like(v[1].meta.expand(x.shape))], (BINARY.index("above"),))
        return [y]

    (y,), _ = run(isa, build, [x, bound], [x, bound])
    assert torch.allclose(y, torch.where(x.abs() <= bound, 0.0, x), equal_nan=True, atol=0, rtol=0)
    assert y[0, 3].isnan() and y[1, 5] == 0


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("count", [5, 576])
def test_rows_of_one_element_are_a_permutation(isa, count):
    x = torch.randn(2, count, generator=torch.Generator().manual_seed(0)).bfloat16()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))

    def build(b, v):
        y = b.produce(x.shape, x.dtype)
        b.emit("write", [y.like(y.meta.unsqueeze(-1)), v[1], v[0].like(v[0].meta.unsqueeze(-1))], (False,))
        return [y]

    (y,), _ = run(isa, build, [x, order], [x, order])
    assert torch.equal(y, torch.empty_like(x).index_copy(-1, order, x))


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("op", ("add", "sub", "mul", "div"))
def test_binary_broadcasts_and_counts(isa, op):
    torch.manual_seed(0)
    x, y, n = torch.randn(3, 1, 5, dtype=torch.float32), torch.rand(1, 4, 5).bfloat16() + 1, torch.tensor([7, 9])
    function = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}[op]

    def build(b, v):
        out, count = b.produce((3, 4, 5), torch.float32), b.produce((2,), torch.int64)
        b.emit("binary", [out, v[0].like(v[0].meta.expand(3, 4, 5)), v[1].like(v[1].meta.expand(3, 4, 5))], (BINARY.index(op),))
        two = b.constant([2], torch.int64, ())
        b.emit("binary", [count, v[2], two.like(two.meta.expand(2))], (BINARY.index("mul"),))
        return [out, count]

    (out, count), _ = run(isa, build, [x, y, n], [x, y, n])
    assert torch.allclose(out, function(x, y.float()), rtol=1e-6)
    assert count.tolist() == [14, 18]


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("late", [False, True])
def test_norm_with_its_sum(isa, dtype, late):
    torch.manual_seed(0)
    x, r, w = torch.randn(2, 72).to(dtype), torch.randn(2, 72).to(dtype), torch.randn(72).to(dtype)
    offset = 1.0 if late else 0.0

    def build(b, v):
        total, out = b.produce(x.shape, dtype), b.produce(x.shape, dtype)
        b.emit("binary", [total, v[0], v[1]], (0,))
        b.emit("norm", [out, None, total, v[2], None, None], (0, b.number(1e-5), b.number(offset), not late), outputs=2)
        return [total, out]

    (total, out), code = run(isa, build, [x, r, w], [x, r, w])
    assert [step.code for step in code.steps] == ["norm"]  # the sum went into it
    assert torch.equal(total, x + r)
    assert near(out, rms_norm(x + r, w, 1e-5, offset, late), dtype)


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
def test_layer_norm(isa):
    torch.manual_seed(0)
    x, w, c = torch.randn(3, 50) + 4, torch.randn(50), torch.randn(50)

    def build(b, v):
        out = b.produce(x.shape, x.dtype)
        b.emit("norm", [out, None, v[0], v[1], v[2], None], (1, b.number(1e-5), b.number(0.0), 0), outputs=2)
        return [out]

    (out,), _ = run(isa, build, [x, w, c], [x, w, c])
    assert torch.allclose(out, torch.nn.functional.layer_norm(x, (50,), w, c), atol=1e-5)


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_into_a_cache(isa, interleaved):
    torch.manual_seed(0)
    x, cos, sin = torch.randn(2, 3, 2, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    cache, at = torch.zeros(2, 3, 7, 8), torch.tensor([5, 2])

    def build(b, v):
        turned = b.produce(x.shape, x.dtype)
        angles = [a.like(a.meta.expand(x.shape)) for a in v[1:3]]
        b.emit("rotate", [turned, v[0], *angles, None], (interleaved, False))
        b.emit("write", [v[3], v[4], turned], (False,))
        return []

    _, code = run(isa, build, [x, cos, sin, cache, at], [x, cos, sin, cache, at])
    assert [step.code for step in code.steps] == ["rotate"] and code.written == [3]
    want = torch.zeros_like(cache).index_copy_(2, at, rotate(x, cos, sin, interleaved))
    assert torch.allclose(cache, want, atol=1e-6)


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("d", [64, 20])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention(isa, d, mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 2, d), torch.randn(2, 2, 37, d), torch.randn(2, 2, 37, d)
    seen = torch.rand(2, 1, 2, 37) > 0.4
    seen[..., 30:] = False
    m = {"none": None, "bool": seen, "float": torch.randn(2, 1, 2, 37).masked_fill(~seen, -torch.inf)}[mask]
    inputs = [q, k, v] + ([] if m is None else [m])

    def build(b, x):
        out = b.produce(q.shape, q.dtype)
        b.emit("attend", [out, *x[:3], x[3] if m is not None else None], (b.number(0.3),))
        return [out]

    (out,), _ = run(isa, build, inputs, inputs)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, m, scale=0.3, enable_gqa=True)
    assert torch.allclose(out, want, atol=2e-5)
    if m is not None:  # what nobody attends to may be anything
        k[:, :, 30:], v[:, :, 30:] = torch.nan, torch.nan
        (again,), _ = run(isa, build, inputs, inputs)
        assert torch.equal(again, out)


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_linear(isa, dtype):
    torch.manual_seed(0)
    x, w, c = torch.randn(3, 70).to(dtype), torch.randn(45, 70).to(dtype), torch.randn(45).to(dtype)

    def build(b, v):
        out = b.produce((3, 45), dtype)
        b.emit("dense", [out, *v])
        return [out]

    (out,), _ = run(isa, build, [x, w, c], [x, w, c])
    assert near(out, torch.nn.functional.linear(x.double(), w.double(), c.double()), dtype)


def test_memory_is_used_again_and_never_too_soon():
    """A chain needs two buffers; a value that is read at the end keeps its own."""
    isa = AVAILABLE[0]
    x = torch.randn(1, 64)

    def build(b, v):
        first = last = b.produce(x.shape, x.dtype)
        b.emit("unary", [first, v[0]], (UNARY.index("neg"),))
        for _ in range(9):
            new = b.produce(x.shape, x.dtype)
            b.emit("unary", [new, last], (UNARY.index("neg"),))
            last = new
        out = b.produce(x.shape, x.dtype)
        b.emit("binary", [out, first, last], (BINARY.index("sub"),))
        return [out]

    (out,), code = run(isa, build, [x], [x])
    assert torch.equal(out, -x - x)
    assert code.workspace == 3 * 256 and [step.level for step in code.steps] == list(range(11))


def test_operands_of_other_sizes_are_refused():
    from effllm.errors import KernelError

    isa = AVAILABLE[0]
    x = torch.randn(1, 64)

    def build(b, v):
        out = b.produce(x.shape, x.dtype)
        b.emit("unary", [out, v[0]], (0,))
        return [out]

    with pytest.raises(KernelError, match="E-KRN-STEP"):
        run(isa, build, [x[:, :32]], [x])


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_unit_of_two_halves(isa, act):
    torch.manual_seed(0)
    both = torch.randn(2, 5000)

    def build(b, v):
        out = b.produce((2, 2500), both.dtype)
        b.emit("glu", [out, v[0].like(v[0].meta[:, :2500]), v[0].like(v[0].meta[:, 2500:])], (UNARY.index(act),))
        return [out]

    (out,), _ = run(isa, build, [both], [both])
    assert torch.allclose(out, glu(both[:, :2500], both[:, 2500:], act), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("op", BINARY[BINARY.index("le") :])
def test_comparisons_of_ranges_and_numbers(isa, op):
    """Positions from 3 on, stored nowhere, against one stored number a row; truth values against truth values."""
    last, flags = torch.tensor([[2], [7], [40], [5]]), torch.rand(4, 11) < 0.5
    function = {"le": torch.le, "lt": torch.lt, "ge": torch.ge, "gt": torch.gt, "eq": torch.eq, "ne": torch.ne,
                "and": torch.logical_and, "or": torch.logical_or}[op]  # fmt: skip
    both = op in ("and", "or")

    def build(b, v):
        out, first, positions = b.produce((4, 11), torch.bool), v[1], b.range(3, 11)
        if not both:
            first = positions.like(positions.meta[None].expand(4, 11))
        b.emit("binary", [out, first, v[0].like(v[0].meta.expand(4, 11))], (BINARY.index(op),))
        return [out]

    given = [last % 2 == 0, flags] if both else [last, flags]
    (out,), _ = run(isa, build, given, given)
    assert out.equal(function(flags, given[0].expand(4, 11)) if both else function(torch.arange(3, 14)[None], last))


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
def test_angles_and_copies_of_integers(isa):
    at, frequencies = torch.tensor([[0], [7], [2047]]), torch.logspace(0, -4, 24)

    def build(b, v):
        wide, angles = b.produce((3, 1), torch.float32), b.produce((3, 24), torch.float32)
        b.emit("copy", [wide, v[0]])
        b.emit("binary", [angles, wide.like(wide.meta.expand(3, 24)), v[1].like(v[1].meta.expand(3, 24))], (BINARY.index("mul"),))
        made = [b.produce((3, 24), torch.float32) for _ in range(2)]
        for value, op in zip(made, ("cos", "sin"), strict=True):
            b.emit("unary", [value, angles], (UNARY.index(op),))
        numbers, stored = b.range(5, 9), b.produce((3, 3), torch.int64)
        b.emit("copy", [stored, numbers.like(numbers.meta.view(3, 3).t())])
        return [*made, stored]

    (cos, sin, stored), _ = run(isa, build, [at, frequencies], [at, frequencies])
    angles = at.float() * frequencies
    assert torch.allclose(cos, angles.cos(), atol=3e-7) and torch.allclose(sin, angles.sin(), atol=3e-7)
    assert stored.equal(torch.arange(5, 14).view(3, 3).t())


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_rows_are_largest(isa, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2500).to(dtype)
    x[0, 0] = -5.0  # equals: the first
    x[0, 1, 2499] = 50.0
    x[0, 2, [100, 2000]] = 60.0
    x[1, 0, [1700, 1800]] = torch.nan
    x[1, 1] = -torch.inf

    def build(b, v):
        out = b.produce((2, 3), torch.int64)
        b.emit("largest", [out, v[0]])
        return [out]

    (at,), _ = run(isa, build, [x], [x])
    assert at.tolist() == [[0, 2499, 100], [1700, 0, int(x[1, 2].argmax())]]


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table(isa, dtype):
    table, ids = torch.randn(33, 50).to(dtype)[:, :48], torch.tensor([[32, 0], [7, 7]])

    def build(b, v):
        out = b.produce((2, 2, 48), dtype)
        b.emit("rows", [out, v[0], v[1]])
        return [out]

    (rows,), _ = run(isa, build, [ids, table], [ids, table])
    assert rows.equal(table[ids])
    for wrong in (33, -1):
        with pytest.raises(RuntimeError, match="outside of the embedding"):
            run(isa, build, [torch.tensor([[0, 1], [wrong, 2]]), table], [ids, table])


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_rows_of_a_packed_table(isa, case):
    """The same values as the op of packed embeddings gives, bit for bit."""
    packed = make_packed(case)
    codes, scale, low, zero = arguments(packed, "tile16")
    ids = torch.tensor([[case.n - 1, 0, case.n // 2]])
    given = [ids, codes, scale, *([] if low is None else [low])]

    def build(b, v):
        out = b.produce((1, 3, case.k), torch.bfloat16)
        sizes = (case.n, case.bits, case.group, b.number(zero), scale.dtype == torch.float16, codes.shape[1], scale.shape[1])
        b.emit("packed_rows", [out, v[0], v[1], v[2], None if low is None else v[3]], sizes)
        return [out]

    (rows,), _ = run(isa, build, given, given)
    assert rows.equal(embedding(ids, codes, scale, low, case.n, case.k, case.bits, case.group, zero, torch.bfloat16, f"cpu-{isa.name}"))


@pytest.mark.parametrize("isa", AVAILABLE, ids=lambda i: i.name)
def test_bound_programs_follow_what_moves_and_the_number_of_threads(isa):
    x, y = torch.randn(4, 4096), torch.randn(4, 4096)

    def build(b, v):
        out = b.produce(x.shape, torch.float32)
        b.emit("binary", [out, v[0], v[1]], (0,))
        return [out]

    ensure(isa)
    builder = Builder()
    code = builder.finish(build(builder, [builder.external(x), builder.external(y)]))
    bound, threads = StepProgram(code, isa.namespace).bind([x, y], [1]), torch.get_num_threads()
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        other = torch.randn(4, 4096)
        assert bound([other])[0].equal(x + other)
    torch.set_num_threads(threads)
    with pytest.raises(RuntimeError, match="no tensor 7"):
        StepProgram(code, isa.namespace).bind([x, y], [7])([y])
