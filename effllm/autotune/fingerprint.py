"""What a measured time depends on besides the problem: the hardware, and the versions that produced the machine code.

The hard part must be equal for a measurement to be used at all. The soft part may differ: the measurement then is a seed, flagged
as stale. Nothing here is read at import.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from effllm.autotune import machine
from effllm.compat import inductor_compiler
from effllm.errors import TuneError, nearest
from effllm.runtime.host import cpu_name

Scalar = str | int | float | bool | None
_CPUS, _NODES = Path("/sys/devices/system/cpu"), Path("/sys/devices/system/node")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class CpuHardware:
    """A processor as torch uses it here. `isa` joins the vector extensions by spaces; cache sizes in bytes, 0 where unknown."""

    model: str
    isa: str
    threads: int
    l2: int
    l3: int
    numa_nodes: int
    kind: str = "cpu"


@dataclass(frozen=True)
class GpuHardware:
    """A GPU. Memory clock in kHz, bus in bits, sizes in bytes (0 where torch does not tell); `mig` names the slice, empty for a whole GPU."""

    name: str
    multiprocessors: int
    capability: str
    memory_clock: int
    bus: int
    shared: int
    l2: int
    mig: str
    kind: str = "cuda"


@dataclass(frozen=True)
class Software:
    """Versions behind the machine code; None where a part does not take part or cannot be read."""

    torch: str
    compiler: str | None = None
    triton: str | None = None
    ptxas: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class Environment:
    """The hard and the soft fingerprint in clear, as they are stored."""

    hard: Mapping[str, Scalar]
    soft: Mapping[str, Scalar]

    @functools.cached_property
    def hard_digest(self) -> str:
        """Short digest of the hard part: machines of one digest share measurements."""
        return digest(self.hard)

    @functools.cached_property
    def soft_digest(self) -> str:
        """Short digest of the soft part."""
        return digest(self.soft)

    @functools.cached_property
    def kind(self) -> str:
        """The device type, such as cpu or cuda; a word, since it names a file."""
        return re.sub(r"\W", "", str(self.hard.get("kind") or "unknown"))


def digest(fields: Mapping[str, Scalar]) -> str:
    """Twelve hex digits over the fields, whatever their order."""
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()[:12]


def environment(device: str | torch.device = "cpu") -> Environment:
    """The fingerprints of a device as this process sees it now. Raises TuneError for a device type without kernels."""
    where = torch.device(device)
    if where.type == "cpu":
        return Environment(asdict(cpu()), asdict(cpu_software()))
    if where.type == "cuda":
        return Environment(asdict(gpu(torch.cuda.current_device() if where.index is None else where.index)), asdict(gpu_software()))
    raise TuneError("E-TUN-DEVICE", f"no fingerprint for devices of type {where.type!r}", nearest(where.type, ("cpu", "cuda")))


def cpu() -> CpuHardware:
    """The processor with torch's present number of threads."""
    model, isa, l2, l3, nodes = _processor()
    return CpuHardware(model, isa, torch.get_num_threads(), l2, l3, nodes)


@functools.cache
def _processor() -> tuple[str, str, int, int, int]:
    return cpu_name(), " ".join(machine.isa()), cache_bytes(2), cache_bytes(3), len(list(_NODES.glob("node[0-9]*"))) or 1


def cache_bytes(level: int, root: Path = _CPUS) -> int:
    """Size in bytes of the first processor's data or unified cache of a level; 0 where /sys does not tell."""
    for index in sorted(root.glob("cpu0/cache/index*")):
        try:
            found, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        matched = re.fullmatch(r"(\d+)([KMG]?)", size)
        if found == str(level) and kind != "Instruction" and matched:
            return int(matched[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[matched[2]]
    return 0


@functools.cache
def gpu(index: int) -> GpuHardware:
    """A present GPU by its index."""
    return of_properties(torch.cuda.get_device_properties(index))


def of_properties(found: object) -> GpuHardware:
    """The fields of torch's device properties; those that a torch version lacks are 0."""

    def number(name: str) -> int:
        return int(getattr(found, name, 0) or 0)

    name = str(getattr(found, "name", ""))
    slice_ = re.search(r"MIG\s+(\S+)", name)
    return GpuHardware(
        name=name,
        multiprocessors=number("multi_processor_count"),
        capability=str(getattr(found, "gcnArchName", "")).split(":")[0] if torch.version.hip else f"{number('major')}.{number('minor')}",
        memory_clock=number("memory_clock_rate"),
        bus=number("memory_bus_width"),
        shared=number("shared_memory_per_multiprocessor"),
        l2=number("L2_cache_size"),
        mig=slice_[1] if slice_ else "",
    )


@functools.cache
def cpu_software() -> Software:
    """torch and the C++ compiler."""
    path = inductor_compiler()
    return Software(str(torch.__version__), compiler=_first_line([path, "--version"]) if path else None)


@functools.cache
def gpu_software() -> Software:
    """torch, Triton, its ptxas, and the major version of the driver."""
    found = importlib.util.find_spec("triton")  # finds the files, imports nothing
    ptxas = None
    for folder in (found.submodule_search_locations or ()) if found else ():
        text = _output([str(Path(folder) / "backends/nvidia/bin/ptxas"), "--version"])
        matched = re.search(r"V(\d+(?:\.\d+)+)", text or "")
        ptxas = matched[1] if matched else ptxas
    return Software(str(torch.__version__), triton=_package("triton"), ptxas=ptxas, driver=_driver())


def _driver() -> str | None:
    try:
        matched = re.search(r"\s(\d+)\.\d+(?:\.\d+)?\s", _DRIVER.read_text())
    except OSError:
        return None
    return matched[1] if matched else None


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    text = _output(command)
    return text.splitlines()[0].strip() if text else None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout or None
    except (OSError, subprocess.SubprocessError):
        return None
