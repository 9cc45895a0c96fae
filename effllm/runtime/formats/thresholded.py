"""A weight some of whose products are skipped: small inputs, or outputs that a small gate would multiply.

Layout (version 1):

    weight.*    part, dense or bipolar   (N, K)
    threshold   fp32 (1,) or (K,)  inputs with |x_k| at most this are skipped; -1 skips none    (side "in")
    colnorm     fp32 (K,)  optional: |x_k| colnorm_k is compared instead
    u, v        floating point (N, r), (r, K)  optional, side "in": skipped inputs go through u v

attrs: side "in" or "out" ("out": the projection whose outputs a gate multiplies; the thresholds belong to the gate), limit (calls of
more rows are dense, -1: none is), method, target and realised sparsity. The dense value is that of the weight.

Sources: TEAL (arXiv 2408.14690), CATS (arXiv 2404.08763), CHESS (arXiv 2409.01366), R-Sparse (arXiv 2504.19449)."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime.formats import bipolar, dense, parts
from effllm.runtime.formats.base import Packed

name = "thresholded"
version = 1
tensor_names: tuple[str, ...] = ("weight", "threshold", "colnorm", "u", "v")
LIMIT = 4  # rows up to which skipping pays
_PARTS = {"dense": dense, "bipolar": bipolar}


def make(
    weight: Packed, threshold: Tensor | None, *, colnorm: Tensor | None = None, u: Tensor | None = None, v: Tensor | None = None,
    side: str = "in", limit: int = LIMIT, method: str = "", target: float = 0.0, realised: float = 0.0,
) -> Packed:  # fmt: skip
    """Join a dense or bipolar weight (N, K) with its thresholds."""
    tensors = {key: t for key, t in (("threshold", threshold), ("colnorm", colnorm), ("u", u), ("v", v)) if t is not None}
    if threshold is not None:
        tensors["threshold"] = threshold.detach().float().reshape(-1).contiguous()
    attrs = {"side": side, "limit": limit, "method": method, "target": float(target), "realised": float(realised)}
    packed = parts.join(name, version, weight.shape, {"weight": weight}, tensors, attrs)
    validate(packed)
    return packed


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (N, K) weight behind the thresholds."""
    p = parts.part(packed, "weight")
    found: Tensor = _PARTS[p.format].unpack(p, dtype)
    return found


def nbytes(*, weight: dict[str, Any], rank: int = 0, thresholds: int = 1, number_bytes: int = 2, **_: Any) -> sympy.Expr:
    """Stored bytes over the symbols N and K; `weight` are the attributes of the part, `thresholds` their count."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    given = {**weight.get("attrs", {}), "value_bytes": number_bytes, "scale_bytes": number_bytes}
    return _PARTS[weight["format"]].nbytes(**given) + rank * (n + k) * number_bytes + 4 * thresholds


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    (n, k), t, a = packed.shape, packed.tensors, packed.attrs

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"thresholded weight {packed.shape}: {cause}", "the file is damaged or not from effllm; write it again")

    p = parts.part(packed, "weight")
    if p.format not in _PARTS or tuple(p.shape) != (n, k):
        raise bad(f"its weight has the format {p.format!r} and the shape {tuple(p.shape)}")
    _PARTS[p.format].validate(p)
    if a.get("side") not in ("in", "out") or type(a.get("limit")) is not int or a["limit"] < -1:
        raise bad(f"side={a.get('side')!r}, limit={a.get('limit')!r}")
    own = {key: x for key, x in t.items() if "." not in key}
    one_sided = ("threshold" in own) == (a["side"] == "in") and not (a["side"] == "out" and own)
    if set(own) - {"threshold", "colnorm", "u", "v"} or not one_sided or ("u" in own) != ("v" in own):
        raise bad(f"its tensors are {sorted(t)}")
    if "threshold" in own and (own["threshold"].dtype != torch.float32 or tuple(own["threshold"].shape) not in ((1,), (k,))):
        raise bad(f"threshold is {own['threshold'].dtype} {tuple(own['threshold'].shape)}")
    if "colnorm" in own and (own["colnorm"].dtype != torch.float32 or tuple(own["colnorm"].shape) != (k,)):
        raise bad(f"colnorm is {own['colnorm'].dtype} {tuple(own['colnorm'].shape)}")
    if "threshold" in own and not own["threshold"].is_meta and bool(own["threshold"].isnan().any()):
        raise bad("a threshold is NaN")
    if "u" in own and (own["u"].dim() != 2 or tuple(own["v"].shape) != (own["u"].shape[1], k) or own["u"].shape[0] != n):
        raise bad(f"u is {tuple(own['u'].shape)}, v is {tuple(own['v'].shape)}")
    if "u" in own and not (own["u"].dtype in dense.DTYPES and own["u"].dtype == own["v"].dtype):
        raise bad(f"u is {own['u'].dtype}, v is {own['v'].dtype}")
