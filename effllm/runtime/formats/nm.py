"""N:M sparsity: of every m consecutive inputs of a row, n are stored, with an index that says which.

    values   part (N, Kc), Kc = Kp n / m    kept weights in order of their column, dense (bf16, fp16, fp32) or bipolar-INT;
                                            the groups of bipolar-INT lie along the compressed axis
    index    uint8  (N, B)                  "bitmap": bit k % 8 of byte k // 8 says that column k is kept, B = ceil(Kp / 8)
                                            "packed": log2(m) bits for each kept weight, its column within its group, least
                                            significant bit first and without gaps, B = ceil(Kc log2(m) / 8)

Kp is K rounded up to whole groups (only where padding was asked for; padded columns hold zero). m is 4, 8 or 16. The index is
whichever of the two takes fewer bytes, the bitmap where both take the same: n log2(m) / m bits against 1 bit for each weight.

Every group stores exactly n weights. A group with fewer non-zeros stores zeros, at its lowest free columns; where the values
are coded, their grid must then hold zero exactly. So a kept weight of zero and a dropped one are the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError, WeightError
from effllm.runtime.formats import bipolar, dense, parts
from effllm.runtime.formats.base import Packed

WIDTHS: dict[int, int] = {4: 2, 8: 3, 16: 4}  # m -> bits of a column within its group

name = "nm"
version = 1
tensor_names: tuple[str, ...] = ("values.values", "values.planes", "values.scale", "values.minimum", "index")


def check_pattern(n: int, m: int) -> None:
    """Raise WeightError (E-WGT-NM) for a pattern that cannot be stored."""
    if m not in WIDTHS or not 1 <= n <= m:
        raise WeightError("E-WGT-NM", f"{n}:{m} is no pattern that can be stored", f"m is one of {sorted(WIDTHS)} and n is 1 to m")


def padded(k: int, m: int) -> int:
    """K rounded up to whole groups."""
    return -(-k // m) * m


def kept(k: int, n: int, m: int) -> int:
    """Kc: stored weights of a row."""
    return padded(k, m) // m * n


def index_bytes(kind: str, k: Any, n: int, m: int) -> Any:
    """Bytes of a row's index; `k` is a number or a symbol."""
    bits = sympy.ceiling(sympy.sympify(k) / m) * (m if kind == "bitmap" else n * WIDTHS[m])
    found = sympy.ceiling(bits / 8)
    return int(found) if found.is_Integer else found


def index_kind(n: int, m: int) -> str:
    """The smaller index of a pattern: "bitmap" or "packed"."""
    whole = 8 * m  # groups of any pattern fill whole bytes here
    return "bitmap" if index_bytes("bitmap", whole, n, m) <= index_bytes("packed", whole, n, m) else "packed"


