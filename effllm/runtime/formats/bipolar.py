"""bipolar-INT, 1 to 8 bits: value = scale * sum_i (2 b_i - 1) 2^i (+ offset).

Maths.  With the unsigned code u = sum_i b_i 2^i, the bipolar value is v = 2u - (2^n - 1): the 2^n odd integers from
-(2^n - 1) to 2^n - 1, a mid-rise uniform quantizer without a zero. Three grids share the codes:

    symmetric   w = scale * v                      no further storage
    integer     w = scale * (v - 1)                two's complement with its top bit flipped: exact zero, no further storage
    affine      w = scale * v + offset             one more number per group; stored as minimum = the value of u = 0

All three read w = 2 * scale * (u - zero), or 2 * scale * u + minimum, which is what ops and kernels see. The minimum and not
the offset is stored because fp16 then holds GGUF's Q4_0, Q4_1 and Q8_0 exactly.

Layout (version 1), canonical and device-neutral:

    planes   uint8  (n, N, Kp / 8)   most significant plane first; bit k % 8 of byte k // 8 (least significant bit first)
    scale    fp16 or fp32  (N, G)    G = Kp / group
    minimum  as scale, affine only

Kp is K rounded up to a multiple of the group (per channel: to a multiple of 8). Padded codes are 0 and have no meaning.

Truncation.  The first k planes of an n-bit weight are a valid k-bit weight with scale 2^(n-k) * scale and the same offset:
v_n = 2^(n-k) v_k + (a bipolar number of the dropped planes), and that number has mean zero over its codes. `truncate` does
it without touching the codes, so one artifact serves every precision up to its own. Scales that would overflow fp16 become fp32.

Source: arXiv 2409.17870, arXiv 2508.19087 (format); the affine form and truncation as above are ours.
"""

from __future__ import annotations

from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError, WeightError
from effllm.runtime.formats.base import Packed

Grid = Literal["symmetric", "integer", "affine"]
GRIDS: tuple[str, ...] = ("symmetric", "integer", "affine")
GROUPS: tuple[int, ...] = (16, 32, 64, 128)
CHANNEL = 0  # group size that stands for one group per output row

name = "bipolar"
version = 1
tensor_names: tuple[str, ...] = ("planes", "scale", "minimum")


