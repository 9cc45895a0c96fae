"""Builds the C++ kernels at first use with the compiler that Inductor uses, and keeps the result.

The key covers sources, flags, compiler, processor and torch version, so a stale library is never loaded. Two processes that
build the same kernel at once are kept apart by a file lock, and the finished library appears by rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from effllm.errors import KernelError
from effllm.kernels.cpu import units
from effllm.runtime.host import cache_root, cpu_flags, cpu_name

HERE = Path(__file__).parent
UNITS = tuple(sorted(p.name for p in HERE.glob("*.cpp")))
SOURCES = (*UNITS, *sorted(p.name for p in HERE.glob("*.h")))
_TARGET = "0x020b000000000000"  # stable ABI as of torch 2.11


@dataclass(frozen=True)
class Isa:
    """One build of the kernels: its name, the C++ class it instantiates, compiler flags, and the processor flags it needs."""

    name: str
    cls: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    @property
    def namespace(self) -> str:
        """The torch.ops namespace of the build."""
        return f"effllm_cpu_{self.name}"


_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"})
ISAS: tuple[Isa, ...] = (
    Isa("avx512", "Avx512", ("-march=native",), _AVX512),
    Isa("avx2", "Avx2", ("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"})),
    Isa("portable", "Portable", (), frozenset()),
)


def missing(isa: Isa) -> list[str]:
    """Processor flags that the build needs and this machine lacks."""
    return sorted(isa.needs - cpu_flags())


def cache_dir() -> Path:
    """Where libraries are kept."""
    return cache_root() / "kernels"


def compiler() -> str:
    """The C++ compiler of Inductor; raises KernelError where there is none."""
    from effllm.compat import inductor_compiler

    found = inductor_compiler()
    if found is None:
        raise KernelError("E-KRN-COMPILER", "no C++ compiler found", "install g++ (Debian: apt-get install g++) or set CXX; until then the reference runs")
    return found


def _command(cxx: str, isa: Isa) -> list[str]:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    defines = [f"-DEFFLLM_NAMESPACE={isa.namespace}", f"-DEFFLLM_ISA={isa.cls}", f"-DTORCH_TARGET_VERSION={_TARGET}"]
    # -O3 doubles the build time for nothing: the hot loops are intrinsics, and these flags unroll and vectorize the rest
    optimize = ["-O2", "-fpeel-loops", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
    return [cxx, "-std=c++20", *optimize, "-fPIC", "-w", *isa.flags, *defines, *include]


def _link(cxx: str, objects: list[Path]) -> list[str]:
    return [cxx, "-shared", *map(str, objects), f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _settings(cxx: str, isa: Isa) -> str:
    """What objects depend on beside their sources."""
    try:
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelError("E-KRN-COMPILER", f"cannot run the compiler {cxx}: {error}", "install g++ or set CXX to a working compiler") from error
    return "\n".join((*_command("", isa), *_link("", []), version, torch.__version__, cpu_name(), ",".join(sorted(cpu_flags()))))


def key(cxx: str, isa: Isa) -> str:
    """Hash over everything the library depends on."""
    digest = hashlib.sha256(_settings(cxx, isa).encode())
    for name in SOURCES:
        digest.update(name.encode() + (HERE / name).read_bytes())
    return digest.hexdigest()[:24]


def build(isa: Isa, directory: Path | None = None) -> Path:
    """The library of an instruction set, built if it is not there. Raises KernelError."""
    cxx = compiler()
    where = directory or cache_dir()
    target = where / f"effllm-{isa.name}-{key(cxx, isa)}.so"
    if target.exists():
        return target
    try:
        where.mkdir(parents=True, exist_ok=True)
        lock = open(where / f"{target.name}.lock", "w")  # noqa: SIM115 - held over the build
    except OSError as error:
        advice = "make it writable, or set XDG_CACHE_HOME to a directory that is"
        raise KernelError("E-KRN-CACHE", f"cannot write the kernel cache {where}: {error.strerror}", advice) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():  # another process was faster
            return target
        print(f"effllm: building the {isa.name} CPU kernels, once for this machine ...", file=sys.stderr, flush=True)
        try:
            objects = units.compile_all(_command(cxx, isa), [HERE / u for u in UNITS], _settings(cxx, isa), where / "objects")
            units.run(_link(cxx, objects), target, f"the {isa.name} library")
        except OSError as error:
            raise KernelError("E-KRN-CACHE", f"cannot write the kernel cache {where}: {error.strerror}", "free some space there") from error
    return target
