"""CPU providers of the N:M ops: rows (any pattern, any build) and tiles (2:4 on AVX-512 with BF16)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import use
from effllm.kernels.cpu import build
from effllm.kernels.cpu.build import Isa
from effllm.kernels.cpu.nm_choose import NmTuning, arguments, thresholds
from effllm.lowering.op import OPS, YES, Config, Problem, Provider, Verdict
from effllm.runtime.formats import bipolar

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {"float32", "bfloat16", "float16"}
OPERATIONS = ("nm_linear", "nm_bipolar_linear", "armor_linear")


def nm_rows(x, values, scale, minimum, index, left, right, bias, n, keep, of, bits, group, zero, threads=0, expand_from=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


def nm_tiles(x, values, scale, minimum, index, left, right, bias, n, keep, of, bits, group, zero, threads=0, expand_from=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


FAKES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (nm_rows, nm_tiles)}


def supports(problem: Problem, isa: Isa, tiles: bool) -> Verdict:
    """Whether this machine and this problem fit one of the two kernels of a build."""
    about = dict(problem.detail)
    lacking = build.missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    if problem.dtype not in _FLOATS:
        return Verdict(False, f"activations are {problem.dtype}, not float32, bfloat16 or float16")
    block = int(about.get("block", 0))
    if block % 16:
        return Verdict(False, f"blocks of {block}, the kernels take multiples of 16")
    if problem.bits == 0 and about.get("values") not in _NAMES:
        return Verdict(False, f"values of {about.get('values')}")
    if problem.bits and problem.group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        return Verdict(False, f"groups of {problem.group}, the kernels read {bipolar.GROUPS} or whole channels")
    if not tiles:
        return YES
    if "avx512_bf16" not in build.cpu_flags():
        return Verdict(False, "the processor has no bf16 products")
    if (about.get("keep"), about.get("of")) != (2, 4):
        return Verdict(False, f"tiles hold 2:4 weights, not {about.get('keep')}:{about.get('of')}")
    if problem.bits and problem.bits not in (4, 8):
        return Verdict(False, f"tiles hold codes of 4 or 8 bits, not {problem.bits}")
    if not problem.bits and (about.get("values"), problem.dtype) != ("bfloat16", torch.bfloat16):
        return Verdict(False, f"tiles multiply bf16 values by bf16 activations, not {about.get('values')} by {problem.dtype}")
    return YES


def _call(op: str, isa: Isa, tiles: bool, ensure: Callable[[Isa], None]) -> Callable[..., Tensor]:
    name = "nm_tiles" if tiles else "nm_rows"

    def run(x: Tensor, values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor, left: Tensor | None, right: Tensor | None,
            bias: Tensor | None, n: int, keep: int, of: int, bits: int, group: int, zero: float,
            problem: Problem, config: Config | None = None) -> Tensor:  # fmt: skip
        ensure(isa)
        own = getattr(getattr(torch.ops, isa.namespace), name)
        more = arguments(problem, config, isa.name, tiles)
        y: Tensor = own(x, values, scale, minimum, index, left, right, bias, n, keep, of, bits, group, zero, **more)
        return y

    def nm_linear(x, values, index, bias, n, k, keep, of, **how):  # type: ignore[no-untyped-def]
        return run(x, values, None, None, index, None, None, bias, n, keep, of, 0, 0, 0.0, **how)

    def nm_bipolar_linear(x, codes, scale, minimum, index, bias, n, k, keep, of, bits, group, zero, **how):  # type: ignore[no-untyped-def]
        return run(x, codes, scale, minimum, index, None, None, bias, n, keep, of, bits, group, zero, **how)

    def armor_linear(x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero, **how):  # type: ignore[no-untyped-def]
        return run(x, values, scale, minimum, index, left, right, bias, n, keep, of, bits, group, zero, **how)

    calls: dict[str, Any] = {"nm_linear": nm_linear, "nm_bipolar_linear": nm_bipolar_linear, "armor_linear": armor_linear}
    found: Callable[..., Tensor] = calls[op]
    return found


def _provider(op: str, isa: Isa, tiles: bool, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    layout = "nm_tiles" if tiles else "nm_rows"
    return Provider(
        f"cpu-{isa.name}{'-tiles' if tiles else ''}", op, "cpu", layout, lambda p: supports(p, isa, tiles), _call(op, isa, tiles, ensure),
        NmTuning(isa.name, tiles), lambda: ensure(isa), rank=rank,
    )  # fmt: skip


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the providers of an instruction set; `ensure` builds and loads it on first use."""
    for op in OPERATIONS:
        OPS[op].register(_provider(op, isa, False, rank, ensure))
        if isa.name == "avx512":
            OPS[op].register(_provider(op, isa, True, rank + 1, ensure))


use.on_forget(thresholds.cache_clear)
