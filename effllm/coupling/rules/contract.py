"""Sums of products: linear layers, matrix products, convolutions, attention, embeddings."""

from __future__ import annotations

from torch import fx

from effllm.coupling.axes import Prod, fresh, pin, unify
from effllm.coupling.rules.base import Axes, Call, broadcast, pinned_like, rule
from effllm.coupling.rules.shape import unknown


def _product(call: Call, a: fx.Node, b: fx.Node) -> Axes:
    """matmul of any ranks."""
    x, y = call.of(a), call.of(b)
    inner = -2 if len(y) > 1 else -1
    unify(x[-1], y[inner], call.why)
    call.summed += [(a, len(x) - 1), (b, len(y) + inner)]
    batch = broadcast([x[:-2], y[:-2]], call.why)
    return batch + x[-2:-1] + (y[-1:] if len(y) > 1 else [])


@rule("linear")
def linear(call: Call) -> Axes:
    """x (..., K) and a weight (N, K): K is summed, N is new."""
    x, w = call.axes("input"), call.axes("weight")
    unify(x[-1], w[-1], call.why)
    call.summed += [(call.args["input"], len(x) - 1), (call.args["weight"], len(w) - 1)]
    if call.has("bias"):
        broadcast([[w[0]], call.axes("bias")], call.why)
    return [*x[:-1], w[0]]


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Axes:
    """Batched matrix product."""
    other = next(k for k in ("other", "mat2", "vec", "tensor") if k in call.args)
    return _product(call, call.args["self"], call.args[other])


@rule("addmm", "baddbmm")
def addmm(call: Call) -> Axes:
    """Matrix product plus a bias, as GPT-2's Conv1D has it with an (in, out) weight."""
    a, b = ("mat1", "mat2") if call.op == "aten.addmm" else ("batch1", "batch2")
    out = _product(call, call.args[a], call.args[b])
    return broadcast([out, call.axes("self")], call.why)


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def grouped(call: Call) -> Axes:
    """Rows x (S, K) sorted by expert and weights (E, K, N): K is summed; which rows meet which expert is by number."""
    names = list(call.args)
    a, b = call.args[names[0]], call.args[names[1]]
    x, w = call.of(a), call.of(b)
    if len(x) != 2 or len(w) != 3 or call.has("bias"):
        return unknown(call)
    unify(x[1], w[1], call.why)
    call.summed += [(a, 1), (b, 1)]
    for axis in (x[0], w[0]):
        pin(axis, f"{call.why} picks experts by number")
    return [x[0], w[2]]


@rule("einsum")
def einsum(call: Call) -> Axes:
    """Axes of one letter are permuted together; letters that the result does not name are summed."""
    equation = call.args["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        return unknown(call)
    left, right = equation.split("->")
    letters: Axes = []
    names: dict[str, int] = {}
    for operand, node in zip(left.split(","), call.args["tensors"], strict=True):
        for i, (letter, axis) in enumerate(zip(operand, call.of(node), strict=True)):
            if letter not in right:
                call.summed.append((node, i))
            if letter not in names:
                names[letter] = len(letters)
                letters.append(axis)
            elif axis.size != 1:
                if letters[names[letter]].size == 1:
                    letters[names[letter]] = axis
                unify(letters[names[letter]], axis, call.why)
    return [letters[names[letter]] for letter in right]


@rule("conv1d", "conv2d")
def conv(call: Call) -> Axes:
    """x (B, C, ...) and a weight (N, C, ...): C is summed, places keep their order. Grouped convolutions only with one channel per group."""
    x, w = call.axes("input"), call.axes("weight")
    sizes = call.out_sizes
    if call.args["groups"] == 1:
        unify(x[-len(w) + 1], w[1], call.why)
        call.summed += [(call.args["input"], len(x) - len(w) + 1), (call.args["weight"], 1)]
    elif call.args["groups"] == x[-len(w) + 1].size == w[0].size:
        unify(x[-len(w) + 1], w[0], call.why)
    else:
        return unknown(call)
    reason = f"{call.why} slides along it"
    for axis in (*x[-len(w) + 2 :], *w[2:]):
        pin(axis, reason)
    if call.has("bias"):
        broadcast([[w[0]], call.axes("bias")], call.why)
    return [*x[: -len(w) + 1], w[0], *pinned_like(sizes[-len(w) + 2 :], reason)]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Axes:
    """q (..., H, T, D), k (..., Hk, S, D), v (..., Hk, S, E): D and S are summed, H is Hk times the group where heads are shared."""
    q, k, v = call.axes("query"), call.axes("key"), call.axes("value")
    why = call.why
    unify(q[-1], k[-1], why)
    unify(k[-2], v[-2], why)
    if call.args.get("enable_gqa") and len(q) > 2 and q[-3].size != k[-3].size:
        for kv in (k, v):
            unify(q[-3], Prod((kv[-3], fresh(q[-3].size // kv[-3].size))), why)
        batch = [*broadcast([q[:-3], k[:-3], v[:-3]], why), q[-3]]
    else:
        batch = broadcast([q[:-2], k[:-2], v[:-2]], why)
    scores = [*batch, q[-2], k[-2]]
    if call.has("attn_mask"):
        broadcast([scores, call.axes("attn_mask")], why)
    if call.args.get("is_causal"):
        pin(q[-2], f"{why} is causal")
        pin(k[-2], f"{why} is causal")
    call.reduced += [scores, scores[:-1]]  # the scores themselves, and what is left of them after the softmax's sum
    return [*batch, q[-2], v[-1]]


@rule("embedding")
def embedding(call: Call) -> Axes:
    """Rows of the weight are chosen by number, so they keep their places; columns flow on."""
    w = call.axes("weight")
    pin(w[0], f"{call.why} picks rows by number")
    return [*call.axes("indices"), *w[1:]]
