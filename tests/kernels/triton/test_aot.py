"""Ahead-of-time compilation for GPUs that are not here: it works, stays within registers, spills nothing, and issues what cost.py says."""

from __future__ import annotations

import collections
import functools
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from effllm.autotune.gpus import CLASSES
from effllm.errors import KernelError
from effllm.kernels.triton import aot
from effllm.kernels.triton.choose import TritonTuning
from effllm.kernels.triton.config import Tiles
from effllm.kernels.triton.gemm import gemm_kernel
from effllm.kernels.triton.gemv import gemv_kernel
from effllm.kernels.triton.splitk import reduce_kernel
from effllm.kernels.triton.unpack import dense_kernel
from effllm.lowering.op import Problem

pytestmark = pytest.mark.slow

SIZES = ("M", "N", "K", "NP", "KB", "stride", "tiles")
ALIGNED = ("x", "codes", "scale", "y", "N", "K", "NP", "stride")
ACT = {1: "*i8", 2: "*bf16", 4: "*fp32"}


def act_of(problem: Problem) -> int:
    """Bytes of an element of the activation."""
    return 1 if problem.act == "a8" else 4 if problem.dtype == torch.float32 else 2


@functools.cache
def linear(target: str, shape: Problem, config: Tiles, *, bias: bool = False, even: bool = True) -> tuple[aot.Resources, Any]:
    """Compile the kernel of a configuration as launch.py would call it."""
    act = ACT[act_of(shape)]
    out = "*fp32" if config.split > 1 or act_of(shape) == 4 else "*bf16"
    signature = {"x": act, "codes": "*i32", "scale": "*fp16", "y": out, "zero": "fp32", **dict.fromkeys(SIZES, "i32")}
    constants: dict[str, Any] = {"BITS": shape.bits, "GROUP": shape.group, "BN": config.bn, "BK": config.bk, "SPLIT": config.split, "STAGES": config.stages}
    for name, present, kind in (("minimum", shape.affine, "*fp16"), ("bias", bias, "*bf16"), ("xs", act_of(shape) == 1, "*fp32")):
        signature |= {name: kind} if present else {}
        constants |= {} if present else {name: None}
    if config.kind == "gemv":
        signature["one"] = "i32"
        constants |= {"WIDE": act_of(shape) == 4, "MB": config.bm, "EVEN": even}
        kernel = gemv_kernel
    else:
        constants["BM"] = config.bm
        kernel = gemm_kernel
    return aot.compile_for(kernel, signature, constants, target, num_warps=config.warps, num_stages=config.stages, aligned=ALIGNED)


def shape(m: int, bits: int, group: int = 32, act: int = 2, affine: bool = False) -> Problem:
    dtype = torch.float32 if act == 4 else torch.bfloat16
    return Problem("bipolar_linear", 4096, 4096, bits, group, affine, "a8" if act == 1 else "a16", m, dtype, "cuda")


GEMV = [shape(1, bits) for bits in (1, 2, 3, 4, 8)] + [
    shape(1, 6, 16, affine=True), shape(1, 1, 16), shape(1, 2, 0), shape(1, 4, act=1), shape(1, 4, act=4), shape(2, 4), shape(4, 4, affine=True),
]  # fmt: skip
GEMM = [shape(m, bits) for m, bits in ((16, 4), (64, 4), (16, 8), (64, 1), (16, 7))] + [
    shape(16, 4, 16, act=1), shape(512, 8, 0, act=1, affine=True), shape(16, 4, act=4),
]  # fmt: skip


def cheapest(problem: Problem, kind: str, target: str) -> Tiles:
    return next(config for _, config in TritonTuning(target).ranked(problem) if config.kind == kind)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("problem", GEMV, ids=lambda s: f"m{s.m}w{s.bits}g{s.group}a{act_of(s)}{'z' if s.affine else ''}")
def test_gemv_spills_nothing(problem: Problem, target: str) -> None:
    used, _ = linear(target, problem, cheapest(problem, "gemv", target))
    assert used.spills == 0
    # NVIDIA: at least three programs of 128 threads per multiprocessor; AMD: two waves per vector unit
    assert 16 <= used.registers <= (256 if target.startswith("hip") else 168)
    assert used.shared <= CLASSES[target].smem


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("problem", GEMM, ids=lambda s: f"m{s.m}w{s.bits}g{s.group}a{act_of(s)}{'z' if s.affine else ''}")
def test_gemm_fits(problem: Problem, target: str) -> None:
    used, compiled = linear(target, problem, cheapest(problem, "gemm", target), bias=True)
    assert used.spills <= 16  # bytes; Triton 3.6 leaves 8 on cuda:100
    assert used.registers <= 255
    assert used.shared <= CLASSES[target].smem
    if act_of(problem) != 4:
        text = compiled.asm["amdgcn"] if target.startswith("hip") else compiled.asm["ptx"]
        assert re.search(r"v_mfma|mma\.sync|wgmma|tcgen05\.mma", text), "the product is not on the matrix cores"


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_uneven_shapes_compile_with_masks(target: str) -> None:
    problem = shape(1, 3)
    used, _ = linear(target, problem, cheapest(problem, "gemv", target), bias=True, even=False)
    assert used.spills == 0