def pack_bits(bits: Tensor) -> Tensor:
    """Bits (N, L) to bytes (N, ceil(L / 8)), least significant first."""
    return bipolar.pack_codes(torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8)), 1)[0]


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 (N, count)."""
    return bipolar.unpack_codes(packed.unsqueeze(0))[:, :count]


def pack_index(columns: Tensor, n: int, m: int) -> Tensor:
    """Columns (N, Kc) of the kept weights, ascending within each group, to the index of the pattern."""
    rows, kc = columns.shape
    kind = index_kind(n, m)
    if columns.is_meta:
        return torch.empty(rows, index_bytes(kind, kc // n * m, n, m), dtype=torch.uint8, device="meta")
    if kind == "bitmap":
        bits = torch.zeros(rows, kc // n * m, dtype=torch.uint8, device=columns.device)
        return pack_bits(bits.scatter_(1, columns, 1))
    shifts = torch.arange(WIDTHS[m], device=columns.device)
    return pack_bits(((columns % m).unsqueeze(-1) >> shifts & 1).reshape(rows, -1))


def unpack_index(index: Tensor, k: int, n: int, m: int) -> Tensor:
    """The index of a pattern to the columns (N, Kc) of the kept weights, int64 in 0 .. Kp."""
    rows, groups = index.shape[0], padded(k, m) // m
    if index_kind(n, m) == "bitmap":
        bits = unpack_bits(index, groups * m).view(rows, groups, m)
        place = bits.to(torch.int64).argsort(dim=-1, descending=True, stable=True)[..., :n]  # kept columns first, each in order
    else:
        bits = unpack_bits(index, groups * n * WIDTHS[m]).view(rows, groups, n, WIDTHS[m])
        place = (bits.to(torch.int64) << torch.arange(WIDTHS[m], device=index.device)).sum(-1)
    start = torch.arange(groups, device=index.device).view(1, groups, 1) * m
    return (place + start).reshape(rows, groups * n)


def slots(keep: Tensor, n: int, m: int) -> Tensor:
    """Columns (N, Kc) to store for a mask (N, Kp) of at most n weights a group; the lowest free columns fill a group up.

    Raises WeightError (E-WGT-MASK) where a group keeps more than n.
    """
    grouped = keep.view(keep.shape[0], -1, m)
    if keep.is_meta:
        return torch.empty(keep.shape[0], grouped.shape[1] * n, dtype=torch.int64, device="meta")
    count = grouped.sum(-1)
    if bool((count > n).any()):
        row, group = (count > n).nonzero()[0].tolist()
        cause = f"the mask keeps {int(count[row, group])} weights in columns {group * m} to {group * m + m - 1} of row {row}, the pattern {n}:{m} allows {n}"
        raise WeightError("E-WGT-MASK", cause, "make the mask along the input axis (the last one), with at most n of every m consecutive inputs")
    first = grouped.to(torch.int64).argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
    return (first + torch.arange(grouped.shape[1], device=keep.device).view(1, -1, 1) * m).reshape(keep.shape[0], -1)


def from_dense(
    w: Tensor, mask: Tensor | None, n: int, m: int,
    *, dtype: torch.dtype | None = None, quantize: Callable[[Tensor], Packed] | None = None, pad: bool = False,
) -> Packed:  # fmt: skip
    """Store a weight (N, K) under an N:M mask (bool, True for kept weights; None: its non-zeros).

    Values are stored in `dtype` (w's by default), or as the bipolar weight that `quantize` makes of the kept ones (N, Kc).

    Raises WeightError: E-WGT-NM for a pattern or a K that does not fit, E-WGT-MASK for a mask that breaks the pattern or has another
    shape, E-WGT-EMPTY for one that keeps nothing, E-WGT-GRID where a coded group keeps fewer than n and its grid has no zero.
    """
    check_pattern(n, m)
    rows, k = w.shape
    if k % m and not pad:
        raise WeightError("E-WGT-NM", f"{k} inputs are not a multiple of {m}", f"choose a pattern whose m divides {k}, or ask for padding")
    keep = w != 0 if mask is None else mask
    if keep.shape != w.shape or keep.dtype != torch.bool:
        raise WeightError("E-WGT-MASK", f"a mask {tuple(keep.shape)} of {keep.dtype} for a weight {tuple(w.shape)}", "give a bool mask of the weight's shape")
    if not w.is_meta and w.numel() and not bool(keep.any()):
        raise WeightError("E-WGT-EMPTY", f"the mask keeps none of {rows} x {k} weights", "lower the prune ratio of this layer")
    extra = padded(k, m) - k
    keep = torch.nn.functional.pad(keep, (0, extra))
    columns = slots(keep, n, m)
    chosen = torch.nn.functional.pad(w, (0, extra)) * keep
    chosen = torch.where(keep, chosen, torch.zeros_like(chosen))  # a dropped NaN or infinity is dropped
    values = chosen.gather(1, columns)
    if quantize is None:
        return make(dense.make(values.to(dtype or w.dtype)), columns, k, n, m)
    coded = quantize(values)
    packed = make(coded, columns, k, n, m)
    if not w.is_meta:
        filler = ~keep.gather(1, columns)
        if bool(filler.any()) and bool((bipolar.unpack(coded)[filler] != 0).any()):
            raise WeightError(
                "E-WGT-GRID", f"a group keeps fewer than {n} weights, and the {coded.attrs.get('grid')} grid cannot code their zeros",
                'quantize to the "integer" grid, or keep exactly n of every m weights',
            )  # fmt: skip
    return packed


def make(values: Packed, columns: Tensor, k: int, n: int, m: int) -> Packed:
    """Store solved numbers: a dense or bipolar part (N, Kc) and the columns (N, Kc) of its weights, ascending within each group."""
    shape = (values.shape[0], k)
    packed = parts.join(name, version, shape, {"values": values}, {"index": pack_index(columns, n, m)}, {"n": n, "m": m})
    validate(packed)
    return packed


def columns_of(packed: Packed) -> Tensor:
    """Columns (N, Kc) of the kept weights, int64."""
    return unpack_index(packed.tensors["index"], packed.shape[1], packed.attrs["n"], packed.attrs["m"])


def values_of(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The kept weights (N, Kc)."""
    part = parts.part(packed, "values")
    return bipolar.unpack(part, dtype) if part.format == bipolar.name else dense.unpack(part, dtype)


def mask(packed: Packed) -> Tensor:
    """Bool (N, K): exactly the columns that are stored, zeros that fill a group included (less those past K)."""
    rows, k = packed.shape
    keep = torch.zeros(rows, padded(k, packed.attrs["m"]), dtype=torch.bool, device=packed.tensors["index"].device)
    return keep.scatter_(1, columns_of(packed), True)[:, :k]


def expand(values: Tensor, columns: Tensor, k: int, m: int) -> Tensor:
    """Kept weights (N, Kc) at their columns in a dense (N, K), differentiable in `values`."""
    return values.new_zeros(values.shape[0], padded(k, m)).scatter(1, columns, values)[:, :k]


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) weight that is stored."""
    return expand(values_of(packed, dtype), columns_of(packed), packed.shape[1], packed.attrs["m"])


def nbytes(
    *, n: int, m: int, bits: int = 0, value_bytes: int = 2, group: int = bipolar.CHANNEL, grid: str = "symmetric", scale_bytes: int = 2, **_: Any
) -> sympy.Expr:
    """Stored bytes over the symbols N and K; `bits` 0 for floating-point values of `value_bytes`."""
    rows, k = sympy.symbols("N K", positive=True, integer=True)
    kc = sympy.ceiling(k / sympy.Integer(m)) * n
    part = bipolar.nbytes(bits=bits, group=group, grid=grid, scale_bytes=scale_bytes) if bits else dense.nbytes(value_bytes=value_bytes)
    return part.subs(k, kc) + rows * index_bytes(index_kind(n, m), k, n, m)


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    (rows, k), n, m = packed.shape, packed.attrs.get("n"), packed.attrs.get("m")

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"N:M weight {packed.shape}: {cause}", "the file is damaged or was made for another shape; write it again")

    if not isinstance(n, int) or not isinstance(m, int) or m not in WIDTHS or not 1 <= n <= m:
        raise bad(f"its pattern is {n}:{m}")
    part = parts.part(packed, "values")
    if part.format not in (bipolar.name, dense.name):
        raise bad(f"its values have the format {part.format!r}")
    (bipolar if part.format == bipolar.name else dense).validate(part)
    if part.shape != (rows, kept(k, n, m)):
        raise bad(f"its values are {part.shape}, expected {(rows, kept(k, n, m))} for {n}:{m}")
    index = packed.tensors.get("index")
    want = (rows, index_bytes(index_kind(n, m), k, n, m))
    if index is None or tuple(index.shape) != want or index.dtype != torch.uint8:
        raise bad(f"its index is {None if index is None else (tuple(index.shape), index.dtype)}, expected {want} of uint8")
    if index.is_meta or not index.numel():
        return
    if index_kind(n, m) == "bitmap":
        if bool((unpack_bits(index, padded(k, m)).view(rows, -1, m).sum(-1) != n).any()):
            raise bad(f"a group of its bitmap does not hold {n} of {m}")
    elif n > 1:
        place = unpack_index(index, k, n, m).view(rows, -1, n)
        if bool((place[..., 1:] <= place[..., :-1]).any()):
            raise bad("the columns of a group are not ascending")
