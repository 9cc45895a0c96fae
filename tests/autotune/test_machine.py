"""Machine figures: plausible values, restored state, monotone peaks."""

from __future__ import annotations

import time

import torch

from effllm.autotune import machine


def test_bandwidth_is_plausible_and_restores_the_threads():
    before = torch.get_num_threads()
    speed = machine.measure_bandwidth(1, nbytes=1 << 24, repeats=2)
    assert 0.5 < speed < 1e5
    assert torch.get_num_threads() == before


def test_describe_names_what_a_figure_depends_on():
    about = machine.describe()
    assert about["threads"] == torch.get_num_threads() and about["torch"] == torch.__version__
    assert about["memory_bytes"] > 1 << 28 and len(about["load_average"]) == 3


def test_peak_rss_rises_with_an_allocation():
    before = machine.peak_rss()
    held = torch.ones(1 << 25)  # 128 MiB of fp32
    assert machine.peak_rss() >= max(before, held.numel() * 4)


def test_own_work_is_not_other_load():
    load, own, start = machine.OtherLoad(), time.process_time(), time.monotonic()
    while time.monotonic() < start + 0.3:
        sum(range(1000))
    share = (time.process_time() - own) / (time.monotonic() - start)
    others = load.cores()
    # what others had is at most what was left; 0.15 is the resolution of the 10 ms clock ticks over 0.3 s and a few cores
    assert others is not None and 0 <= others <= machine.describe()["cores"] - share + 0.15
