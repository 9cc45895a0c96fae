"""The known dimensions of every family, read from golden.txt: a line per kind, see `helpers.table`."""

from __future__ import annotations

from pathlib import Path


def _read() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "golden.txt").read_text().splitlines():
        if line.startswith("["):
            rows = found.setdefault(line.strip("[]"), [])
        elif line:
            rows.append(line)
    return found


GOLDEN = _read()
