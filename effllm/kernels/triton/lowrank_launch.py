"""Run the low-rank kernels: one launch for a few rows of up to four siblings, two products a sibling for many. No device query before the first call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from effllm.autotune import machines, use
from effllm.kernels.triton.lowrank import lowrank_kernel
from effllm.kernels.triton.lowrank_cost import LowrankTritonTuning
from effllm.kernels.triton.lowrank_gemm import stage_kernel
from effllm.lowering.lowrank_linear import problem_of

SIBLINGS = 4  # that one launch takes; more run as several

_counters: dict[tuple[torch.device, int], Tensor] = {}


@dataclass(frozen=True)
class Plan:
    """One way to run a problem. kind "fused" (one launch), "apart" (two) or "dot" (two products on the matrix cores).

    Few rows: tiles of `br` rows by `bk` columns, `split` shares of the first stage. Many: tiles (bm, bn, bk).
    """

    kind: str
    br: int = 16
    bk: int = 128
    split: int = 1
    programs: int = 1
    bm: int = 64
    bn: int = 64
    warps: int = 4


def plan(kind: str, m: int, rank: int, k: int, device: torch.device) -> Plan:
    """Tiles of a kind. Splits so that the first stage, which has the fewer rows, gives two items to every multiprocessor."""
    if kind == "dot":
        return Plan(kind, bm=64 if m > 32 else 16, bk=64 if m > 32 else 128)
    sms = int(machines.gpu(str(device))["sms"])
    tiles = triton.cdiv(rank, 16)
    split = max(1, min(8, 2 * sms // tiles, k // 512))  # equal shares of at least two tiles of columns
    return Plan(kind, bk=256 if m == 1 else 128, split=split, programs=2 * sms)


@functools.lru_cache(maxsize=4096)
def choice(
    m: int, n: int, k: int, rank: int, channels: int, second: int, pivoted: bool, many: bool, dtype: torch.dtype, factor: torch.dtype, device: torch.device
) -> Plan:  # fmt: skip
    """What runs where the caller asks for nothing: the cost model's choice. `second` is the number of values of the second factors."""
    op = "lowrank_linear_many" if many else "lowrank_linear"
    problem = problem_of(op, n, k, rank, factor, m=m, dtype=dtype, device=str(device), channels=channels, second=second, pivoted=pivoted)
    return plan(str(LowrankTritonTuning().first(problem)["kind"]), m, rank, k, device)


