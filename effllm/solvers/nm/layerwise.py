"""A pattern of its own for every block of a model: which n of n:m each gets, at an equal number of weights kept.

`ratios.py` says what share each block should lose; here that becomes whole numbers n whose weighted mean is the recipe's, and blocks that
lose nothing stay dense. All linears of a block have one n, so that siblings can still run as one.

    farms      by the mean tail exponent of the block's matrices (arXiv 2506.06280)
    essential  by what one global magnitude threshold takes from the block (arXiv 2306.03805)
    knee       as essential, but no more than goes before the model's loss rises sharply: the loss on calibration windows is measured for
               magnitude masks of m - 1, ..., n of every m, and n is raised to the knee of that curve
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError
from effllm.runtime import dense
from effllm.solvers import blocks
from effllm.solvers.nm import ratios
from effllm.solvers.nm.masks import magnitude, nm_mask

_WINDOWS = 4  # that the knee is measured on
_STEPS = 3  # windows per axis of a matrix for FARMS: more make no steadier exponent here


def whole(shares: Mapping[str, float], sizes: Mapping[str, int], n: int, m: int) -> dict[str, int]:
    """n per block from the share that each loses: 1 to m, and the total kept is n / m of all weights as nearly as whole numbers allow.

    shares, sizes: by block. Rounded down, then raised (or lowered) where rounding took most (least), until no step
    comes nearer to the total.
    """
    exact = {b: (1 - share) * m for b, share in shares.items()}
    found = {b: min(max(int(x), 1), m) for b, x in exact.items()}
    budget = n * sum(sizes.values())
    left = budget - sum(found[b] * sizes[b] for b in found)
    while True:  # every step comes nearer to the total, so this ends
        up = left > 0
        fits = [b for b in found if sizes[b] < 2 * abs(left) and (found[b] < m if up else found[b] > 1)]
        if not fits:
            return found
        best = max(fits, key=lambda b: (exact[b] - found[b]) * (1 if up else -1))
        found[best] += 1 if up else -1
        left -= sizes[best] if up else -sizes[best]


def per_module(model: nn.Module, modules: Mapping[str, nn.Module], n: int, m: int, how: str, calibration: Any = None) -> tuple[dict[str, int], str]:
    """n for every module of `modules` (name -> Linear or Conv1D), and a line on how it came out.

    how: "uniform", "farms", "essential" or "knee"; modules outside of the model's lists of blocks count as one block each. Raises
    RecipeError (E-RCP-RATIO) where a block would be emptied, CalibrationError where the knee has no data.
    """
    groups: dict[str, list[str]] = {}
    lists = blocks.lists(model, modules)
    for name in modules:
        prefix = next((p for p in lists if name.startswith(f"{p}.")), None)
        groups.setdefault(name if prefix is None else ".".join(name.split(".")[: prefix.count(".") + 2]), []).append(name)
    weights = {name: dense.matrix(module).detach() for name, module in modules.items()}
    sizes = {b: sum(weights[name].numel() for name in names) for b, names in groups.items()}
    note = ""
    if how == "knee":
        n, note = _knee(model, modules, n, m, calibration)
    ratio = 1 - n / m
    if how == "uniform":
        shares = ratios.uniform(sizes, ratio)
    elif how == "farms":
        alphas = {b: _mean([ratios.farms_alpha(weights[name], steps=_STEPS) for name in names]) for b, names in groups.items()}
        shares = ratios.farms(alphas, sizes, ratio)
    else:
        shares = ratios.essential({b: torch.cat([weights[name].flatten() for name in names]) for b, names in groups.items()}, ratio)
    found = whole(shares, sizes, n, m)
    counts = {x: sum(v == x for v in found.values()) for x in sorted(set(found.values()), reverse=True)}
    text = f"{how}: " + ", ".join(f"{count} blocks {x}:{m}" for x, count in counts.items())
    return {name: found[b] for b, names in groups.items() for name in names}, f"{note}{text}"


def _mean(values: list[float]) -> float:
    finite = [v for v in values if v != float("inf")]
    return sum(finite) / len(finite) if finite else 1e3  # nothing but equal values: light tails


def _knee(model: nn.Module, modules: Mapping[str, nn.Module], n: int, m: int, calibration: Any) -> tuple[int, str]:
    """The n, not below the recipe's, at the knee of the loss over sparsity, and the curve as text."""
    if calibration is None:
        raise CalibrationError("E-CAL-NONE", "the knee of a model's loss needs calibration data", "pass calibration=, or ratios=essential")
    windows = blocks.batches(calibration)[:_WINDOWS]
    kept = list(range(m, n - 1, -1))
    losses = []
    for keep in kept:
        with _masked(modules, keep, m):
            losses.append(_loss(model, windows))
    curve = ", ".join(f"{k}:{m} {loss:.2f}" for k, loss in zip(kept, losses, strict=True))
    if len(kept) < 3:
        return n, f"loss {curve} (too few points for a knee); "
    place = ratios.knee([1 - k / m for k in kept], [-loss for loss in losses])
    found = max(n, round((1 - place) * m))
    return found, f"loss {curve}, knee at {found}:{m}; "


@contextmanager
def _masked(modules: Mapping[str, nn.Module], n: int, m: int) -> Iterator[None]:
    """Magnitude masks on the modules' weights for a while."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for module in modules.values():
                w = dense.matrix(module)
                saved.append((w, w.detach().clone()))
                wide = nn.functional.pad(w, (0, -w.shape[1] % m))
                w.mul_(nm_mask(magnitude(wide), n, m)[:, : w.shape[1]])
        yield
    finally:
        with torch.no_grad():
            for w, old in reversed(saved):
                w.copy_(old)


@torch.no_grad()
def _loss(model: nn.Module, windows: list[blocks.Batch]) -> float:
    """Mean cross entropy of the next token in nats over windows of token ids."""
    total, count = 0.0, 0
    for batch in windows:
        ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape[-1] < 2:
            raise CalibrationError("E-CAL-FORM", "the knee of a model's loss needs windows of token ids", "pass token ids (windows, length)")
        result = model(ids) if isinstance(batch, Tensor) else model(**{k: v for k, v in batch.items() if k != "labels"})
        logits = result.logits if hasattr(result, "logits") else result
        total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return total / count
