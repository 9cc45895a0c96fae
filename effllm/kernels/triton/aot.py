"""Compile a kernel for a GPU that is not there, and read what it will use of one.

NVIDIA resources come from the cubin through `cuobjdump`, which the Triton wheel carries; AMD's from the code object's metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effllm.errors import KernelError, nearest

TARGETS: dict[str, GPUTarget] = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """Per thread: registers and spilled (NVIDIA: bytes of local memory; AMD: spilled vector registers). Shared memory in bytes per program."""

    registers: int
    spills: int
    shared: int


def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise KernelError("E-KRN-TOOL", f"the installed Triton has no {name}", "install the triton wheel from PyPI")
    return str(path)


def compile_for(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], target: str,
    *, num_warps: int = 4, num_stages: int = 2, aligned: tuple[str, ...] = (),
) -> tuple[Resources, Any]:  # fmt: skip
    """Compile `kernel` for a name in TARGETS; returns its resources and the compiled object (its `asm` holds every stage).

    `signature` maps the run-time arguments to Triton types ("*fp16", "i32", "fp32"), `constants` the constexpr ones and those
    passed as None to their values; `aligned` names arguments that are multiples of 16.
    """
    if target not in TARGETS:
        raise KernelError("E-KRN-TARGET", f"unknown compile target {target!r}", nearest(target, TARGETS))
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constexprs=dict(constants), attrs=attrs)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, "num_stages": num_stages})
    return _resources(compiled, target), compiled


def _resources(compiled: Any, target: str) -> Resources:
    shared = int(compiled.metadata.shared)
    if target.startswith("hip:"):
        text = compiled.asm["amdgcn"]

        def value(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            if found is None:
                raise KernelError("E-KRN-META", f"no {key} in the code object's metadata", "report the Triton version with this message")
            return int(found.group(1))

        return Resources(value("vgpr_count"), value("vgpr_spill_count"), shared)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    registers, local = re.search(r"REG:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    if registers is None or local is None or stack is None:
        raise KernelError("E-KRN-META", "cuobjdump printed no resource usage", "report the Triton version with this message")
    return Resources(int(registers.group(1)), int(local.group(1)) + int(stack.group(1)), shared)


def sass(compiled: Any) -> str:
    """The machine code of an NVIDIA kernel, disassembled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