def padded(k: int, group: int) -> int:
    """K rounded up to whole groups (per channel: to whole bytes)."""
    step = group if group != CHANNEL else 8
    return -(-k // step) * step


def groups(k: int, group: int) -> int:
    """Number of groups along K."""
    return 1 if group == CHANNEL else padded(k, group) // group


def zero_point(bits: int, grid: str, source_bits: int | None = None) -> float:
    """The code that stands for zero, in code units, of the symmetric and integer grids.

    `source_bits` is the width the weight was made with; a truncated integer grid keeps its offset of minus one original
    scale, which moves its zero point.
    """
    mid = (2**bits - 1) / 2
    if grid == "integer":
        return mid + 2.0 ** (bits - (source_bits or bits) - 1)
    return mid


def pack_codes(u: Tensor, bits: int) -> Tensor:
    """Unsigned codes (N, Kp) to bit planes (bits, N, Kp / 8), most significant plane first."""
    n, kp = u.shape
    if u.device.type == "meta":
        return torch.empty(bits, n, kp // 8, dtype=torch.uint8, device="meta")
    weight = (1 << torch.arange(8, device=u.device, dtype=torch.int32)).to(torch.uint8)
    planes = torch.empty(bits, n, kp // 8, dtype=torch.uint8, device=u.device)
    u = u.to(torch.uint8)
    for plane in range(bits):
        bit = (u >> (bits - 1 - plane)) & 1
        planes[plane] = (bit.view(n, kp // 8, 8) * weight).sum(-1, dtype=torch.uint8)
    return planes


# byte -> its 8 bits as 8 bytes, the lowest bit first
_SPREAD = tuple(sum((byte >> i & 1) << 8 * i for i in range(8)) for byte in range(256))


def unpack_codes(planes: Tensor) -> Tensor:
    """Bit planes (bits, N, Kp / 8) to unsigned codes (N, Kp), uint8; eight codes at a time, as the bytes of an integer."""
    bits, n, kb = planes.shape
    if planes.device.type == "meta":
        return torch.empty(n, kb * 8, dtype=torch.uint8, device="meta")
    table = torch.tensor(_SPREAD, dtype=torch.int64, device=planes.device)
    index = planes.to(torch.int32).view(bits, -1)
    u = table[index[0]]
    for plane in range(1, bits):
        u = (u << 1) + table[index[plane]]
    return u.view(torch.uint8).view(n, kb * 8)


def make(
    codes: Tensor, scale: Tensor, minimum: Tensor | None, *, k: int, bits: int, group: int, grid: str, source_bits: int | None = None
) -> Packed:
    """Store solved numbers. `codes` (N, Kp) unsigned, `scale` and `minimum` (N, G) in the dtype to be stored."""
    tensors = {"planes": pack_codes(codes, bits), "scale": scale.contiguous()}
    if minimum is not None:
        tensors["minimum"] = minimum.contiguous()
    attrs = {"bits": bits, "group": group, "grid": grid, "source_bits": source_bits or bits}
    packed = Packed(name, version, (codes.shape[0], k), tensors, attrs)
    validate(packed)
    return packed


def dequantize(u: Tensor, scale: Tensor, minimum: Tensor | None, zero: float, group: int) -> Tensor:
    """Codes (N, Kp) to fp32 values (N, Kp): 2 * scale * (u - zero), or 2 * scale * u + minimum."""
    n, kp = u.shape
    g = kp if group == CHANNEL else group
    uf = u.view(n, kp // g, g).float()
    s = 2.0 * scale.float().unsqueeze(-1)
    w = s * uf + minimum.float().unsqueeze(-1) if minimum is not None else s * (uf - zero)
    return w.reshape(n, kp)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) weight that is stored."""
    a = packed.attrs
    zero = zero_point(a["bits"], a["grid"], a["source_bits"])
    u = unpack_codes(packed.tensors["planes"])
    w = dequantize(u, packed.tensors["scale"], packed.tensors.get("minimum"), zero, a["group"])
    return w[:, : packed.shape[1]].to(dtype)


def truncate(packed: Packed, bits: int) -> Packed:
    """The same weight at its `bits` most significant planes; shares no codes but reads only those planes."""
    have = packed.attrs["bits"]
    if not 1 <= bits <= have:
        raise WeightError("E-WGT-BITS", f"cannot read {bits} bits from a {have}-bit weight", f"ask for 1 to {have} bits")
    if bits == have:
        return packed
    drop = have - bits
    tensors = {"planes": packed.tensors["planes"][:bits].contiguous()}
    scale = packed.tensors["scale"]
    # v_n = 2^drop v_k + dropped; the offset (scale * v + offset) stays, so the value of u = 0 rises by scale * (2^drop - 1).
    wide = {"scale": scale.float() * 2**drop}
    if "minimum" in packed.tensors:
        wide["minimum"] = packed.tensors["minimum"].float() + scale.float() * (2**drop - 1)
    tensors |= {key: t.to(_stored(scale.dtype, wide)) for key, t in wide.items()}
    attrs = dict(packed.attrs, bits=bits)
    return Packed(name, packed.version, packed.shape, tensors, attrs)


def _stored(dtype: torch.dtype, wide: dict[str, Tensor]) -> torch.dtype:
    """The dtype for the numbers of a truncated weight: the source's, or fp32 for all of them where one would overflow fp16."""
    top = torch.finfo(dtype).max
    for t in wide.values():
        if not t.is_meta and t.numel() and float(t.abs().max()) > top:
            return torch.float32
    return dtype


def nbytes(*, bits: int, group: int, grid: str = "symmetric", scale_bytes: int = 2, **_: Any) -> sympy.Expr:
    """Stored bytes over the symbols N and K: planes and one or two numbers per group."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    step = group or 8
    kp = sympy.ceiling(k / step) * step
    per_group = scale_bytes * (2 if grid == "affine" else 1)
    return n * (kp * sympy.Rational(bits, 8) + (kp / group if group else 1) * per_group)


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    a, (n, k), t = packed.attrs, packed.shape, packed.tensors

    def bad(cause: str) -> CheckpointError:
        return CheckpointError("E-CKP-SHAPE", f"bipolar weight: {cause}", "the file is damaged or not from effllm; write it again")

    bits, group, grid = a.get("bits"), a.get("group"), a.get("grid")
    if "planes" not in t or "scale" not in t:
        raise bad(f"its tensors are {sorted(t)}")
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise bad(f"bits is {bits!r}, not 1 to 8")
    if group != CHANNEL and group not in GROUPS:
        raise bad(f"group is {group!r}, not one of {(CHANNEL, *GROUPS)}")
    if grid not in GRIDS or (grid == "affine") != ("minimum" in t):
        raise bad(f"grid is {grid!r} and its tensors are {sorted(t)}")
    source = a.get("source_bits")
    if not isinstance(source, int) or not bits <= source <= 8:
        raise bad(f"source_bits is {source!r} for {bits} bits")
    want = {"planes": (bits, n, padded(k, group) // 8), "scale": (n, groups(k, group)), "minimum": (n, groups(k, group))}
    for key, tensor in t.items():
        if tuple(tensor.shape) != want.get(key):
            raise bad(f"{key} has shape {tuple(tensor.shape)}, expected {want.get(key)}")
        ok = tensor.dtype == torch.uint8 if key == "planes" else tensor.dtype in (torch.float16, torch.float32)
        if not ok:
            raise bad(f"{key} has dtype {tensor.dtype}")
