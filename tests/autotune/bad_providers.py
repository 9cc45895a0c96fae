"""A provider whose configurations crash, hang, lie or fail: what a search must survive. Registered only in worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from effllm.autotune.cost import Prediction
from effllm.lowering.bipolar_linear import linear_reference
from effllm.lowering.op import OPS, YES, Config, Problem, Provider, Verdict

WAYS = ("right", "abort", "segfault", "killed", "exit", "hang", "raise", "memory", "wrong", "swapped", "unwritten", "late")
_calls: dict[str, int] = {}


class BadTuning:
    """One configuration per way to fail; all are predicted alike but for their order."""

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from ({"way": way} for way in WAYS)

    def legal(self, problem: Problem, config: Config) -> Verdict:
        return YES if config.get("way") in WAYS else Verdict(False, "no such way")

    def predict(self, problem: Problem, config: Config) -> Prediction:
        return Prediction(1.0, 1.0, 1.0, 1e-6 * (1 + WAYS.index(config["way"]) / 100), 1e-9)

    def first(self, problem: Problem) -> Config:
        return {"way": "right"}


def call(x: Any, codes: Any, scale: Any, *rest: Any, problem: Problem, config: Config) -> Any:
    way = config["way"]
    _calls[way] = _calls.get(way, 0) + 1
    if way == "abort":
        os.abort()
    if way == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "exit":
        os._exit(3)
    if way == "hang":
        time.sleep(600)
    if way == "raise":
        raise ValueError("this candidate has no such tile")
    if way == "memory":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    if way == "late" and _calls[way] > 3:
        os.abort()
    if way == "swapped":  # only random scales show this
        scale = scale[:, torch.arange(scale.shape[1]) ^ 1]
    y = linear_reference(x, codes, scale, *rest)
    if way == "wrong":
        y[..., -1] *= 1.5
    if way == "unwritten":
        y = torch.empty_like(y)
    return y


PROVIDER = Provider("bad", "bipolar_linear", "cpu", "planes", lambda p: YES, call, BadTuning(), rank=-5)


def register() -> None:
    OPS["bipolar_linear"].register(PROVIDER)
