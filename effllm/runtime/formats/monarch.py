"""Monarch: every block of a grid over the weight has rank t, so that the weight is two block-diagonal factors with a permutation between.

Maths.  The (N, K) weight is cut into I blocks of p = ceil(K / I) columns and O classes of s = ceil(N / O) rows, and the (s, p) block of
class o and columns i is L[o, i] @ R[o, i] with L (s, t) and R (t, p). A product y = W x is then

    z[o, i, r] = sum_p R[o, i, r, p] x[i, p]                stage 1: I products with (O t, p) matrices
    y[o, s]    = sum_{i, r} L[o, i, s, r] z[o, i, r]        stage 2: O products with (s, I t) matrices

and takes I O t (p + s) values instead of N K. The classes are either

    contiguous   row n = o s + j: no permutation of outputs, heads stay together
    strided      row n = j O + o: the paper's form; the same weights up to a permutation of rows

Layout (version 1): two parts, each dense or bipolar.

    w1   (I O t, p)    row (i O + o) t + r holds R[o, i, r]: the middle axis is ordered so that stage 1 ends in the order stage 2 reads
    w2   (O s, I t)    row o s + j, column i t + r holds L[o, i, j, r]

Columns past K meet no input and rows past N no output; both are zero where a solver pads. The published tensors w1 (I, t O, p) with the
middle axis (r, o) and w2 (O, s, I t) are the same numbers (`to_published`, `of_published`).

Source: arXiv 2204.00595 (square, t = 1), arXiv 2512.20861 (order of the middle axis, contiguous form).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError, WeightError
from effllm.runtime.formats import bipolar, dense, parts
from effllm.runtime.formats.base import Packed

name = "monarch"
version = 1
tensor_names: tuple[str, ...] = ("w1.values", "w2.values", *(f"{w}.{t}" for w in ("w1", "w2") for t in bipolar.tensor_names))
_PARTS = {dense.name: dense, bipolar.name: bipolar}


def sizes(n: int, k: int, blocks_in: int, blocks_out: int) -> tuple[int, int]:
    """Rows s and columns p of a block of an (N, K) weight, padding included. Raises WeightError (E-WGT-BLOCKS)."""
    if not (1 <= blocks_in <= k and 1 <= blocks_out <= n):
        cause = f"{blocks_out} x {blocks_in} blocks do not fit a weight of shape {(n, k)}"
        raise WeightError("E-WGT-BLOCKS", cause, "give from one block to as many as there are rows and columns")
    return -(-n // blocks_out), -(-k // blocks_in)


def to_blocks(w: Tensor, blocks_in: int, blocks_out: int, strided: bool) -> Tensor:
    """The blocks of a dense (N, K) weight as (O, I, s, p), zeros where it is padded. Raises WeightError (E-WGT-BLOCKS)."""
    n, k = w.shape
    s, p = sizes(n, k, blocks_in, blocks_out)
    w = torch.nn.functional.pad(w, (0, blocks_in * p - k, 0, blocks_out * s - n))
    if strided:
        return w.view(s, blocks_out, blocks_in, p).permute(1, 2, 0, 3)
    return w.view(blocks_out, s, blocks_in, p).transpose(1, 2)


def of_blocks(blocks: Tensor, n: int, k: int, strided: bool) -> Tensor:
    """The inverse of `to_blocks`: (O, I, s, p) to (N, K)."""
    o, i, s, p = blocks.shape
    w = blocks.permute(2, 0, 1, 3) if strided else blocks.transpose(1, 2)
    return w.reshape(o * s, i * p)[:n, :k]


def to_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of all blocks, L (O, I, s, t) and R (O, I, t, p), as the matrices w1 and w2."""
    o, i, s, t = left.shape
    return right.transpose(0, 1).reshape(i * o * t, right.shape[3]), left.transpose(1, 2).reshape(o * s, i * t)


