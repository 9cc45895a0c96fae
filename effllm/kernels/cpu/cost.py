"""Cost of the CPU kernels (bipolar.h, expand.h), one model per instruction set and path.

    T = max(bytes / bandwidth(t), instructions / (issue t)) + quantization + call + wake [t > 1],    bandwidth(t) = min(t single, bandwidth)

with a sum in place of the maximum where codes are unpacked first.

Instructions per 64 codes: extraction (mask, shift, merge of parts) `extract`, one dot product per token and digit; per 16 rows and
segment a few to fold the sums with scale and offset.

    registers  extracts again for every `rows` tokens; on AVX2 most products are of words or short sums (narrow.h), and then it is the only path
    single     one token of int8: masks without shifting, sums of each field joined once a segment
    unpack     extracts once for as many tokens as `chunk` holds, writes bytes and reads them for every `rows` tokens, `tiles` side by side
    expand     extracts once for as many tokens as stay in cache, writes bf16 (on AVX2 fp32), which tokens multiply without further steps
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy

from effllm.autotune.cost import ACT, BANDWIDTH, BITS, CALL, DIGITS, GROUP, META, OUT, PARTS, WEIGHT_BYTES, K, M, Model, N

SINGLE, ISSUE, PRODUCT, WAKE, THREADS = sympy.symbols("single issue product wake threads", positive=True)
ROWS, TILES, CHUNK = sympy.symbols("rows tiles chunk", positive=True, integer=True)
PATHS = ("registers", "single", "unpack", "expand")
PAD = 64  # bytes between the digits of two tokens (activation.h)

_DOT = {"avx512": 1.0, "avx2": 6.0, "portable": 24.0}  # instructions of one 16-row x 4-column product
_WORDS = sympy.Or(sympy.Eq(DIGITS, 2), sympy.And(sympy.Eq(DIGITS, 1), sympy.Eq(BITS, 8)))  # narrow.h
_SHORT = sympy.And(sympy.Eq(DIGITS, 1), BITS <= 5)
_WIDTH = {"avx512": 1.0, "avx2": 2.0, "portable": 4.0}  # instructions per operation on 64 bytes


# sympy would compare the arguments first, which takes longer than to compute with them
least, most = functools.partial(sympy.Min, evaluate=False), functools.partial(sympy.Max, evaluate=False)


@functools.cache
def models(isa: str) -> Mapping[str, Model]:
    """Path -> model of an instruction set's linear kernels."""
    return {path: _model(path, isa) for path in PATHS}


def _model(path: str, isa: str) -> Model:
    dot, width = _DOT[isa], _WIDTH[isa]
    steps = N * K / 64
    extract = sympy.Piecewise((1, sympy.Eq(BITS, 8)), (2.5 * PARTS, True)) * width
    # with 16-bit activations a segment is a block of 32 columns, with int8 ones a group
    segment = sympy.Piecewise((least(GROUP, K), sympy.Eq(DIGITS, 1)), (least(GROUP, 32), True))
    fold = N / 16 * K / segment * width
    take = sympy.Piecewise((0.1 * M * K, sympy.Eq(DIGITS, 1)), (1.2 * M * K, True)) * width
    products = M * DIGITS * dot  # instructions for 64 codes and all tokens
    if isa == "avx2":  # three digits: fitted to 16 to 512 tokens
        products = sympy.Piecewise((M * (13 if path == "registers" else 9.6), sympy.Eq(DIGITS, 3)), (products, True))
    if path == "registers" and isa == "avx2":  # two or four products of a token, and as many sums
        products = sympy.Piecewise((M * 8, _WORDS), (M * 4, _SHORT), (products, True))
    if path == "registers":
        # measured at 16 rows: each activation is broadcast again for every step, 1.6 (two digits: 2.2) instructions a product; from three
        # tokens of two digits on a broadcast serves two tiles
        paired = sympy.And(sympy.Eq(DIGITS, 2), M > 2)
        each = sympy.Piecewise((1, M <= 1), (1.4 if isa == "avx512" else 2.2, paired), (1 + 0.6 * DIGITS, True))
        if isa == "avx2":  # half of a load for each broadcast; words are widened
            each = sympy.Piecewise((1.125, sympy.Or(_WORDS, _SHORT, sympy.Eq(DIGITS, 3))), (each, True))
            extract += sympy.Piecewise((4, _WORDS), (0, True))
        instructions = steps * (extract * sympy.ceiling(M / ROWS) + products * each) + fold * (3 + 3 * M) + take
    elif path == "unpack":
        held = most(48, 24 * sympy.floor(CHUNK * 1024 / (DIGITS * (K + PAD)) / 24))  # tokens
        rows = M / sympy.ceiling(M / ROWS)  # the last pass has what is left
        loads = (TILES + rows * DIGITS) / (TILES * rows * DIGITS)  # codes and activations, per product
        each = 0.85 + 0.45 * loads
        # unpacking waits for memory: 12 more than it issues, measured with weights that no cache holds
        instructions = steps * ((extract + 12 * width) * sympy.ceiling(M / held) + each * products) + fold * (2 + 3 * M) + take
    elif path == "single":
        # a part of one bit goes through tables, which costs more than it saves; tiles side by side run out of registers
        masks = 1.2 * PARTS + sympy.Piecewise((4, sympy.Eq(sympy.Mod(BITS, 2), 1)), (0, True))
        instructions = (steps * (masks + 1) + fold * (6 + 4 * PARTS)) * sympy.Piecewise((1, TILES <= 1), (1.3, True)) + take
    elif isa == "avx2":
        held = most(96, 6 * sympy.floor(512 * 1024 / (4 * K) / 6))
        instructions = steps * ((extract + 60) * sympy.ceiling(M / held) + 5.4 * M)
    else:
        held = most(56, 14 * sympy.floor(512 * 1024 / (2 * K) / 14))
        rows = least(M, 14)
        each = 0.85 + 0.45 * (2 + rows) / (2 * rows)
        instructions = steps * ((extract + 16) * sympy.ceiling(M / held) + 2 * each * M) + 4 * M * N / 16
    nbytes = WEIGHT_BYTES + M * (K * ACT + N * OUT)
    flops = 2 * M * N * K
    rate = least(THREADS * SINGLE, BANDWIDTH)
    busy = instructions / (ISSUE * THREADS)
    # one path reads while it multiplies, the others unpack first
    reading = nbytes / rate + busy if path in ("unpack", "expand") else most(nbytes / rate, busy)
    seconds = reading + CALL + sympy.Piecewise((0, THREADS <= 1), (WAKE, True))
    # the products alone, 64 (expand: 32, or what AVX2 was measured to do) multiply-adds an instruction
    alone = steps * M * (5.4 if isa == "avx2" else 2) if path == "expand" else steps * products
    bound = most(nbytes / BANDWIDTH, alone / (ISSUE * THREADS))
    return Model(nbytes, flops, instructions, seconds, bound)


__all__ = ["META", "PATHS", "models"]
