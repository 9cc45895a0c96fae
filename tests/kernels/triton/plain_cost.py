"""The price of a configuration in plain Python, written without sympy: what cost.py's expressions are compared with."""

from __future__ import annotations

import math

import torch

from effllm.autotune.gpus import Gpu
from effllm.kernels.triton.config import Tiles
from effllm.lowering.op import Problem

GEMV_ISSUE: dict[int, float] = {8: 5.2, 4: 3.9, 2: 3.3, 1: 2.95}


def parts(bits: int) -> list[int]:
    return [p for p in (8, 4, 2, 1) if bits & p]


def sizes(problem: Problem) -> tuple[int, int]:
    """Bytes of an element of the activation and of the output."""
    out = 4 if problem.dtype == torch.float32 else 2
    return (1 if problem.act == "a8" else out), out


def weight_bytes(problem: Problem) -> float:
    scale = 4 if problem.scale_dtype == torch.float32 else 2
    return problem.n * problem.k * (problem.bits / 8 + scale * (2 if problem.affine else 1) / (problem.group or problem.k))


def instructions(problem: Problem, config: Tiles) -> float:
    weights, m = problem.n * problem.k, problem.m or 1
    if config.kind == "gemv":
        wide = 0.4 if sizes(problem)[0] == 4 else 0.0
        per_weight = sum(GEMV_ISSUE[p] + wide + 1.95 * (config.bm - 1) for p in parts(problem.bits))
        return weights * per_weight * -(-m // config.bm)
    if config.kind == "gemm":
        per_weight = 2.0 * len(parts(problem.bits)) + (1.5 if len(parts(problem.bits)) > 1 else 0.0) + 1.0
        return weights * per_weight * -(-m // config.bm)
    return weights * (2.0 * len(parts(problem.bits)) + 3.0)


def seconds(problem: Problem, config: Tiles, gpu: Gpu) -> float:
    m, n, k = problem.m or 1, problem.n, problem.k
    act, out = sizes(problem)
    issue, weight = gpu.sms * 128 * gpu.clock, weight_bytes(problem)
    flops = 2.0 * m * n * k
    if config.kind == "dense":
        mma = gpu.mma16 if act == 2 else gpu.sms * 128 * 2 * gpu.clock
        unpack = max((weight + n * k * act) / gpu.bandwidth, instructions(problem, config) / issue)
        near = n * k * act <= gpu.l2 / 2
        product = max((n * k * act * (0.3 if near else 1.0) + m * (k + n) * act) / gpu.bandwidth, flops / (0.7 * mma))
        return unpack + product + 2 * gpu.call
    programs = -(-m // config.bm) * -(-n // config.bn) * config.split
    tile = config.bk * config.bn * problem.bits / 8
    threads = config.warps * 32
    gemv_held = 2.5 * config.bm * config.bk * parts(problem.bits)[0] / 32 * config.bn
    held = 32 + (gemv_held if config.kind == "gemv" else 2.0 * config.bm * config.bn) / threads
    resident = max(1, min(64 // config.warps, int(65536 / (min(held, 255) * threads))))
    if config.kind == "gemm":
        shared = config.stages * (tile + config.bm * config.bk * act) + config.bk * config.bn * act
        resident = max(1, min(resident, int(gpu.smem // max(shared, 1))))
    here = min(resident, math.ceil(programs / gpu.sms))
    need = gpu.bandwidth * gpu.latency / gpu.sms
    used = min(1.0, here * max(config.stages, 1) * tile / need)
    traffic = weight + m * k * act + m * n * (out if config.split == 1 else 8 * config.split + out)
    traffic += weight * (-(-m // config.bm) - 1) / 3
    mma = 0.0
    if config.kind == "gemm":
        rate = {1: gpu.mma8, 2: gpu.mma16}.get(act, gpu.sms * 128 * 2 * gpu.clock)
        repeats = config.bk // problem.group if 0 < problem.group < config.bk else 1
        mma = 2.0 * max(m, config.bm) * n * k * repeats / (0.5 * rate)
    waves = programs / (gpu.sms * resident)
    tail = math.ceil(waves) / waves if waves > 1 else 1.0
    idle = max(1.0, gpu.sms / programs)
    busy = max(traffic / (gpu.bandwidth * used), instructions(problem, config) / issue * idle, mma * idle)
    return busy * tail + gpu.call * (1 if config.split == 1 else 2)
