"""Building the C++ kernels: cache key, missing compiler, unwritable cache, two processes at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from effllm.errors import KernelError
from effllm.kernels.cpu import build
from effllm.kernels.cpu.build import ISAS

PORTABLE = next(i for i in ISAS if i.name == "portable")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the compiler that writes its output file after a moment and counts its calls."""
    script = tmp_path / "cxx"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo quick 1.0; exit 0; fi\n'
        f'echo run >> "{tmp_path}/calls"\n'
        'while [ "$#" -gt 1 ]; do if [ "$1" = -o ]; then sleep 0.3; echo library > "$2"; exit 0; fi; shift; done; exit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(script))
    return tmp_path


def test_built_once_and_kept(quick: Path) -> None:
    cache = quick / "cache"
    first = build.build(PORTABLE, cache)
    assert first.read_text() == "library\n" and build.build(PORTABLE, cache) == first
    assert (quick / "calls").read_text().count("run") == len(build.UNITS) + 2  # what they share, each unit, and the library
    assert sorted(p.suffix for p in cache.iterdir() if p.is_file()) == [".lock", ".so"]  # nothing half done lies about
    assert sorted(p.name.split("-")[0] for p in (cache / "objects").iterdir()) == sorted(Path(u).stem for u in build.UNITS)


def test_a_compiler_that_cannot_share_headers_builds_without(quick: Path) -> None:
    cxx = Path(build.compiler())
    cxx.write_text(cxx.read_text().replace("#!/bin/sh\n", '#!/bin/sh\ncase "$*" in *c++-header*) exit 1;; *-include*) exit 2;; esac\n'))
    assert build.build(PORTABLE, quick / "cache").exists()
    assert (quick / "calls").read_text().count("run") == len(build.UNITS) + 1


def test_only_what_changed_is_compiled(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quick / "sources"
    folder.mkdir()
    (folder / "a.cpp").write_text('#include "deep.h"\n')
    (folder / "deep.h").write_text('#include "deeper.h"\n')
    (folder / "deeper.h").write_text("")
    (folder / "b.cpp").write_text("#include <vector>\n")
    monkeypatch.setattr(build, "HERE", folder)
    monkeypatch.setattr(build, "UNITS", ("a.cpp", "b.cpp"))
    monkeypatch.setattr(build, "SOURCES", ("a.cpp", "b.cpp", "deep.h", "deeper.h"))

    def calls() -> int:
        build.build(PORTABLE, quick / "cache")
        return (quick / "calls").read_text().count("run")

    assert calls() == 3 and calls() == 3
    (folder / "deeper.h").write_text("int x;")
    assert calls() == 5  # a and the library
    (folder / "b.cpp").write_text("")
    assert calls() == 7


def test_key_covers_flags_compiler_and_sources(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx = build.compiler()
    base = build.key(cxx, PORTABLE)
    assert base == build.key(cxx, PORTABLE)
    assert base != build.key(cxx, dataclasses.replace(PORTABLE, flags=("-mtune=native",)))
    monkeypatch.setattr(build, "cpu_name", lambda: "another processor")
    assert base != build.key(cxx, PORTABLE)
    monkeypatch.undo()
    Path(cxx).write_text(Path(cxx).read_text().replace("quick 1.0", "quick 1.1"))
    assert base != build.key(cxx, PORTABLE)


def test_two_processes_build_one_library(quick: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from effllm.kernels.cpu import build\n"
        f"build.compiler = lambda: {build.compiler()!r}\n"
        f"print(build.build(next(i for i in build.ISAS if i.name == 'portable'), Path({str(quick / 'cache')!r})))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [r.communicate()[0].strip() for r in runs]
    assert [r.returncode for r in runs] == [0, 0] and out[0] == out[1] and Path(out[0]).exists()
    assert (quick / "calls").read_text().count("run") == len(build.UNITS) + 2


def test_failing_compiler_shows_its_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\necho "bad flag" >&2; exit 3\n')
    script.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(script))
    with pytest.raises(KernelError, match="bad flag") as caught:
        build.build(PORTABLE, tmp_path / "cache")
    assert caught.value.code == "E-KRN-BUILD"
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".so"]


def test_no_compiler_is_an_error_with_a_next_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("effllm.compat.inductor_compiler", lambda: None)
    with pytest.raises(KernelError) as caught:
        build.build(PORTABLE, tmp_path)
    assert caught.value.code == "E-KRN-COMPILER" and "g++" in caught.value.next_step


def test_unwritable_cache_is_an_error_with_a_next_step(quick: Path) -> None:
    (quick / "file").write_text("")
    with pytest.raises(KernelError) as caught:
        build.build(PORTABLE, quick / "file" / "cache")
    assert caught.value.code == "E-KRN-CACHE" and "XDG_CACHE_HOME" in caught.value.next_step


def test_processor_without_the_instructions_is_refused_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from effllm.kernels import cpu
    from effllm.lowering.op import Problem

    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"sse2"}))
    verdict = cpu.supports(Problem("bipolar_linear", 16, 32, 4, 32, False, dtype=torch.float32), ISAS[0])
    assert not verdict and "avx512_vnni" in verdict.reason
