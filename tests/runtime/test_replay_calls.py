"""Recorded calls of compiled graphs give what calling again gives, and refuse what they do not know."""

from __future__ import annotations

import threading

import torch

from effllm.runtime.replay import Replay, recorded, recording


def graph(a, b, w):
    return (a * w + b,)


def test_replay_with_other_values():
    call = recorded(graph)
    a, b, w = torch.ones(3), torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    with recording() as calls:
        out = call(a, b, w)[0]
    replay = Replay.of(calls, out, (a, b))
    assert replay is not None
    assert torch.equal(replay(2 * a, b + 1), 2 * w + 1)
    w.mul_(10)  # weights are read again, where they are
    assert torch.equal(replay(a, b), w)
    assert replay(torch.ones(4), b) is None and replay(a.double(), b) is None


def test_no_replay_where_the_function_does_more():
    call = recorded(graph)
    a, b, w = torch.ones(3), torch.zeros(3), torch.ones(3)
    with recording() as calls:
        out = call(a, b, w)[0]
    assert Replay.of(calls, out + 0, (a, b)) is None  # something came behind the graph
    assert Replay.of(calls, out, (a, torch.zeros(3))) is None  # an input that never got there
    assert Replay.of([*calls, *calls], out, (a,)) is None  # two graphs
    with recording() as twice:
        same = call(a, a, w)[0]
    assert Replay.of(twice, same, (a,)) is None


def test_other_threads_are_not_recorded():
    call = recorded(graph)
    with recording() as calls:
        other = threading.Thread(target=lambda: call(torch.ones(1), torch.ones(1), torch.ones(1)))
        other.start()
        other.join()
    assert calls == []
