"""A hash over the sources that implement a kernel, helpers included: a measurement of other code is not used.

The walk starts at the files given and follows, to any depth,

* in Python: imports of modules below WITHIN, and names of such modules in string constants. `from package import name` leads to the
  submodule `name`, or else to the package's own file. A package's file is not followed merely because a module of it is imported:
  it registers things, and would tie every kernel to every other;
* in C++: quoted includes, relative to the including file.

A module that is left out on purpose (a cost model or a chooser changes which configuration runs, not how fast it is) is named in
`without`. An edge that leads nowhere is an error. Files are only read: nothing is imported, so Triton is not either.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from effllm.autotune import normal
from effllm.errors import TuneError, nearest

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
KERNELS = ROOT / "effllm" / "kernels"
WITHIN = ("effllm.kernels", "effllm.runtime.layouts")
_CPP = (".cpp", ".h", ".hpp", ".cu", ".cuh")


def source_hash(files: Iterable[Path], *, without: Iterable[str] = (), within: Iterable[str] = WITHIN, root: Path = ROOT) -> str:
    """Sixteen hex digits over the files and all they reach. Raises TuneError where a file is missing or cannot be parsed.

    `without` holds dotted module names that are not followed; `within` the packages whose modules are; `root` is the folder of the packages.
    """
    digest = hashlib.sha256()
    for path in reachable(files, without=without, within=within, root=root):
        text = _read(path)
        try:
            plain = normal.python(text) if path.suffix == ".py" else normal.cpp(text)
        except SyntaxError as error:
            raise TuneError("E-TUN-SOURCE", f"cannot parse {path}: {error.msg} (line {error.lineno})", "mend the file") from error
        # the name counts: two files that swap their contents are other sources
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        digest.update(f"{name}\0{len(plain)}\0{plain}".encode())
    return digest.hexdigest()[:16]


def reachable(files: Iterable[Path], *, without: Iterable[str] = (), within: Iterable[str] = WITHIN, root: Path = ROOT) -> list[Path]:
    """The files given and every file that the walk reaches, sorted. Raises TuneError as `source_hash` does."""
    left_out, packages = frozenset(without), tuple(within)
    waiting = [Path(f).resolve() for f in files]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            edges = _cpp_edges(path) if path.suffix in _CPP else _python_edges(path, left_out, packages, root)
            waiting += [edge.resolve() for edge in edges]
    return sorted(seen)


# op, by how its name begins -> the file that launches its Triton kernels, and so reaches them; launch.py for all others
_LAUNCHERS = {
    "armor": "nm_launch.py",
    "kv_append": "kv_append_launch.py",
    "kv_attend": "kv_attend_launch.py",
    "lowrank_bipolar": "lowrank_bipolar_launch.py",
    "lowrank": "lowrank_launch.py",
    "monarch": "monarch_launch.py",
    "nm": "nm_launch.py",
    "packed_attention": "segments_launch.py",
    "pie": "pie.py",
    "rotated_attention": "rotated_launch.py",
    "rsparse": "skip_launch.py",
    "sparse_lowrank": "lowrank_launch.py",
    "sparse": "skip_launch.py",
}


def launcher(op: str) -> str:
    """The file of kernels/triton that launches an op's kernels."""
    return next((file for start, file in _LAUNCHERS.items() if op.startswith(start)), "launch.py")


@functools.cache
def provider_source(provider: str, op: str) -> str:
    """The source hash of a kernel provider for an op. Raises TuneError for a provider that has nothing to tune.

    Cached: sources do not change under a running process.
    """
    if provider.split("-")[0] == "triton":
        # which configuration is chosen, and for what machine, is not part of how a kernel runs
        modules = ("choose", "cost", "kv_cost", "rotated_cost", "space", "lowrank_cost", "monarch_choose")
        return source_hash([KERNELS / "triton" / launcher(op)], without=[f"effllm.kernels.triton.{m}" for m in modules])
    if provider.startswith("cpu-"):
        units = sorted((KERNELS / "cpu").glob("*.cpp"))
        own = [u for u in units if u.stem in op]  # bipolar.cpp for bipolar_linear_a8
        return source_hash([*(own or units), KERNELS / "cpu" / "build.py"])  # the builder holds the compiler's flags
    raise TuneError("E-TUN-PROVIDER", f"provider {provider!r} has no sources to tune", nearest(provider, ("triton", "cpu-avx512", "cpu-avx2", "cpu-portable")))


def _cpp_edges(path: Path) -> Iterator[Path]:
    for name in normal.included(_read(path)):
        target = path.parent / name
        if not target.is_file():
            raise TuneError("E-TUN-SOURCE", f"{path} includes {name}, which is not there", "restore the file")
        yield target


def _python_edges(path: Path, without: frozenset[str], within: tuple[str, ...], root: Path) -> Iterator[Path]:
    package = ".".join(path.relative_to(root).with_suffix("").parts[:-1]) if path.is_relative_to(root) else ""
    try:
        names = normal.imported(_read(path), package)
    except SyntaxError as error:
        raise TuneError("E-TUN-SOURCE", f"cannot parse {path}: {error.msg} (line {error.lineno})", "mend the file") from error
    for name, must in names:
        if any(name.startswith(p + ".") for p in within):
            target = _file_of(name, root)
            if target is None and must:
                raise TuneError("E-TUN-SOURCE", f"{path} imports {name}, which is not there", "restore the file")
            if target is not None and _module_of(target, root) not in without:
                yield target


def _file_of(name: str, root: Path) -> Path | None:
    """The file of a module, or of the module that holds the name."""
    for dotted in (name, name.rpartition(".")[0]):
        base = root.joinpath(*dotted.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def _module_of(path: Path, root: Path) -> str:
    parts = path.resolve().relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuneError("E-TUN-SOURCE", f"cannot read the source {path}: {error}", "restore the file") from error
