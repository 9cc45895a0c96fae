"""Traces: reproducible, with the lengths and rates asked for; files that are none are refused by line."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from effllm.errors import OptionError
from effllm.runtime.trace import KINDS, generate, read, write


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_gaps_follow_the_kind(kind: str) -> None:
    trace = generate(4000, 5.0, kind, seed=3, longest=10**9)
    gaps = [b.arrival - a.arrival for a, b in itertools.pairwise(trace)]
    # the standard error of the mean of 4000 exponentials is 1.6 %; of a median of log-normals with sigma 0.9, 1.8 %
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.08)
    assert statistics.median(a.prompt for a in trace) == pytest.approx(KINDS[kind][0], rel=0.08)
    assert statistics.median(a.new for a in trace) == pytest.approx(KINDS[kind][2], rel=0.08)


def test_same_seed_same_trace_and_the_longest_is_kept(tmp_path: Path) -> None:
    one = generate(50, 2.0, "summary", seed=1, longest=900)
    assert one == generate(50, 2.0, "summary", seed=1, longest=900) != generate(50, 2.0, "summary", seed=2, longest=900)
    assert max(a.prompt for a in one) == 900
    write(one, tmp_path / "t.jsonl")
    assert read(tmp_path / "t.jsonl") == one
    write(one[::-1], tmp_path / "t.jsonl")
    assert read(tmp_path / "t.jsonl") == one  # by arrival


@pytest.mark.parametrize(
    "line",
    ["x", "[]", '{"arrival": 0, "prompt": 1}', '{"arrival": 0, "prompt": 0, "new": 1}', '{"arrival": -1, "prompt": 1, "new": 1}',
     '{"arrival": 0, "prompt": 1.5, "new": 1}',
     '{"arrival": 0, "prompt": 1, "new": 1, "x": 1}', '{"arrival": NaN, "prompt": 1, "new": 1}', '{"arrival": true, "prompt": 1, "new": 1}'],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival": 0, "prompt": 1, "new": 1}\n\n' + line + "\n")
    with pytest.raises(OptionError) as error:
        read(path)
    assert error.value.code == "E-OPT-TRACE" and "line 3" in error.value.cause


def test_no_file_no_request_bad_settings(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for bad in (tmp_path / "none", tmp_path / "empty", tmp_path):
        with pytest.raises(OptionError, match="E-OPT-TRACE"):
            read(bad)
    for settings in ((0, 1.0), (1, 0.0), (1, float("inf")), (1, 1.0, "poem")):
        with pytest.raises(OptionError, match="E-OPT-TRACE"):
            generate(*settings)
    with pytest.raises(OptionError, match="E-OPT-WRITE"):
        write([], tmp_path / "no" / "t")
