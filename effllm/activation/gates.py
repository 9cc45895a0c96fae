"""CATS and CHESS over a model: thresholds of activated gates, and of the inputs of query and output projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effllm.activation.calibration import Cut, Gate, Plan, Site
from effllm.activation.record import Moment
from effllm.errors import CalibrationError
from effllm.methods import Activation
from effllm.solvers.activation import Histogram, thresholds

FUSED = "query, key and value are one matrix: keys and values need the whole input"


def scale(up: Moment) -> Tensor:
    """c_i of CHESS, fp32 (N,)."""
    return thresholds.channel_scale(up.square, up.count)


def solve(
    method: Activation, sites: Mapping[str, Site], gates: Mapping[str, Gate], inputs: Mapping[str, Histogram], acts: Mapping[str, Histogram],
    pooled: Mapping[str, Histogram], up: Mapping[str, Moment],
) -> Plan:  # fmt: skip
    """One threshold per layer (CATS) or per channel (CHESS); histograms by module, those of gates by their down projection."""
    plan = Plan(method)
    for down in gates:
        seen = (pooled if method.name == "chess" else acts)[down]
        theta = _scalar(seen, method.sparsity, down)
        t = thresholds.per_channel(scale(up[down]), theta) if method.name == "chess" else torch.full((sites[down].shape[1],), theta)
        realised = seen.share(theta) if theta >= 0 else 0.0
        plan.gates[down] = Cut(method.sparsity, realised, realised, {"threshold": t})
    for name, site in sites.items():
        if method.name != "chess" or not method.attention:
            continue
        if site.role in ("q", "o"):
            plan.inputs[name] = cut(inputs[name], method.sparsity, name)
        elif "q" in site.role and site.role != "q":
            plan.kept[name] = FUSED
    return plan


def cut(seen: Histogram, share: float, name: str) -> Cut:
    """One threshold for all inputs of a linear."""
    t = _scalar(seen, share, name)
    realised = seen.share(t) if t >= 0 else 0.0
    return Cut(share, realised, realised, {"threshold": torch.tensor([t])})


def _scalar(seen: Histogram, share: float, name: str) -> float:
    try:
        return thresholds.scalar(seen, share)
    except CalibrationError as error:
        raise CalibrationError(error.code, f"{name}: {error.cause}", error.next_step) from None
