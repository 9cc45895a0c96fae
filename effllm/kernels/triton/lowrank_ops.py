"""The graph ops `effllm_triton::lowrank*`, opaque to the compiler so that the dispatch on M stays inside, and the providers over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.kernels.triton import lowrank_bipolar_launch as coded
from effllm.kernels.triton import lowrank_launch as launch
from effllm.kernels.triton import ops
from effllm.kernels.triton.lowrank_cost import LowrankBipolarTritonTuning, LowrankTritonTuning
from effllm.lowering import lowrank_bipolar_linear, lowrank_linear
from effllm.lowering.lowrank_bipolar_linear import stages
from effllm.lowering.op import YES, Config, Problem, Provider, Verdict

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NAMES = ("float16", "bfloat16", "float32")


def _weights(a: list[Tensor], b: list[Tensor], pivots: list[Tensor]) -> list[launch.Weight]:
    return [launch.Weight(a[i], b[i], pivots[i] if pivots else None) for i in range(len(a))]


@torch.library.custom_op("effllm_triton::lowrank", mutates_args=(), device_types="cuda")
def lowrank(x: Tensor, a: list[Tensor], b: list[Tensor], channels: Tensor | None, pivots: list[Tensor], bias: Tensor | None) -> Tensor:
    """Dense factors of siblings (lowering/lowrank_linear.py), channels and bias of one alone: (..., sum of N) in x's dtype."""
    return launch.lowrank(x, _weights(a, b, pivots), channels, bias)


@lowrank.register_fake
def _(x, a, b, channels, pivots, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], sum(w.outputs for w in _weights(a, b, pivots)))


@torch.library.custom_op("effllm_triton::lowrank_bipolar", mutates_args=(), device_types="cuda")
def lowrank_bipolar(
    x: Tensor, a_codes: list[Tensor], a_scale: list[Tensor], a_minimum: list[Tensor], b_codes: list[Tensor], b_scale: list[Tensor],
    b_minimum: list[Tensor], pivots: Tensor | None, bias: Tensor | None, sizes: list[int], ranks: list[int],
    a_bits: int, a_group: int, a_zero: float, b_bits: int, b_group: int, b_zero: float,
) -> Tensor:  # fmt: skip
    """Bipolar factors of siblings (layout words), pivots and bias of one alone; `sizes` are the rows of each A: (..., sum of N) in x's dtype."""
    weights = []
    for i, (n, rank) in enumerate(zip(sizes, ranks, strict=True)):
        a = coded.Factor(a_codes[i], a_scale[i], a_minimum[i] if a_minimum else None, n, a_bits, a_group, a_zero)
        b = coded.Factor(b_codes[i], b_scale[i], b_minimum[i] if b_minimum else None, rank, b_bits, b_group, b_zero)
        weights.append((a, b))
    return coded.lowrank(x, weights, pivots, bias)


@lowrank_bipolar.register_fake
def _(x, ac, as_, am, bc, bs, bm, pivots, bias, sizes, ranks, a_bits, a_group, a_zero, b_bits, b_group, b_zero):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], sum(sizes) if pivots is None else pivots.shape[0])


def supports(problem: Problem) -> Verdict:
    """Whether the kernels of dense factors take a problem."""
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"activations of {problem.dtype}, the kernels take fp16, bf16 and fp32")
    detail = dict(problem.detail)
    if detail.get("factor", "bfloat16") not in _NAMES:
        return Verdict(False, f"factors of {detail['factor']}, the kernels take fp16, bf16 and fp32")
    if detail.get("pivoted") and detail.get("channels"):
        return Verdict(False, "rows with pivots beside channels of the input, the kernels take one of the two")
    if problem.n * max(problem.k, int(detail.get("rank", 0))) >= 2**31:
        return Verdict(False, "a factor has 2^31 values or more, past the kernels' 32-bit sizes")
    return YES


def supports_bipolar(problem: Problem) -> Verdict:
    """Whether the bipolar kernels take both stages."""
    for name, stage in zip(("first", "second"), stages(problem), strict=True):
        verdict = ops.supports(stage)
        if not verdict:
            return Verdict(False, f"the {name} stage: {verdict.reason}")
    return YES


def _how(x: Tensor, weights: list[launch.Weight], config: Config) -> launch.Plan:
    rows = x.numel() // max(1, x.shape[-1])
    return launch.plan(str(config["kind"]), rows, sum(w.b.shape[0] for w in weights), x.shape[-1], x.device)


def _one(
    x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, pivots: Tensor | None, bias: Tensor | None,
    problem: Problem | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The graph op, which chooses when it runs; with `config` (a tuner's, outside of graphs) the launch itself."""
    places = [] if pivots is None else [pivots]
    if config is None:
        return lowrank(x, [a], [b], channels, places, bias)
    weights = _weights([a], [b], places)
    return launch.lowrank(x, weights, channels, bias, how=_how(x, weights, config))


def _many(
    x: Tensor, a: list[Tensor], b: list[Tensor], pivots: list[Tensor], problem: Problem | None = None, config: Config | None = None
) -> Tensor:  # fmt: skip
    """As `_one`, for siblings."""
    if config is None:
        return lowrank(x, list(a), list(b), None, list(pivots), None)
    weights = _weights(a, b, pivots)
    return launch.lowrank(x, weights, how=_how(x, weights, config))


def _some(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def _bipolar(x, ac, as_, am, bc, bs, bm, pivots, bias, n, rank, *grids, problem=None, config=None):  # type: ignore[no-untyped-def]
    return lowrank_bipolar(x, [ac], [as_], _some(am), [bc], [bs], _some(bm), pivots, bias, [n], [rank], *grids)


def _bipolar_many(x, ac, as_, am, bc, bs, bm, *grids, problem=None, config=None):  # type: ignore[no-untyped-def]
    sizes, ranks = ([c.shape[1] for c in codes] for codes in (ac, bc))  # merged where they fill whole vectors
    return lowrank_bipolar(x, list(ac), list(as_), list(am), list(bc), list(bs), list(bm), None, None, sizes, ranks, *grids)


def register() -> None:
    """Add the provider "triton" to the low-rank ops; calling it again changes nothing."""
    dense, both = LowrankTritonTuning(), LowrankBipolarTritonTuning()
    calls: tuple[tuple[Any, Any], ...] = ((lowrank_linear.LOWRANK, _one), (lowrank_linear.LOWRANK_MANY, _many))
    for op, call in calls:
        op.register(Provider("triton", op.name, "cuda", "dense", supports, call, dense, late=True, rank=10))
    calls = ((lowrank_bipolar_linear.LOWRANK_BIPOLAR, _bipolar), (lowrank_bipolar_linear.LOWRANK_BIPOLAR_MANY, _bipolar_many))
    for op, call in calls:
        op.register(Provider("triton", op.name, "cuda", "words", supports_bipolar, call, both, late=True, rank=10))
