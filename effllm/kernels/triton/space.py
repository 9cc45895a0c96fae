"""The configurations of the Triton linear kernels: which there are for a problem, and why one may not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from effllm.kernels.triton import cost
from effllm.kernels.triton.config import KINDS, NAMES, Tiles
from effllm.lowering.op import Config, Problem

GEMV_ROWS = 4  # one accumulator tile per row: past this registers run out
SPLITS = (1, 2, 4, 8, 16, 32)
_RESERVED = 1 << 10  # bytes of shared memory per program that the driver keeps
_GEMV = {"bn": (32, 64, 128, 256), "bk": (64, 128, 256, 512, 1024), "warps": (1, 2, 4, 8), "stages": (1, 2, 3), "split": SPLITS}
_GEMM = {"bm": (16, 32, 64, 128), "bn": (32, 64, 128), "bk": (32, 64, 128), "stages": (2, 3), "split": SPLITS}
_WIDE = ((16, 32), (32, 32), (32, 64))  # rows and outputs of a tile with fp32 activations
_DENSE = Tiles("dense")


def parts(bits: int) -> list[int]:
    """The parts of a code, most significant first: the binary digits of its width."""
    return [p for p in (8, 4, 2, 1) if bits & p]


def candidates(problem: Problem, machine: Mapping[str, float]) -> Iterator[Tiles]:
    """Every configuration that may run a problem (dynamic rows: one) on a machine (machines.gpu)."""
    m = rows(problem)
    if m <= _gemv_rows(problem):
        words = parts(problem.bits)[0] / 32
        for bn in _GEMV["bn"]:
            for bk in _GEMV["bk"]:
                for warps in _GEMV["warps"]:
                    if _loads_fit(bk * words * bn / (32 * warps), _covering(m)):
                        for split in _splits(problem, bk):
                            for stages in _GEMV["stages"]:
                                yield Tiles("gemv", _covering(m), bn, bk, split, warps, stages)
    if _wide(problem):
        for bm, bn in _WIDE:
            yield Tiles("gemm", bm, bn, 32, 1, 4, 1)
    else:
        for bm in _GEMM["bm"]:
            for bn in _GEMM["bn"]:
                for bk in _GEMM["bk"]:
                    for stages in _GEMM["stages"]:
                        if not _gemm_refusal(problem, Tiles("gemm", bm, bn, bk, 1, gemm_warps(bm, bn), stages), machine):
                            for split in _splits(problem, bk) if m <= 128 else (1,):
                                yield Tiles("gemm", bm, bn, bk, split, gemm_warps(bm, bn), stages)
    if problem.act != "a8":
        yield _DENSE


def refusal(problem: Problem, config: Config, machine: Mapping[str, float]) -> str:
    """Why a configuration from a store may not run; empty where it may. Allows exactly what `candidates` yields."""
    if set(config) != NAMES or config["kind"] not in KINDS or not all(type(config[f]) is int for f in NAMES - {"kind"}):
        return f"{dict(config)} is no configuration of the Triton kernels"
    c = Tiles.of(config)
    if c.kind == "dense":
        if problem.act == "a8":
            return "int8 activations are not multiplied by unpacked weights"
        return "" if c == _DENSE else "the unpacking kernel has one configuration"
    if c.split != 1 and c.split not in _splits(problem, c.bk):
        return f"{c.split} splits of {problem.k} columns in tiles of {c.bk}"
    return (_gemv_refusal if c.kind == "gemv" else _gemm_refusal)(problem, c, machine)


def rows(problem: Problem) -> int:
    """Rows to plan for: those of the problem, one where they are dynamic or none."""
    return max(1, problem.m or 1)


def gemm_warps(bm: int, bn: int) -> int:
    """Warps of a GEMM tile."""
    return 4 if bm * bn <= 64 * 64 else 8


def _wide(problem: Problem) -> bool:
    return problem.act != "a8" and problem.dtype == torch.float32


def _gemv_rows(problem: Problem) -> int:
    # four rows of a part with 16 or 32 fields a word unroll into ten seconds of compilation
    return GEMV_ROWS if parts(problem.bits)[-1] >= 4 else GEMV_ROWS // 2


def _covering(m: int) -> int:
    return 1 << (m - 1).bit_length()


def _loads_fit(words: float, bm: int) -> bool:
    """At least one 128-bit load per thread; about 4 registers a word and row (128 at most)."""
    return words >= 4 and words * bm <= 16


def _splits(problem: Problem, bk: int) -> list[int]:
    tiles = max(1, -(-problem.k // bk))
    return [s for s in SPLITS if s == 1 or s * 2 <= tiles]


def _gemv_refusal(problem: Problem, c: Tiles, machine: Mapping[str, float]) -> str:
    del machine  # no shared memory
    m = rows(problem)
    if m > _gemv_rows(problem):
        return f"the GEMV takes {_gemv_rows(problem)} rows of {problem.bits}-bit codes, not {m}"
    if c.bm != _covering(m):
        return f"tiles of {c.bm} rows for {m}"
    if any(getattr(c, name) not in allowed for name, allowed in _GEMV.items()):
        return f"the GEMV has no tiles {c}"
    fits = _loads_fit(c.bk * parts(problem.bits)[0] / 32 * c.bn / (32 * c.warps), c.bm)
    return "" if fits else "a thread would load less than 128 bits or hold more than 128 registers of codes"


def _gemm_refusal(problem: Problem, c: Tiles, machine: Mapping[str, float]) -> str:
    m = rows(problem)
    if _wide(problem):
        fixed = (c.bm, c.bn) in _WIDE and (c.bk, c.split, c.warps, c.stages) == (32, 1, 4, 1)
        return "" if fixed else f"fp32 activations have no tiles {c}"
    if any(getattr(c, name) not in allowed for name, allowed in _GEMM.items()) or c.warps != gemm_warps(c.bm, c.bn) or c.bm * c.bn > 64 * 128:
        return f"the GEMM has no tiles {c}"
    if c.bm > 16 and c.bm // 2 >= m:
        return f"tiles of {c.bm} rows for {m}"
    if problem.group and problem.group % c.bk and c.bk != 2 * problem.group:
        return f"more than two groups of {problem.group} in a tile of {c.bk}"  # each has a product of its own over the whole tile
    if c.split > 1 and m > 128:
        return f"split-K with {m} rows"
    needed = cost.shared_bytes(problem, c.bm, c.bn, c.bk, c.stages) + _RESERVED
    return "" if needed <= machine["smem"] else f"{needed / 1024:.0f} KiB of shared memory, there are {machine['smem'] / 1024:.0f}"
