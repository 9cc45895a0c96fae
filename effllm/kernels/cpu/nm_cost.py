"""Cost of the N:M CPU kernels (nm_rows.h, nm_tiles.h, blockdiag.h), one model per instruction set, layout and path.

    T = max(bytes / bandwidth(t), instructions / (issue t)) + call + wake [t > 1],    bandwidth(t) = min(t single, bandwidth)

    registers  every token reads the compressed weight; its bytes come from memory once, then from the second-level cache
    expand     the weight becomes dense once, PyTorch's product does the rest

Instructions are per kept weight and token: those of the inner loops, with the table lookups and the conversions. Codes of rows whose
groups are whole words of columns (nm_codes.h) are multiplied as they are by up to DECODED tokens, then decoded once for all.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy

from effllm.autotune.cost import ACT, BANDWIDTH, BITS, CALL, DIGITS, GROUP, META, OUT, K, M, Model, N
from effllm.kernels.cpu.cost import ISSUE, PRODUCT, SINGLE, THREADS, WAKE

KEEP, OF, VALUE_BYTES, INDEX_BITS, BLOCK, FAST = sympy.symbols("keep of value_bytes index_bits block fast", positive=True)
CODED = sympy.Symbol("coded", integer=True)  # 1 for codes, 0 for floating-point values (`bits` counts as positive everywhere)
PATHS = ("registers", "expand")
DECODED = 6  # kDecoded in nm.cpp

_SPREAD = {"avx512": 0.25, "avx2": 0.9, "portable": 4.0}  # instructions of a dense column: spreading 16 to their places
_DOT = {"avx512": 0.0625, "avx2": 0.13, "portable": 0.25}
_DECODE = {"avx512": 0.35, "avx2": 0.7, "portable": 1.5}  # a kept value to fp32


def weight_bytes() -> sympy.Expr:
    """Stored bytes of an N:M weight and its wrappers."""
    kept = K * KEEP / OF
    coded = kept * BITS / 8 + kept / GROUP * META
    return N * (sympy.Piecewise((coded, sympy.Eq(CODED, 1)), (kept * VALUE_BYTES, True)) + K * INDEX_BITS / 8) + 2 * (N + K) * BLOCK


@functools.cache
def models(isa: str, tiles: bool) -> Mapping[str, Model]:
    """Path -> model of a layout's kernels."""
    return {path: _model(path, isa, tiles) for path in PATHS}


def _model(path: str, isa: str, tiles: bool) -> Model:
    dense, kept = N * K, N * K * KEEP / OF
    if path == "expand":
        instructions = dense * (0.5 if tiles else _SPREAD[isa] + 1.0) + kept * _DECODE[isa]
    elif tiles:
        # 32 kept bf16 values: load, shift, permutation, product; 64 codes: shift, mask, and for each digit a permutation and two products
        per_token = sympy.Piecewise((kept / 64 * (3 + 3.2 * DIGITS), sympy.Eq(CODED, 1)), (kept / 32 * 3.4, True))
        instructions = M * (per_token + K * (0.5 + CODED))
    else:
        wide = dense / 32 * (2 + M)
        words = dense / 64 * 22 * M
        as_they_are = sympy.Eq(FAST, 1) & sympy.Eq(CODED, 1) & (M < DECODED)
        decoded = kept * _DECODE[isa] + dense * (sympy.ceiling(M / 4) * _SPREAD[isa] + M * _DOT[isa])
        bf16 = sympy.Eq(FAST, 1) & sympy.Eq(CODED, 0)
        instructions = sympy.Piecewise((words, as_they_are), (wide, bf16), (decoded, True))
    instructions += M * (N + K) * BLOCK / 16 * 2 * (1 if isa == "avx512" else 2)
    stored = weight_bytes()
    nbytes = stored + M * (K * ACT + N * OUT)
    rate = sympy.Min(THREADS * SINGLE, BANDWIDTH)
    busy = instructions / (ISSUE * THREADS)
    seconds = sympy.Max(nbytes / rate, busy) + CALL + sympy.Piecewise((0, THREADS <= 1), (WAKE, True))
    bound = nbytes / BANDWIDTH
    if path == "expand":
        product = M * dense / (PRODUCT * THREADS)
        seconds = seconds + product / 0.94 + 2 * M * N * OUT / (4 * BANDWIDTH) + 3 * CALL + 2 * WAKE
        bound = sympy.Max(bound, product)
    return Model(nbytes, 2 * M * kept, instructions, seconds, bound)
