"""Run the Monarch kernels: workspace and barrier counters, one or two launches, y out. No device query before the first call."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from effllm.autotune import use
from effllm.kernels.triton.monarch_choose import MonarchTiles, MonarchTritonTuning
from effllm.kernels.triton.monarch_gemm import first_gemm, second_gemm
from effllm.kernels.triton.monarch_gemv import first_kernel, fused_kernel, second_kernel
from effllm.lowering.bipolar_linear import provider
from effllm.lowering.monarch_linear import detail
from effllm.lowering.op import Config, Problem

SLOTS = 1 << 14  # pairs of counters of a device

_counters: dict[torch.device, Tensor] = {}
_slots: dict[tuple[torch.device, int], int] = {}  # of streams, for eager calls
_captured: dict[torch.device, int] = {}  # next slot for a call in a graph, from the end
_chosen: dict[tuple[object, ...], MonarchTiles] = {}
use.on_forget(_chosen.clear)


def counter(device: torch.device) -> Tensor:
    """Two int32 that are zero and that no launch which may overlap with the next one uses.

    Eager calls of a stream follow one another and share a pair. A captured call gets a pair of its own, since graphs of one stream may
    be replayed side by side; after SLOTS of them the pairs are used again. Without a GPU (the interpreter) a new pair each time.
    """
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    pool = _counters.get(device)
    if pool is None:
        pool = torch.zeros(SLOTS, 2, dtype=torch.int32, device=device)
        if capturing:  # belongs to the graph, which then clears it at each replay
            return pool[0]
        torch.cuda.synchronize(device)  # cleared before any stream uses it
        _counters[device] = pool
    if capturing:
        at = _captured.get(device, SLOTS - 1)
        _captured[device] = at - 1 if at > SLOTS // 2 else SLOTS - 1
        return pool[at]
    stream = (device, torch.cuda.current_stream(device).cuda_stream)
    return pool[_slots.setdefault(stream, len(_slots) % (SLOTS // 2))]


def run(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, y: Tensor, tiles: MonarchTiles, blocks_in: int, blocks_out: int, strided: bool,
    programs: int = 0,
) -> None:  # fmt: skip
    """Launch the kernels of a configuration: x (M, K) with unit inner stride to y (M, N). `programs` overrides the single launch's grid."""
    (m, k), n, p = x.shape, y.shape[1], w1.shape[1]
    t, s = w1.shape[0] // (blocks_in * blocks_out), w2.shape[0] // blocks_out
    bias = None if bias is None else bias.contiguous()
    inner, sizes = blocks_in * t, (t, blocks_in, blocks_out)
    first, second = blocks_in * triton.cdiv(blocks_out * t, tiles.bn), blocks_out * triton.cdiv(s, tiles.bn)
    shape = {"BN": tiles.bn, "BK": tiles.bk, "STAGES": tiles.stages}
    more = {"num_warps": tiles.warps}
    if tiles.kind == "gemm":
        z = torch.empty(blocks_out, m, inner, dtype=x.dtype, device=x.device)
        rows = triton.cdiv(m, tiles.bm)
        w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
        first_gemm[(rows * first,)](x, w1, z, m, k, p, *sizes, x.stride(0), **shape, BM=tiles.bm, **more)
        second_gemm[(rows * second,)](z, w2, bias, y, m, n, s, *sizes, STRIDED=strided, **shape, BM=tiles.bm, **more)
        return
    z = torch.empty(m, blocks_out, inner, dtype=torch.float32, device=x.device)
    if tiles.kind == "pair":
        rows = triton.cdiv(m, tiles.bm)
        first_kernel[(first, rows)](x, w1, z, m, k, p, *sizes, x.stride(0), **shape, MB=tiles.bm, **more)
        second_kernel[(second, rows)](z, w2, bias, y, m, n, s, *sizes, STRIDED=strided, **shape, MB=tiles.bm, **more)
        return
    count = programs or _programs(x.device, tiles.each, max(first, second))
    # a cooperative launch fails where not all programs fit at once, instead of waiting for ever
    cooperative = {"launch_cooperative_grid": True} if x.is_cuda else {}
    fused_kernel[(count,)](
        x, w1, w2, bias, z, y, counter(x.device), m, n, k, p, s, *sizes, x.stride(0), count, STRIDED=strided, **shape, MB=tiles.bm, **more, **cooperative
    )


def _programs(device: torch.device, each: int, tiles: int) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs programs one after another: none could wait for the next
    return max(1, min(tiles, each * int(torch.cuda.get_device_properties(device).multi_processor_count)))


def choice(x: Tensor, w1: Tensor, n: int, blocks_in: int, blocks_out: int, strided: bool) -> MonarchTiles:
    """What runs a call where the caller asks for nothing: by the store, else by the model; CPU tensors (the interpreter) never reach the store."""
    rank = w1.shape[0] // (blocks_in * blocks_out)
    m = x.shape[0]
    planned = m if m <= 8 else 1 << (m - 1).bit_length()
    key = (planned, n, x.shape[1], blocks_in, blocks_out, rank, strided, x.dtype, w1.dtype, x.device)
    found = _chosen.get(key)
    if found is None:
        sizes = detail(blocks_in, blocks_out, rank, strided, str(w1.dtype).removeprefix("torch."))
        problem = Problem("monarch_linear", n, x.shape[1], 0, 0, False, m=planned, dtype=x.dtype, device=str(x.device), detail=sizes)
        config = use.choose(provider(problem.op, "triton"), problem).config if x.is_cuda else None
        found = _chosen[key] = MonarchTiles(**(config or MonarchTritonTuning().first(problem)))
    return found


def linear(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool,
    config: Config | MonarchTiles | None = None, out: Tensor | None = None, programs: int = 0,
) -> Tensor:  # fmt: skip
    """x (..., K) through dense Monarch factors: (..., N) in x's dtype. `config` overrides the choice; `out` (M, N) is written in place."""
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    if flat.stride(-1) != 1 and k > 1:
        flat = flat.contiguous()
    y = torch.empty(flat.shape[0], n, dtype=x.dtype, device=x.device) if out is None else out
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device; no effect on CPU tensors
            tiles = config if isinstance(config, MonarchTiles) else None if config is None else MonarchTiles(**config)
            tiles = tiles or choice(flat, w1, n, blocks_in, blocks_out, strided)
            run(flat, w1.contiguous(), w2.contiguous(), bias, y, tiles, blocks_in, blocks_out, strided, programs)
    return y.reshape(*x.shape[:-1], n)
