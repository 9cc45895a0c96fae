"""C++ kernels against PyTorch's stable ABI, built at first use: AVX-512 VNNI, AVX2, and portable C++.

A family of kernels is a module with `FAKES`, the shape functions of its C++ ops by name, and `register(isa, rank, ensure)`, which adds its providers
for one instruction set. It is listed in FAMILIES.
"""

from __future__ import annotations

import torch

from effllm.errors import KernelError
from effllm.kernels.cpu import bipolar, build, kv, kv_formats, lowrank, lowrank_bipolar, monarch, nm, pie, prompt, segments, skip
from effllm.kernels.cpu.build import ISAS, Isa
from effllm.kernels.cpu.verdict import supports

__all__ = ["FAMILIES", "ensure", "register", "supports"]

FAMILIES = (bipolar, kv, kv_formats, lowrank, lowrank_bipolar, monarch, nm, pie, prompt, segments, skip)
_loaded: set[str] = set()


def ensure(isa: Isa) -> None:
    """Build and load one instruction set's ops, and give them fakes."""
    if isa.name in _loaded:
        return
    lacking = build.missing(isa)
    if lacking:
        raise KernelError("E-KRN-ISA", f"this processor lacks {', '.join(lacking)}", "use another kernel")
    torch.ops.load_library(str(build.build(isa)))
    for family in FAMILIES:
        for name, fake in family.FAKES.items():
            torch.library.register_fake(f"{isa.namespace}::{name}", fake)
    _loaded.add(isa.name)


def register() -> None:
    """Add the CPU providers to the ops. Builds nothing yet."""
    for rank, isa in enumerate(reversed(ISAS), start=1):
        for family in FAMILIES:
            family.register(isa, rank, _ensure)


def _ensure(isa: Isa) -> None:
    ensure(isa)  # looked up at every call, so that a test can put a failing compiler in its place
