"""ARMOR: an N:M core between two block-diagonal matrices, W = A S B.

    core    part nm     (N, K)         S, with dense or bipolar-INT values
    left    part dense  (N, d)         A: row r of block r // d; column c of a block is column (r // d) d + c of A
    right   part dense  (K, d)         B, the same for the K inputs

d divides N and K. The row norms of the normalised weight are folded into A and its column norms into B, so W is what is stored,
without further scales. A = B = identity is plain N:M.

Source: ARMOR (its form after export).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError, WeightError
from effllm.runtime.formats import dense, nm, parts
from effllm.runtime.formats.base import Packed

name = "armor"
version = 1
tensor_names: tuple[str, ...] = (*(f"core.{t}" for t in nm.tensor_names), "left.values", "right.values")


def make(core: Packed, left: Tensor, right: Tensor) -> Packed:
    """Store A, S and B: `core` an nm weight (N, K), `left` (N, d) and `right` (K, d) the rows of the blocks.

    Raises WeightError (E-WGT-BLOCK) where the block size does not divide both sides or the shapes do not fit.
    """
    rows, k = core.shape
    d = left.shape[-1]
    if left.shape != (rows, d) or right.shape != (k, d) or not d or rows % d or k % d:
        cause = f"blocks {tuple(left.shape)} and {tuple(right.shape)} around a core {core.shape}"
        raise WeightError("E-WGT-BLOCK", cause, "give (N, d) and (K, d) with one block size d that divides N and K")
    packed = parts.join(name, version, core.shape, {"core": core, "left": dense.make(left), "right": dense.make(right)}, attrs={"block": d})
    validate(packed)
    return packed


def blocks(values: Tensor) -> Tensor:
    """Rows (R, d) of a block-diagonal matrix as its blocks (R / d, d, d)."""
    return values.reshape(-1, values.shape[1], values.shape[1])


def product(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """A S B (N, K) of blocks' rows (N, d), a dense core (N, K) and blocks' rows (K, d)."""
    (n, k), d = core.shape, left.shape[1]
    a_s = torch.bmm(blocks(left), core.reshape(n // d, d, k)).reshape(n, k // d, d)
    return torch.einsum("nbi,bij->nbj", a_s, blocks(right)).reshape(n, k)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) product, computed in fp64 and rounded once."""
    a, b = (dense.unpack(parts.part(packed, key), torch.float64) for key in ("left", "right"))
    return product(a, nm.unpack(parts.part(packed, "core"), torch.float64), b).to(dtype)


def nbytes(*, block: int, wrapper_bytes: int = 2, **core: Any) -> sympy.Expr:
    """Stored bytes over the symbols N and K; the other keywords are those of the core (formats.nm.nbytes)."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    return nm.nbytes(**core) + (n + k) * block * wrapper_bytes


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    core, left, right = (parts.part(packed, key) for key in ("core", "left", "right"))
    (n, k), d = packed.shape, packed.attrs.get("block")

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"ARMOR weight {packed.shape}: {cause}", "the file is damaged or not from effllm; write it again")

    if core.format != nm.name or core.shape != packed.shape:
        raise bad(f"its core is {core.format} {core.shape}")
    if not isinstance(d, int) or d < 1 or n % d or k % d:
        raise bad(f"its block size is {d!r}")
    nm.validate(core)
    for key, part, rows in (("left", left, n), ("right", right, k)):
        dense.validate(part)
        if part.shape != (rows, d):
            raise bad(f"{key} has shape {part.shape}, expected {(rows, d)}")
