"""Where the time of a decoding step goes, as `effllm bench --profile` prints it.

The step program times its own instructions. What its threads spend waiting for each other, and what lies around the program (embedding,
angles, masks, Python), are the rest of the wall time of steps that are timed without any of this; so the table adds up, and
`explained` says how far the profiled steps are from those.
"""

from __future__ import annotations

import re
import statistics
import time
from typing import Any

import torch

from effllm.errors import OptionError
from effllm.hf.variants import Variant
from effllm.runtime.step import StepProgram, programs

_TURNS = 7


def profile(variant: Variant, ids: torch.Tensor, tokens: int = 32) -> dict[str, Any]:
    """Parts of a step in µs, for a variant whose decode is compiled by this backend: {"variant", "step_us", "explained", "parts"}.

    A part is {"part", "us", "share", "calls", "gb_s"}: µs of the step's wall time, that is busy time over all threads divided by their
    number. Raises OptionError (E-OPT-PROFILE) where the step is not one call of a program.
    """
    runner, at = variant.runner, ids.shape[1]
    token = torch.tensor([[int(ids[0, -1])]])

    def steps() -> float:
        runner.start(ids)
        began = time.perf_counter()
        for i in range(tokens):
            runner.decode_step(token, torch.tensor([[at + i]]))
        return (time.perf_counter() - began) / tokens * 1e6

    before = set(programs)
    steps()
    made = [p for p in programs if p not in before]
    if len(made) != 1:
        raise OptionError("E-OPT-PROFILE", f"the step of {variant.name} is not one call of a program", "see the step_program pass in `effllm explain`")
    program = made[0]
    threads, plain, seen = torch.get_num_threads(), [], []
    for _ in range(_TURNS):  # in turns, so that a slow minute hits both
        plain.append(steps())
        program.profile = torch.zeros(len(program.code.steps) + 1, dtype=torch.int64)
        whole = steps()
        seen.append((whole, program.profile.double() / tokens / 1e3))
        program.profile = None
    whole, spent = sorted(seen, key=lambda s: s[0])[len(seen) // 2]
    parts = _parts(program, spent[:-1] / threads)
    inside = float(spent[-1])
    parts.append(_part("waiting for another thread", inside - sum(p["us"] for p in parts), 1, 0))
    parts.append(_part("around the program", whole - inside, 1, 0))
    step = statistics.median(plain)
    for p in parts:
        p["share"] = p["us"] / whole
    return {"variant": variant.name, "threads": threads, "step_us": step, "explained": whole / step, "parts": parts}


def _parts(program: StepProgram, spent: torch.Tensor) -> list[dict[str, Any]]:
    found: dict[str, tuple[float, int, int]] = {}
    for step, us in zip(program.code.steps, spent.tolist(), strict=True):
        name = f"{step.code} {_place(step.label)}" if step.code in ("packed", "packed_a8", "dense", "attend") else step.code
        before = found.get(name, (0.0, 0, 0))
        found[name] = (before[0] + us, before[1] + 1, before[2] + step.read)
    return sorted((_part(name, us, calls, read) for name, (us, calls, read) in found.items()), key=lambda p: -p["us"])


def _place(label: str) -> str:
    """A module's name behind the number of its layer."""
    return re.split(r"\.\d+\.", label)[-1]


def _part(name: str, us: float, calls: int, read: int) -> dict[str, Any]:
    return {"part": name, "us": us, "calls": calls, "gb_s": read / us / 1e3 if read and us else None}
