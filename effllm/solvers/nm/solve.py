"""From a dense weight to a stored N:M or ARMOR one, as a recipe's NM parameters say."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.methods import NM, Bipolar
from effllm.runtime.formats import armor as armor_format
from effllm.runtime.formats import dense, nm
from effllm.runtime.formats.base import Packed
from effllm.solvers.moments import Moments
from effllm.solvers.nm.armor import armor
from effllm.solvers.nm.dsnot import dsnot
from effllm.solvers.nm.masks import magnitude, nm_mask, target, wanda
from effllm.solvers.nm.sparsegpt import sparsegpt, sparsegpt_quantized
from effllm.solvers.search import search


def solve(w: Tensor, params: NM, moments: Moments | None) -> Packed:
    """Pack w (N, K). Raises WeightError where the pattern or the block does not divide it, CalibrationError without what the solver needs."""
    n, m = params.keep, params.of_group
    dtype = w.dtype if w.dtype in dense.DTYPES else torch.float32
    coded = Bipolar(bits=params.bits, group=params.group) if params.bits < 16 else None

    def store(weight: Tensor, mask: Tensor | None) -> Packed:
        quantize = None if coded is None else lambda kept: search(kept.float(), coded)
        return nm.from_dense(weight, mask, n, m, dtype=dtype, quantize=quantize, pad=params.pad)

    if params.name == "armor":
        seen = _needed(params, moments)
        found = armor(w, seen, n, m, block=params.block)
        left, right = (t.reshape(-1, params.block).to(torch.bfloat16 if dtype == torch.float32 else dtype) for t in (found.left, found.right))
        return armor_format.make(store(found.core, found.mask), left, right)
    solver = params.solver if params.solver != "auto" else ("magnitude" if moments is None else "sparsegpt")
    if solver == "magnitude":
        wide = torch.nn.functional.pad(w, (0, -w.shape[1] % m)) if params.pad else w
        return store(w, nm_mask(magnitude(wide), n, m)[:, : w.shape[1]])
    seen = _needed(params, moments)
    if solver == "sparsegpt":
        aim = _aim(w, seen)
        if coded is not None:
            joint = sparsegpt_quantized(aim, seen, n, m, coded)
            return nm.make(joint.values, _columns(joint.mask), w.shape[1], n, m)
        done = sparsegpt(aim, seen, n, m)
        return store(done.weight, done.mask)
    score = wanda(w, seen)
    mask = nm_mask(score, n, m)
    return store(w, mask if solver == "wanda" else dsnot(w, seen, mask, score, pattern=(n, m)))


def _aim(w: Tensor, moments: Moments) -> Tensor:
    """What a weight that is updated aims at: the dense model's output where its inputs are known."""
    return w if moments.cross is None else target(w, moments).to(w.dtype)


def _columns(mask: Tensor) -> Tensor:
    """Columns (N, Kc) of a mask with equally many weights in each row."""
    return mask.nonzero()[:, 1].view(mask.shape[0], -1)


def _needed(params: NM, moments: Moments | None) -> Moments:
    if moments is None:
        raise CalibrationError("E-CAL-NONE", f"{params.label} needs calibration data", "pass calibration=, or use solver=magnitude")
    return moments


