"""Facts of the host: read from files, with answers where those are missing."""

from __future__ import annotations

from pathlib import Path

from effllm.runtime import host


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host.cache_root() == tmp_path / "effllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert host.cache_root() == tmp_path / "home" / ".cache" / "effllm"


def test_a_field_is_read_whatever_its_padding(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Made Up 9000 : X\nflags\t\t: avx2 fma\nflags : other\n")
    assert host.field_of("model name", file) == "Made Up 9000 : X"
    assert host.field_of("flags", file) == "avx2 fma"
    assert host.field_of("Features", file) is None and host.field_of("flags", Path(tmp_path / "missing")) is None


def test_this_processor_has_a_name():
    assert host.cpu_name() and all(" " not in f for f in host.cpu_flags())
