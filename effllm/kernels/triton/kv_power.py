"""The power iteration of GEAR pages on a GPU: rank-r factors of a matrix that one program holds (runtime/caches/gear.py).

Maths      P from a hash of row and column; LOOPS times Q = orth(E orth(P)), P = E^T Q, orth by Gram-Schmidt, twice, a column without a remainder zero.
Layout     E fp32 (M, N) and room for Q fp64 (r, M) in scratch memory that only this program touches; P and Q in registers as (RP, columns).
Bytes      E twice a loop, from the caches; 2 r M N multiply-adds a loop.
Numerics   sums, norms and projections are fp64, as in the plain-torch encoder, so that their order does not show in the halves that are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def drawn(n, RP: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the iteration starts: fp64 (RP, columns n) in -1 to 1, a hash in 32 bits; zero from column N on."""
    r = tl.arange(0, RP)
    h = (n + 1).to(tl.uint32)[None, :] * 2654435761 + (r + 1).to(tl.uint32)[:, None] * 2246822519
    h = (h ^ (h >> 15)) * 2246822519
    return tl.where((n < N)[None, :], (h ^ (h >> 13)).to(tl.float64) / 2147483648.0 - 1.0, 0.0)


@triton.jit
def line(x, r):  # type: ignore[no-untyped-def]
    """Row r of x (RP, columns)."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == r)[:, None], x, 0.0), 0)


@triton.jit
def put(x, r, row):  # type: ignore[no-untyped-def]
    """x with its row r replaced."""
    return tl.where((tl.arange(0, x.shape[0]) == r)[:, None], row[None, :], x)


@triton.jit
def orthonormal(x, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of x made orthonormal one after the other."""
    for r in range(RANK):
        c = line(x, r)
        whole = tl.sqrt(tl.sum(c * c, 0))
        for _ in range(2):
            for other in range(r):
                o = line(x, other)
                c -= tl.sum(o * c, 0) * o
        left = tl.sqrt(tl.sum(c * c, 0))
        by = tl.where(left != left, left, tl.maximum(left, 1e-30))
        x = put(x, r, tl.where(left <= whole * 1e-6, tl.zeros_like(c), c / by))
    return x


@triton.jit
def power_iteration(  # type: ignore[no-untyped-def]
    e, q, M: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, LOOPS: tl.constexpr
):  # fmt: skip
    """Factors fp64 (RP, MP) and (RP, NP) of E."""
    n, m, t = tl.arange(0, NP), tl.arange(0, MP), tl.arange(0, BM)
    r = tl.arange(0, RP)
    held = (r < RANK)[:, None] & (m < M)[None, :]
    right = drawn(n, RP, N)
    left = tl.zeros((RP, MP), tl.float64)
    for _ in range(LOOPS):
        right = orthonormal(right, RANK)
        tl.debug_barrier()  # every thread is done with the last loop's Q
        for i in range(RANK):
            w = line(right, i)
            for m0 in range(0, M, BM):
                inside = (m0 + t < M)[:, None] & (n < N)[None, :]
                x = tl.load(e + (m0 + t)[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float64)
                tl.store(q + i * M + m0 + t, tl.sum(x * w[None, :], 1), mask=m0 + t < M)
        tl.debug_barrier()
        left = orthonormal(tl.load(q + r[:, None] * M + m[None, :], mask=held, other=0.0), RANK)
        tl.debug_barrier()
        tl.store(q + r[:, None] * M + m[None, :], left, mask=held)
        tl.debug_barrier()
        right = tl.zeros((RP, NP), tl.float64)
        for i in range(RANK):
            total = tl.zeros((NP,), tl.float64)
            for m0 in range(0, M, BM):
                inside = (m0 + t < M)[:, None] & (n < N)[None, :]
                x = tl.load(e + (m0 + t)[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float64)
                w = tl.load(q + i * M + m0 + t, mask=m0 + t < M, other=0.0)
                total += tl.sum(x * w[:, None], 0)
            right = put(right, i, total)
    return left, right


@triton.jit
def upper_byte(x):  # type: ignore[no-untyped-def]
    """The upper byte of the half nearest to fp32 x (e5m2), ties to even, as an integer."""
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    magnitude = size.to(tl.float32, bitcast=True)
    small = magnitude < 6.103515625e-05  # below 2^-14: steps of 2^-16
    tiny = (tl.where(small, magnitude, 0.0) * 65536.0 + 12582912.0) - 12582912.0
    code = ((size + 0xFFFFF + ((size >> 21) & 1)) >> 21) - ((127 - 15) << 2)
    code = tl.where(small, tiny.to(tl.int32), code)
    code = tl.where(magnitude >= 61440.0, 0x7C, code)  # halfway from the largest, 57344, to 2^16
    return sign | tl.where(x != x, 0x7F, code)


@triton.jit
def keep(halves, octets, at, i, x, mask, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store fp64 x as elements i of a factor that starts at byte `at`: fp16, or its upper bytes, by way of fp32 as torch converts."""
    if FACTOR == 16:
        tl.store(halves + at // 2 + i, x.to(tl.float32).to(tl.float16), mask=mask)
    else:
        tl.store(octets + at + i, upper_byte(x.to(tl.float32)).to(tl.uint8), mask=mask)
