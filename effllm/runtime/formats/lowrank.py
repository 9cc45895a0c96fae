"""Low rank: a weight as the product of two factors that are each dense or quantized.

Maths.  Plain: W = A B. With `channels` (c input channels folded in): W x = A concat(B x, x[channels]), so A has r + c columns and its
last c are added to those columns of W. With `pivots` (r output rows, increasing): these rows of W are B itself and A B are the others,
in order: y[pivots] = z, y[others] = A z with z = B x, which stores r^2 numbers less than the plain form of the same matrix.

Layout (version 1):

    a.*       part, dense or bipolar   (N, r), (N, r + c) or (N - r, r)
    b.*       part, dense or bipolar   (r, K)
    shift     fp32 (N,)    optional: is added to the linear's bias when the weight is installed; no part of W
    channels  int32 (c,)   optional: distinct input channels
    pivots    int32 (r,)   optional, not beside channels: distinct output rows, increasing

Source: factorized linears after arXiv 2403.07378 (plain), the shift after atomic feature mimicking (KDD 2024), channels after LOST,
pivots after arXiv 2501.19090; factors that are quantized themselves are ours.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime.formats import bipolar, dense, parts
from effllm.runtime.formats.base import Packed

name = "lowrank"
version = 1
tensor_names: tuple[str, ...] = ("a", "b", "shift", "channels", "pivots")
_PARTS = {"dense": dense, "bipolar": bipolar}


def make(a: Packed, b: Packed, *, shape: tuple[int, int], shift: Tensor | None = None, channels: Tensor | None = None, pivots: Tensor | None = None) -> Packed:
    """Join factors that were packed as "dense" or "bipolar"; `shape` is the dense (N, K)."""
    tensors: dict[str, Tensor] = {}
    if shift is not None:
        tensors["shift"] = shift.float().contiguous()
    for key, index in (("channels", channels), ("pivots", pivots)):
        if index is not None:
            tensors[key] = index.to(torch.int32).contiguous()
    packed = parts.join(name, version, shape, {"a": a, "b": b}, tensors, {"rank": b.shape[0]})
    validate(packed)
    return packed


def rest(pivots: Tensor, n: int) -> Tensor:
    """The rows of 0..n-1 that are no pivots, int64, in order."""
    free = torch.ones(n, dtype=torch.bool, device=pivots.device)
    free[pivots.long()] = False
    return free.nonzero()[:, 0]


def factor(packed: Packed, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of factor "a" or "b"."""
    p = parts.part(packed, key)
    return _PARTS[p.format].unpack(p, dtype)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) weight that the factors mean, multiplied in fp64 and rounded once."""
    a, b = (factor(packed, key).double() for key in ("a", "b"))
    channels, pivots, rank = packed.tensors.get("channels"), packed.tensors.get("pivots"), b.shape[0]
    if pivots is not None:
        w = b.new_empty(packed.shape)
        w[pivots.long()] = b
        w[rest(pivots, packed.shape[0])] = a @ b
        return w.to(dtype)
    w = a[:, :rank] @ b
    if channels is not None:
        w[:, channels.long()] += a[:, rank:]
    return w.to(dtype)


def part_bytes(about: dict[str, Any], n: Any, k: Any, number_bytes: int) -> sympy.Expr:
    """Bytes of a part that is (n, k); `number_bytes` is the width of dense values or of scales."""
    rows, columns = sympy.symbols("N K", positive=True, integer=True)
    given = {**about.get("attrs", {}), "value_bytes": number_bytes, "scale_bytes": number_bytes}
    return _PARTS[about["format"]].nbytes(**given).subs({rows: n, columns: k}, simultaneous=True)


def nbytes(
    *, rank: int, a: dict[str, Any], b: dict[str, Any], channels: int = 0, pivots: bool = False, shift: bool = False, number_bytes: int = 2, **_: Any
) -> sympy.Expr:
    """Stored bytes over the symbols N and K; a and b are the attributes of the parts."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    rows = n - rank if pivots else n
    index = 4 * (channels + (rank if pivots else 0)) + (4 * n if shift else 0)
    return part_bytes(a, rows, rank + channels, number_bytes) + part_bytes(b, rank, k, number_bytes) + index


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    (n, k), t = packed.shape, packed.tensors

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"low-rank weight {packed.shape}: {cause}", "the file is damaged or not from effllm; write it again")

    factors = {}
    for key in ("a", "b"):
        p = factors[key] = parts.part(packed, key)
        if p.format not in _PARTS:
            raise bad(f"factor {key} has the format {p.format!r}, not one of {sorted(_PARTS)}")
        _PARTS[p.format].validate(p)
    rank = packed.attrs.get("rank")
    if not isinstance(rank, int) or not 1 <= rank <= min(n, k):
        raise bad(f"its rank is {rank!r}")
    extra = {key for key in t if key.partition(".")[0] not in factors or "." not in key}
    if not extra <= {"shift", "channels", "pivots"} or set(parts.names(packed)) != {"a", "b"} or {"channels", "pivots"} <= extra:
        raise bad(f"its tensors are {sorted(t)}")
    shift, channels, pivots = (t.get(key) for key in ("shift", "channels", "pivots"))
    if shift is not None and (tuple(shift.shape) != (n,) or shift.dtype != torch.float32):
        raise bad(f"shift is {shift.dtype} {tuple(shift.shape)}")
    c = 0 if channels is None else channels.numel()
    for key, index, top, length in (("channels", channels, k, c), ("pivots", pivots, n, rank)):
        if index is not None:
            check_index(index, top, length, lambda cause, key=key: bad(f"{key} {cause}"), increasing=key == "pivots")
    want = {"a": (n - rank if pivots is not None else n, rank + c), "b": (rank, k)}
    for key, p in factors.items():
        if tuple(p.shape) != want[key]:
            raise bad(f"factor {key} is {tuple(p.shape)}, expected {want[key]}")


def check_index(index: Tensor, top: int, length: int, bad: Any, *, increasing: bool) -> None:
    """Raise `bad(cause)` unless an index is int32, one-dimensional, distinct, and within 0..top-1."""
    if index.dtype != torch.int32 or tuple(index.shape) != (length,) or not 1 <= length <= top:
        raise bad(f"is {index.dtype} {tuple(index.shape)}, expected int32 {(length,)} of at most {top}")
    if index.is_meta:
        return
    if int(index.min()) < 0 or int(index.max()) >= top:
        raise bad(f"has entries outside of 0..{top - 1}")
    steps = (index if increasing else index.sort().values).diff()
    if bool((steps <= 0).any()):
        raise bad("is not increasing" if increasing else "has an entry twice")
