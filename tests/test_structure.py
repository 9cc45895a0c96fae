"""The rules that keep the package in shape: direction of imports, file sizes, no bare except, a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "effllm").rglob("*.py"))
NAMES = [str(f.relative_to(ROOT)) for f in FILES]

# layer -> what of effllm it may import at module level or below; a prefix stands for everything under it
_BASE = ("effllm.errors", "effllm.recipe", "effllm.report")
_DATA = (*_BASE, "effllm.methods", "effllm.runtime.formats", "effllm.runtime.layouts")
_TUNING = (*_DATA, "effllm.autotune", "effllm.lowering", "effllm.compat", "effllm.runtime.atomic", "effllm.runtime.host")
LAYERS: dict[str, tuple[str, ...]] = {
    "effllm.errors": (),
    "effllm.report": _BASE,
    "effllm.methods": ("effllm.errors", "effllm.methods", "effllm.runtime.formats"),
    "effllm.recipe": (*_BASE, "effllm.runtime.caches.base", "effllm.methods", "effllm.runtime.dense"),
    "effllm.runtime.formats": (*_BASE, "effllm.runtime.formats"),
    "effllm.runtime.layouts": (*_DATA, "effllm.runtime.semi_structured"),
    "effllm.runtime.semi_structured": _DATA,
    "effllm.runtime.dense": ("effllm.compat",),
    "effllm.runtime.rotary": _BASE,
    "effllm.runtime.speculation": (*_BASE, "effllm.runtime.speculation"),
    "effllm.runtime.edit": (*_BASE, "effllm.runtime.rotary", "effllm.runtime.edit"),
    "effllm.solvers": (*_DATA, "effllm.solvers", "effllm.runtime.dense"),
    "effllm.sparse_training": (*_BASE, "effllm.solvers.nm", "effllm.sparse_training"),
    "effllm.recovery": (*_DATA, "effllm.recovery", "effllm.solvers", "effllm.runtime.dense", "effllm.runtime.atomic", "effllm.compat"),
    "effllm.runtime.caches": (*_DATA, "effllm.runtime.caches", "effllm.lowering", "effllm.solvers.kv"),
    "effllm.lowering": (*_DATA, "effllm.runtime.caches", "effllm.runtime.rotary", "effllm.lowering", "effllm.compat", "effllm.kernels", "effllm.autotune"),
    "effllm.runtime.host": (),
    # tuning lies below the kernels, which ask it for configurations; it reaches them through the registry of ops
    "effllm.autotune": _TUNING,
    "effllm.autotune.bench": (*_TUNING, "effllm.__version__"),
    "effllm.kernels": (
        *_DATA, "effllm.runtime.caches", "effllm.lowering", "effllm.kernels",
        "effllm.autotune", "effllm.compat", "effllm.runtime.atomic", "effllm.runtime.host",
    ),
    "effllm.coupling": (*_BASE, "effllm.coupling", "effllm.compat"),
    "effllm.passes": (
        *_BASE, "effllm.coupling", "effllm.methods", "effllm.runtime", "effllm.lowering.op", "effllm.lowering", "effllm.passes", "effllm.compat",
        "effllm.autotune", "effllm.solvers",
    ),
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module of a file, those inside functions included, with its line. `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def module_of(path: Path) -> str:
    """Dotted name of a file."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def under(name: str, prefix: str) -> bool:
    """Whether a dotted name is the prefix or lies below it."""
    return name == prefix or name.startswith(prefix + ".")


def is_external(path: Path, package: str) -> list[int]:
    """Lines on which a file imports a package."""
    return [line for name, line in imports(path) if under(name, package)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_inwards(path: Path) -> None:
    module = module_of(path)
    layer = next((name for name in sorted(LAYERS, key=len, reverse=True) if under(module, name)), None)
    if layer is None:
        return
    wrong = [f"line {line}: {name}" for name, line in imports(path) if under(name, "effllm") and not any(under(name, ok) for ok in LAYERS[layer])]
    assert not wrong, f"{layer} may not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_the_lazy_loader_reaches_kernels_from_lowering(path: Path) -> None:
    module = module_of(path)
    if under(module, "effllm.lowering") or under(module, "effllm.passes"):
        assert not is_external(path, "effllm.kernels")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_transformers_only_in_hf(path: Path) -> None:
    if not under(module_of(path), "effllm.hf") and module_of(path) != "effllm.compat":
        assert not is_external(path, "transformers")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_triton_only_where_it_belongs(path: Path) -> None:
    module = module_of(path)
    if not under(module, "effllm.kernels.triton") and module != "effllm.autotune.measure":
        assert not is_external(path, "triton")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_file_is_small_and_catches_by_name(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_module_has_a_docstring_and_no_pickle(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert not is_external(path, "pickle")


def test_tests_mirror_the_package() -> None:
    # folders that exist in the package: a test folder without its counterpart has lost its subject
    allowed = {"docs", "examples", "benchmarks", "data"}
    for folder in (p for p in (ROOT / "tests").rglob("*") if p.is_dir() and p.name != "__pycache__"):
        part = folder.relative_to(ROOT / "tests")
        assert part.parts[0] in allowed or (ROOT / "effllm" / part).is_dir(), f"tests/{part} mirrors nothing"


def test_import_is_light() -> None:
    code = (
        "import sys, effllm, torch;"
        "bad = [m for m in ('triton', 'transformers', 'matplotlib', 'torch._inductor.compile_fx') if m in sys.modules];"
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_command_line_starts_light() -> None:
    code = "import sys, effllm.cli; assert 'transformers' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
