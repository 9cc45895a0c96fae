"""Compiles the C++ units of a library side by side; an object is kept by what it depends on, so that a new kernel compiles alone."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from effllm.errors import KernelError

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"/]+)"', re.MULTILINE)


def closure(unit: Path) -> list[Path]:
    """The unit and the headers of its folder that it includes, however deep, by name."""
    found, todo = set[Path](), [unit]
    while todo:
        path = todo.pop()
        if path not in found and path.is_file():
            found.add(path)
            todo += [path.parent / name for name in _INCLUDE.findall(path.read_text())]
    return sorted(found)


def key(unit: Path, settings: str) -> str:
    """Hash over the unit, its headers, and what settings says of compiler, flags and machine."""
    digest = hashlib.sha256(settings.encode())
    for path in closure(unit):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def compile_all(command: list[str], units: list[Path], settings: str, directory: Path) -> list[Path]:
    """The objects of the units, in order; those not in directory are compiled, one process per processor. Raises KernelError, OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        # the largest first: the last one to end is waited for
        order = sorted(units, key=lambda u: -sum(p.stat().st_size for p in closure(u)))
        made = dict(zip(order, pool.map(lambda unit: _object(command, unit, directory / f"{unit.stem}-{key(unit, settings)}.o"), order), strict=True))
    return [made[unit] for unit in units]


def _object(command: list[str], unit: Path, target: Path) -> Path:
    if not target.exists():
        run([*command, "-c", str(unit)], target, unit.name)
    return target


def run(command: list[str], target: Path, what: str) -> None:
    """Run a compiler whose output appears at target by rename. Raises KernelError with its message, OSError."""
    handle, temporary = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", temporary], capture_output=True, text=True)
        if done.returncode:
            raise KernelError("E-KRN-BUILD", f"{command[0]} failed on {what}:\n{done.stderr[-2000:]}", "report this with the compiler's version")
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
