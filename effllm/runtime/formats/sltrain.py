"""Low rank plus unstructured sparse: W = A B + S, the factors dense or quantized, S in compressed rows.

Layout (version 1):

    a.*, b.*         parts, dense or bipolar    (N, r), (r, K)
    sparse.values    bf16, fp16 or fp32 (nnz,)
    sparse.columns   int16 (nnz,): the column less 32768, so K up to 65536; int32 with the column itself where K is larger
    sparse.rows      int32 (N + 1,): row i holds entries rows[i] to rows[i + 1]; columns increase within a row
    shift            as in `lowrank`

Source: arXiv 2406.02214 (W = A B + S with a fixed random support; here the support comes from the weight).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime.formats import bipolar, dense, lowrank, parts
from effllm.runtime.formats.base import Packed

name = "sltrain"
version = 1
tensor_names: tuple[str, ...] = ("a", "b", "sparse.values", "sparse.columns", "sparse.rows", "shift")
_PARTS = {"dense": dense, "bipolar": bipolar}
BIAS = 32768


def make(a: Packed, b: Packed, sparse: Tensor, *, dtype: torch.dtype = torch.bfloat16, shift: Tensor | None = None) -> Packed:
    """Join packed factors and the nonzeros of `sparse` (N, K), whose values are stored in `dtype`."""
    n, k = sparse.shape
    where = sparse.nonzero()
    rows = torch.zeros(n + 1, dtype=torch.int32, device=sparse.device)
    rows[1:] = torch.bincount(where[:, 0], minlength=n).cumsum(0)
    columns = (where[:, 1] - BIAS).to(torch.int16) if k <= 2 * BIAS else where[:, 1].to(torch.int32)
    held = {"sparse.values": sparse[where[:, 0], where[:, 1]].to(dtype), "sparse.columns": columns.contiguous(), "sparse.rows": rows}
    if shift is not None:
        held["shift"] = shift.float().contiguous()
    packed = parts.join(name, version, (n, k), {"a": a, "b": b}, held, {"rank": b.shape[0], "nnz": where.shape[0]})
    validate(packed)
    return packed


def columns(packed: Packed) -> Tensor:
    """Column of every nonzero, int64 (nnz,)."""
    stored = packed.tensors["sparse.columns"]
    return stored.long() + (BIAS if stored.dtype == torch.int16 else 0)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) weight, summed in fp64 and rounded once."""
    w = lowrank.factor(packed, "a").double() @ lowrank.factor(packed, "b").double()
    counts = packed.tensors["sparse.rows"].diff().long()
    rows = torch.repeat_interleave(torch.arange(packed.shape[0], device=w.device), counts)
    w[rows, columns(packed)] += packed.tensors["sparse.values"].double()
    return w.to(dtype)


def nbytes(
    *, rank: int, nnz: int, a: dict[str, Any], b: dict[str, Any], shift: bool = False, number_bytes: int = 2, value_bytes: int = 2,
    index_bytes: int = 2, **_: Any,
) -> sympy.Expr:
    """Stored bytes over the symbols N and K."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    sparse = nnz * (value_bytes + index_bytes) + 4 * (n + 1)
    return lowrank.part_bytes(a, n, rank, number_bytes) + lowrank.part_bytes(b, rank, k, number_bytes) + sparse + (4 * n if shift else 0)


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    (n, k), t = packed.shape, packed.tensors

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"low-rank and sparse weight {packed.shape}: {cause}", "the file is damaged or not from effllm; write it again")

    rank, nnz = packed.attrs.get("rank"), packed.attrs.get("nnz")
    if not isinstance(rank, int) or not isinstance(nnz, int) or not 1 <= rank <= min(n, k):
        raise bad(f"its rank is {rank!r} with {nnz!r} nonzeros")
    for key, want in (("a", (n, rank)), ("b", (rank, k))):
        p = parts.part(packed, key)
        if p.format not in _PARTS or tuple(p.shape) != want:
            raise bad(f"factor {key} is {p.format} {tuple(p.shape)}, expected {want}")
        _PARTS[p.format].validate(p)
    own = {key for key in t if not key.startswith(("a.", "b."))}
    if own - {"shift"} != {"sparse.values", "sparse.columns", "sparse.rows"}:
        raise bad(f"its tensors are {sorted(t)}")
    shift = t.get("shift")
    if shift is not None and (tuple(shift.shape) != (n,) or shift.dtype != torch.float32):
        raise bad(f"shift is {shift.dtype} {tuple(shift.shape)}")
    values, index, rows = (t[f"sparse.{key}"] for key in ("values", "columns", "rows"))
    wide = torch.int16 if k <= 2 * BIAS else torch.int32
    if tuple(values.shape) != (nnz,) or values.dtype not in dense.DTYPES or tuple(index.shape) != (nnz,) or index.dtype != wide:
        raise bad(f"values are {values.dtype} {tuple(values.shape)} and columns {index.dtype} {tuple(index.shape)} for {nnz} nonzeros")
    if tuple(rows.shape) != (n + 1,) or rows.dtype != torch.int32:
        raise bad(f"rows are {rows.dtype} {tuple(rows.shape)}")
    if rows.is_meta:
        return
    if int(rows[0]) != 0 or int(rows[-1]) != nnz or bool((rows.diff() < 0).any()):
        raise bad("its row pointers do not run from 0 to the number of nonzeros")
    at = columns(packed)
    if nnz and (int(at.min()) < 0 or int(at.max()) >= k):
        raise bad(f"it has columns outside of 0..{k - 1}")
    flat = torch.repeat_interleave(torch.arange(n, device=at.device), rows.diff().long()) * k + at
    if bool((flat.diff() <= 0).any()):
        raise bad("its columns do not increase within a row")