@pytest.mark.parametrize("target", aot.TARGETS)
def test_small_kernels_spill_nothing(target: str) -> None:
    signature = {"workspace": "*fp32", "bias": "*bf16", "y": "*bf16", "M": "i32", "N": "i32"}
    used, _ = aot.compile_for(reduce_kernel, signature, {"xs": None, "SPLIT": 8, "BN": 256}, target, num_warps=2)
    assert used.spills == 0 and used.registers <= 64
    signature = {"codes": "*i32", "scale": "*fp16", "w": "*bf16", "N": "i32", "K": "i32", "NP": "i32", "KB": "i32", "zero": "fp32"}
    for bits in (4, 7):
        used, _ = aot.compile_for(dense_kernel, signature, {"minimum": None, "BITS": bits, "GROUP": 32, "BK": 64, "BN": 64}, target)
        assert used.spills == 0 and used.registers <= 128


def loop_instructions(text: str) -> collections.Counter[str]:
    """Opcodes of the longest loop of a disassembled kernel."""
    lines = text.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"^(\.L_x_\d+):", line))}
    loops = [(labels[m.group(1)], i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*(\.L_x_\d+)", line)) and labels.get(m.group(1), i) < i]
    start, end = max(loops, key=lambda pair: pair[1] - pair[0])
    return collections.Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", "\n".join(lines[start : end + 1])))


@pytest.mark.parametrize(("bits", "bk", "act"), [(8, 128, 2), (4, 256, 2), (2, 512, 2), (1, 1024, 2), (4, 256, 1), (4, 256, 4)])
def test_instructions_per_weight_are_those_of_the_cost_model(bits: int, bk: int, act: int) -> None:
    config = Tiles("gemv", 1, 64, bk, 1, 4, 1)
    problem = shape(1, bits, act=act)
    _, compiled = linear("cuda:90", problem, config)
    ops = loop_instructions(aot.sass(compiled))
    measured = sum(ops.values()) * 128 / (64 * bk)
    predicted = TritonTuning("cuda:90").predict(problem, config.config()).instructions / (problem.n * problem.k)
    assert measured == pytest.approx(predicted, rel=0.12)
    assert ops["BAR"] == 0 and ops["STS"] == 0, "a layout conversion crept into the loop"


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(KernelError, match="cuda:90"):
        aot.compile_for(reduce_kernel, {}, {}, "cuda:91")


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("kind", ["gemv", "gemm"])
def test_sizes_of_one_compile(kind: str, target: str) -> None:
    # Triton makes an argument that equals 1 a constant; decode has M = 1, and small layers one tile and one block
    ones = dict.fromkeys(("M", "KB", "tiles", "stride"), 1)
    problem = Problem("bipolar_linear", 64, 32, 3, 32, True)
    config = Tiles(kind, 1 if kind == "gemv" else 16, 32, 32, 2, 1, 1)
    signature = {"x": "*bf16", "codes": "*i32", "scale": "*fp32", "minimum": "*fp32", "y": "*fp32", "zero": "fp32", "N": "i32", "K": "i32", "NP": "i32"}
    constants: dict[str, Any] = {"bias": None, "xs": None, "BITS": problem.bits, "GROUP": problem.group, "BN": 32, "BK": 32, "SPLIT": 2, "STAGES": 1, **ones}
    if kind == "gemv":
        signature["one"] = "i32"
        constants |= {"WIDE": False, "MB": config.bm, "EVEN": False}
    else:
        constants["BM"] = config.bm
    used, _ = aot.compile_for(gemv_kernel if kind == "gemv" else gemm_kernel, signature, constants, target, num_warps=1, num_stages=1)
    assert used.spills == 0
    signature = {"workspace": "*fp32", "bias": "*bf16", "xs": "*fp32", "y": "*bf16", "N": "i32"}
    used, _ = aot.compile_for(reduce_kernel, signature, {"M": 1, "SPLIT": 2, "BN": 256}, target, num_warps=2)
    assert used.spills == 0