def _counter(device: torch.device) -> Tensor | None:
    """Two zeros per stream, made once: launches of one stream run one after another. None in a capture that no call on its stream preceded,
    whose zeros would be written by the graph's replays alone.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        found = _counters[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
    return found


use.on_forget(choice.cache_clear)


@dataclass(frozen=True)
class Weight:
    """One of the siblings: a (N, R + C), or (N - R, R) with pivots (N) int64; b (R, K)."""

    a: Tensor
    b: Tensor
    pivots: Tensor | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return int(self.a.shape[0]) + (0 if self.pivots is None else int(self.b.shape[0]))


def _few(x: Tensor, weights: Sequence[Weight], channels: Tensor | None, bias: Tensor | None, y: Tensor, how: Plan) -> None:
    m, k = x.shape
    ranks = [w.b.shape[0] for w in weights]
    sizes = [w.a.shape[0] for w in weights]
    workspace = torch.empty(how.split, m, sum(ranks), dtype=torch.float32, device=x.device)
    columns = triton.cdiv(triton.cdiv(k, how.split), how.bk) * how.bk
    rows = 1 if m == 1 else 2 if m == 2 else 4
    absent = [None] * (SIBLINGS - len(weights))
    lists = [*(w.a for w in weights), *absent, *(w.b for w in weights), *absent, *(w.pivots for w in weights), *absent]
    none = [0] * len(absent)
    count = 0 if channels is None else channels.shape[0]
    numbers = [m, *sizes, *none, *ranks, *none, count, k, x.stride(0), columns, sum(ranks), y.stride(0)]
    tiles = {"BR": how.br, "BK": how.bk, "MB": rows, "SPLIT": how.split, "num_warps": how.warps}

    def launch(grid: int, counter: Tensor | None, part: int) -> None:
        lowrank_kernel[(grid,)](x, *lists, channels, bias, workspace, counter, y, *numbers, PART=part, **tiles)

    counter = _counter(x.device) if how.kind == "fused" else None
    if counter is not None:
        launch(how.programs, counter, 0)
        return
    blocks = triton.cdiv(m, rows)
    launch(blocks * how.split * sum(triton.cdiv(r, how.br) for r in ranks), None, 1)
    copies = sum(m * triton.cdiv(w.b.shape[0], how.bk) for w in weights if w.pivots is not None)
    launch(blocks * sum(triton.cdiv(n, how.br) for n in sizes) + copies, None, 2)


def _many(x: Tensor, weights: Sequence[Weight], channels: Tensor | None, bias: Tensor | None, y: Tensor, how: Plan) -> None:
    m, k = x.shape
    count = 0 if channels is None else channels.shape[0]
    rows = triton.cdiv(m, how.bm)
    tiles = {"BM": how.bm, "BN": how.bn, "BK": how.bk, "STAGES": 2, "num_warps": how.warps}
    for weight in weights:
        a, b, pivots = weight.a, weight.b, weight.pivots
        n, rank = a.shape[0], b.shape[0]
        middle = torch.empty(m, rank, dtype=x.dtype, device=x.device)
        grid = (rows * triton.cdiv(rank, how.bn),)
        places: tuple[Tensor | None, ...] = (None, None, None, None) if pivots is None else (pivots[:rank], bias, y, pivots[rank:])
        stage_kernel[grid](
            x, x, b, None, *places[:2], middle, places[2], m, rank, k, 0, x.stride(0), x.stride(0), rank, y.stride(0), **tiles
        )  # fmt: skip
        grid = (rows * triton.cdiv(n, how.bn),)
        stage_kernel[grid](
            middle, x, a, channels, places[3], bias, y, None, m, n, rank, count, rank, x.stride(0), y.stride(0), 0, **tiles
        )  # fmt: skip
        y = y[:, weight.outputs :]


def lowrank(
    x: Tensor, weights: Sequence[Weight], channels: Tensor | None = None, bias: Tensor | None = None, *, how: Plan | None = None, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x (..., K) through siblings, their outputs side by side (..., sum of N) in x's dtype; `channels` and `bias` are of a weight alone.

    `how` overrides the choice; `out` (M, N) is written in place of a new tensor, so that tests can poison it.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    m, n = flat.shape[0], sum(w.outputs for w in weights)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
    if y.numel():
        with torch.cuda.device_of(x):
            chosen = how or _chosen(flat, weights, n, channels)
            ready = [Weight(w.a.contiguous(), w.b.contiguous(), None if w.pivots is None else w.pivots.contiguous()) for w in weights]
            rest = (None if channels is None else channels.contiguous(), None if bias is None else bias.contiguous())
            at = 0
            for first in range(0, len(ready), SIBLINGS):
                some = ready[first : first + SIBLINGS]
                (_many if chosen.kind == "dot" else _few)(flat, some, *rest, y[:, at:], chosen)
                at += sum(w.outputs for w in some)
    return y.reshape(*x.shape[:-1], n)


def _chosen(x: Tensor, weights: Sequence[Weight], n: int, channels: Tensor | None) -> Plan:
    (m, k), first = x.shape, weights[0]
    second = sum(w.a.numel() for w in weights)
    about = (second, first.pivots is not None, len(weights) > 1, x.dtype, first.a.dtype, x.device)
    return choice(m, n, k, sum(w.b.shape[0] for w in weights), 0 if channels is None else channels.shape[0], *about)
