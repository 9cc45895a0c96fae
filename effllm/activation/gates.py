"""CATS and CHESS over a model: thresholds of activated gates, and of the inputs of query and output projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from effllm.activation.calibration import Cut, Gate, Plan, Site
from effllm.activation.record import Moment
from effllm.errors import CalibrationError
from effllm.methods import Activation
from effllm.solvers.activation import Histogram, rsparse, thresholds

FUSED = "query, key and value are one matrix: keys and values need the whole input"


def scale(up: Moment, down: Tensor | None = None) -> Tensor:
    """c_i of CHESS, fp32 (N,); with `down` (out, N) times the norm of its column i, by which the block's output feels the channel."""
    c = thresholds.channel_scale(up.square, up.count)
    return c if down is None else c * rsparse.norms(down).to(c.device)


def solve(
    method: Activation, sites: Mapping[str, Site], gates: Mapping[str, Gate], inputs: Mapping[str, Histogram], acts: Mapping[str, Histogram],
    weighted: Mapping[str, Histogram], pooled: Mapping[str, Histogram], scales: Mapping[str, Tensor], norms: Callable[[str], Tensor],
    shares: Mapping[str, float],
) -> Plan:  # fmt: skip
    """One threshold per layer (CATS) or per channel (CHESS); histograms by module, those of gates by their down projection.

    inputs and weighted: of |x|, and of |x| times the norm of its column, which `norms` gives by module; acts and pooled: of activated gates, and of those
    times `scales`. shares: of modules that do not get the method's sparsity.
    """
    plan = Plan(method)
    for down in gates:
        seen = (pooled if method.name == "chess" else acts)[down]
        share = shares.get(down, method.sparsity)
        theta = _scalar(seen, share, down)
        t = thresholds.per_channel(scales[down], theta) if method.name == "chess" else torch.full((sites[down].shape[1],), theta)
        realised = seen.share(theta) if theta >= 0 else 0.0
        plan.gates[down] = Cut(share, realised, realised, {"threshold": t})
    for name, site in sites.items():
        if method.name != "chess" or not method.attention:
            continue
        if site.role in ("q", "o"):
            seen = (weighted if method.weigh else inputs)[name]
            plan.inputs[name] = cut(seen, shares.get(name, method.sparsity), name, norms(name) if method.weigh else None)
        elif "q" in site.role and site.role != "q":
            plan.kept[name] = FUSED
    return plan


def cut(seen: Histogram, share: float, name: str, norm: Tensor | None = None) -> Cut:
    """One threshold for all inputs of a linear; for inputs times `norm` (K,), where given."""
    t = _scalar(seen, share, name)
    realised = seen.share(t) if t >= 0 else 0.0
    return Cut(share, realised, realised, {"threshold": torch.tensor([t])} | ({} if norm is None else {"norm": norm}))


def _scalar(seen: Histogram, share: float, name: str) -> float:
    try:
        return thresholds.scalar(seen, share)
    except CalibrationError as error:
        raise CalibrationError(error.code, f"{name}: {error.cause}", error.next_step) from None
