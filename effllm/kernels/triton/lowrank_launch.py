"""Run the low-rank kernels: one launch for a few rows, two products for many. No device query before the first call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from effllm.autotune import machines, use
from effllm.kernels.triton.lowrank import first_kernel, fused_kernel, second_kernel
from effllm.kernels.triton.lowrank_cost import LowrankTritonTuning
from effllm.kernels.triton.lowrank_gemm import stage_kernel
from effllm.lowering.lowrank_linear import problem_of

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
def choice(m: int, n: int, k: int, rank: int, channels: int, dtype: torch.dtype, factor: torch.dtype, device: torch.device) -> Plan:
    """What runs where the caller asks for nothing: the cost model's choice."""
    problem = problem_of("lowrank_linear", n, k, rank, factor, m=m, dtype=dtype, device=str(device), channels=channels)
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


def _few(x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, bias: Tensor | None, y: Tensor, how: Plan) -> None:
    (m, k), n, rank = x.shape, a.shape[0], b.shape[0]
    count = 0 if channels is None else channels.shape[0]
    workspace = torch.empty(how.split, m, rank, dtype=torch.float32, device=x.device)
    columns = triton.cdiv(triton.cdiv(k, how.split), how.bk) * how.bk
    rows = 1 if m == 1 else 2 if m == 2 else 4
    tiles = {"BR": how.br, "BK": how.bk, "MB": rows, "num_warps": how.warps}
    blocks = triton.cdiv(m, rows)
    counter = _counter(x.device) if how.kind == "fused" else None
    if counter is not None:
        sizes = (m, n, rank, count, k, x.stride(0), columns)
        fused_kernel[(how.programs,)](x, a, b, channels, bias, workspace, counter, y, *sizes, SPLIT=how.split, **tiles)
        return
    first_kernel[(blocks * triton.cdiv(rank, how.br) * how.split,)](x, b, workspace, m, rank, k, x.stride(0), columns, **tiles)
    second_kernel[(blocks * triton.cdiv(n, how.br),)](x, a, channels, bias, workspace, y, m, n, rank, count, x.stride(0), SPLIT=how.split, **tiles)


def _many(x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, bias: Tensor | None, y: Tensor, how: Plan) -> None:
    (m, k), n, rank = x.shape, a.shape[0], b.shape[0]
    count = 0 if channels is None else channels.shape[0]
    middle = torch.empty(m, rank, dtype=x.dtype, device=x.device)
    rows = triton.cdiv(m, how.bm)
    tiles = {"BM": how.bm, "BN": how.bn, "BK": how.bk, "STAGES": 2, "num_warps": how.warps}
    stage_kernel[(rows * triton.cdiv(rank, how.bn),)](x, x, b, None, None, middle, m, rank, k, 0, x.stride(0), x.stride(0), **tiles)
    stage_kernel[(rows * triton.cdiv(n, how.bn),)](middle, x, a, channels, bias, y, m, n, rank, count, rank, x.stride(0), **tiles)


def lowrank(
    x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, bias: Tensor | None, *, how: Plan | None = None, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x (..., K) to (..., N) in x's dtype. `how` overrides the choice; `out` (M, N) is written in place of a new tensor, so that tests can poison it."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    y = torch.empty(flat.shape[0], a.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    if y.numel():
        with torch.cuda.device_of(x):
            count = 0 if channels is None else channels.shape[0]
            chosen = how or choice(flat.shape[0], a.shape[0], flat.shape[1], b.shape[0], count, x.dtype, a.dtype, x.device)
            run = _many if chosen.kind == "dot" else _few
            run(flat, a.contiguous(), b.contiguous(), channels, None if bias is None else bias.contiguous(), y, chosen)
    return y.reshape(*x.shape[:-1], a.shape[0])