def of_factors(w1: Tensor, w2: Tensor, blocks_in: int, blocks_out: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_factors`: L (O, I, s, t) and R (O, I, t, p)."""
    t = w1.shape[0] // (blocks_in * blocks_out)
    right = w1.view(blocks_in, blocks_out, t, -1).transpose(0, 1)
    return w2.view(blocks_out, -1, blocks_in, t).transpose(1, 2), right


def to_published(w1: Tensor, w2: Tensor, blocks_in: int, blocks_out: int) -> tuple[Tensor, Tensor]:
    """The tensors of the paper's code: w1 (I, t O, p) with row r O + o, and w2 (O, s, I t)."""
    t = w1.shape[0] // (blocks_in * blocks_out)
    first = w1.view(blocks_in, blocks_out, t, -1).transpose(1, 2).reshape(blocks_in, t * blocks_out, -1)
    return first, w2.view(blocks_out, -1, blocks_in * t)


def of_published(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_published`: w1 (I O t, p) and w2 (O s, I t)."""
    (i, q, p), (o, _, r) = first.shape, second.shape
    t = q // o if o else 0
    if q != o * t or r != i * t:
        raise WeightError("E-WGT-SHAPE", f"Monarch tensors {tuple(first.shape)} and {tuple(second.shape)} do not fit", "give w1 (I, t O, p) and w2 (O, s, I t)")
    return first.view(i, t, o, p).transpose(1, 2).reshape(i * q, p), second.reshape(-1, r)


def make(w1: Packed, w2: Packed, *, shape: tuple[int, int], blocks_in: int, blocks_out: int, strided: bool = False) -> Packed:
    """Store solved factors, w1 (I O t, p) and w2 (O s, I t), of a weight with the dense `shape` (N, K)."""
    rank = w1.shape[0] // max(1, blocks_in * blocks_out)
    attrs = {"blocks_in": blocks_in, "blocks_out": blocks_out, "rank": rank, "strided": strided}
    packed = parts.join(name, version, shape, {"w1": w1, "w2": w2}, attrs=attrs)
    validate(packed)
    return packed


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) weight: products of the stored factors in fp64, rounded once."""
    a = packed.attrs
    first, second = parts.part(packed, "w1"), parts.part(packed, "w2")
    w1, w2 = (_PARTS[p.format].unpack(p, torch.float32).double() for p in (first, second))
    left, right = of_factors(w1, w2, a["blocks_in"], a["blocks_out"])
    return of_blocks(left @ right, *packed.shape, a["strided"]).to(dtype)


def nbytes(*, blocks_in: int, blocks_out: int, rank: int, bits: int = 0, group: int = 32, grid: str = "symmetric",
           value_bytes: int = 2, scale_bytes: int = 2, **_: Any) -> sympy.Expr:  # fmt: skip
    """Stored bytes over the symbols N and K; `bits` 0: dense factors of `value_bytes`, else bipolar ones."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    s, p = sympy.ceiling(n / blocks_out), sympy.ceiling(k / blocks_in)
    one = bipolar.nbytes(bits=bits, group=group, grid=grid, scale_bytes=scale_bytes) if bits else dense.nbytes(value_bytes=value_bytes)
    first = one.subs({n: sympy.Integer(blocks_in * blocks_out * rank), k: p}, simultaneous=True)
    return first + one.subs({n: blocks_out * s, k: sympy.Integer(blocks_in * rank)}, simultaneous=True)


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    a, (n, k) = packed.attrs, packed.shape

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"Monarch weight {(n, k)}: {cause}", "the file is damaged or not from effllm; write it again")

    counts = {key: a.get(key) for key in ("blocks_in", "blocks_out", "rank")}
    if not all(type(v) is int and v > 0 for v in counts.values()) or not isinstance(a.get("strided"), bool):
        raise bad(f"its attributes are {counts}, strided={a.get('strided')!r}")
    i, o, t = a["blocks_in"], a["blocks_out"], a["rank"]
    if i > k or o > n:
        raise bad(f"{o} x {i} blocks")
    s, p = sizes(n, k, i, o)
    if t > min(s, p):
        raise bad(f"rank {t} of blocks of shape {(s, p)}")
    if set(parts.names(packed)) != {"w1", "w2"} or any("." not in key for key in packed.tensors):
        raise bad(f"its tensors are {sorted(packed.tensors)}")
    for key, want in (("w1", (i * o * t, p)), ("w2", (o * s, i * t))):
        factor = parts.part(packed, key)
        if factor.format not in _PARTS or factor.version != _PARTS[factor.format].version:
            raise bad(f"{key} has format {factor.format!r} version {factor.version}")
        if factor.shape != want:
            raise bad(f"{key} has shape {factor.shape}, expected {want}")
        _PARTS[factor.format].validate(factor)
