"""Compiles the C++ units of a library side by side; an object is kept by what it depends on, so that a new kernel compiles alone."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from effllm.errors import KernelError

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"/]+)"', re.MULTILINE)
_FEW = 2  # so many units read the headers by themselves in the time that sharing them takes


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
    target = {unit: directory / f"{unit.stem}-{key(unit, settings)}.o" for unit in units}
    # the largest first: the last one to end is waited for
    todo = sorted((u for u in units if not target[u].exists()), key=lambda u: -sum(p.stat().st_size for p in closure(u)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        shared = _prelude(command, todo, Path(folder))
        list(pool.map(lambda unit: run([*command, *shared, "-c", str(unit)], target[unit], unit.name), todo))
    return [target[unit] for unit in units]


def _prelude(command: list[str], todo: list[Path], folder: Path) -> list[str]:
    """Arguments that let the units share one reading of the headers from outside, a sixth of the time of building them all on two cores."""
    source = todo[0].parent / "prelude.h" if todo else None
    if len(todo) <= _FEW or source is None or not source.exists():
        return []
    header = folder / source.name
    shutil.copy(source, header)
    try:
        run([*command, "-x", "c++-header", str(header)], header.with_name(f"{header.name}.gch"), source.name)  # clang looks for this name too
    except KernelError:
        return []  # this only saves time: the units say what is wrong, if anything is
    return ["-include", str(header)]


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
