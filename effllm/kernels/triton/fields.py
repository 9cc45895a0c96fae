"""Unpack codes from 32-bit words by magic numbers: no integer-to-float conversion, which runs at a quarter of the rate.

Maths      A code c of p bits that is put into the top mantissa bits of 1.0 reads 1 + c / 2^p; into the low mantissa bits of
           fp16 1024 (0x6400) it reads 1024 + c; of bf16 128 (0x4300) it reads 128 + c for c < 128. All exact.
Layout     words (R, BN) int32 of one part of P bits (runtime/layouts/words.py): word row r holds columns r * F ... r * F + F - 1,
           F = 32 / P; column c at bit (c % 2) * 16 + (c // 2) * P, so a masked word is two 16-bit numbers of neighbouring columns.
Cost       instructions per weight: `scalar` 1 AND-OR and P / DEPTH shifts; `tile` half a shift and half an AND per part, half an OR, half a subtraction.
Limits     P in 8, 4, 2, 1; DEPTH a multiple of P, at most 8.
Numerics   exact; `scalar` leaves 2^d c-units of x to subtract, d <= DEPTH: see gemv.py.
Source     the 0x6400 trick is folklore of fast weight-only kernels (Kim et al., arXiv 2211.10017); fields in the mantissa top are ours.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window(words, BIT: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words shifted so that bits BIT .. BIT + DEPTH - 1 fill the top DEPTH bits of an fp32 mantissa (bits 22 and down)."""
    if 23 - DEPTH >= BIT:
        return words << (23 - DEPTH - BIT)
    else:
        return words >> (BIT - (23 - DEPTH))


@triton.jit
def scalar(shifted, one, P: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The field whose lowest bit has mantissa weight 2^-D, as fp32 1 + c / 2^D.

    `one` is 0x3F800000 as a run-time number: with two immediates ptxas copies one into a register again for every use.
    """
    return ((shifted & ((2**P - 1) << (23 - D))) | one).to(tl.float32, bitcast=True)


@triton.jit
def pairs(codes, out, tile_index, n, NP, KB, BITS: tl.constexpr, P: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the part of P bits to `out` (BK / 2, BN): codes of columns 2i and 2i + 1 in the low and high half of row i."""
    if BITS & P:
        ABOVE: tl.constexpr = BITS & (16 - 2 * P)
        R: tl.constexpr = BK * P // 32
        row = tile_index * R + tl.arange(0, R)
        inside = (row < P * KB)[:, None] & (n < NP)[None, :]
        words = tl.load(codes + (ABOVE * KB + row)[:, None] * NP + n[None, :], mask=inside, other=0, eviction_policy="evict_first")
        shift = tl.arange(0, 16 // P) * P
        two = (words[:, None, :] >> shift[None, :, None]) & ((2**P - 1) * 0x00010001)
        out |= tl.reshape(two, out.shape) << (BITS & (P - 1))
    return out


@triton.jit
def tile(codes, tile_index, n, NP, KB, BITS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CENTRE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """u - CENTRE of columns tile_index * BK ..., (BK, BN) in DTYPE: fp16, bf16, fp32 or int8. Past the end of K the code is 0.

    CENTRE is 2^(BITS - 1) but for bf16 below 8 bits, where it is -128: what 0x4300 | u reads, without a subtraction.
    """
    two = tl.zeros((BK // 2, BN), tl.int32)
    for i in tl.static_range(4):
        two = pairs(codes, two, tile_index, n, NP, KB, BITS, 8 >> i, BK)
    if DTYPE.is_int():
        low = ((two & 0xFFFF) - CENTRE).to(tl.int8)
        high = ((two >> 16) - CENTRE).to(tl.int8)
    elif CENTRE < 0:
        two = two | 0x43004300
        low = (two & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (two >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        two = two | 0x64006400
        low = ((two & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True) - (1024 + CENTRE)).to(DTYPE)
        high = ((two >> 16).to(tl.int16).to(tl.float16, bitcast=True) - (1024 + CENTRE)).to(DTYPE)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BK, BN))
