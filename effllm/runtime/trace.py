"""Traces of requests: when each arrives, how long its prompt is, how many tokens it wants. One JSON object a line.

    {"arrival": 0.25, "prompt": 130, "new": 40}        seconds, tokens, tokens
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from effllm.errors import OptionError

# medians and spread (of the logarithm) of prompt and answer lengths
KINDS = {"chat": (120, 0.9, 60, 0.6), "code": (500, 0.8, 40, 0.6), "summary": (1500, 0.5, 80, 0.4)}


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    arrival: float
    prompt: int
    new: int


def generate(count: int, rate: float, kind: str = "chat", seed: int = 0, longest: int = 2048) -> list[Arrival]:
    """`count` requests at `rate` a second: exponential gaps, log-normal lengths of a kind in KINDS, prompts of at most `longest` tokens.

    OptionError (E-OPT-TRACE) for a count, rate or length that is not positive, or an unknown kind.
    """
    if count < 1 or not 0 < rate < math.inf or longest < 1 or kind not in KINDS:
        step = f"give positive numbers, and a kind among {', '.join(KINDS)}"
        raise OptionError("E-OPT-TRACE", f"{count} requests of kind {kind!r} at {rate} a second, prompts up to {longest}", step)
    prompt, prompt_spread, new, new_spread = KINDS[kind]
    draw, now, rows = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        length = min(longest, max(1, round(draw.lognormvariate(math.log(prompt), prompt_spread))))
        rows.append(Arrival(round(now, 4), length, max(1, round(draw.lognormvariate(math.log(new), new_spread)))))
    return rows


def write(trace: list[Arrival], path: Path) -> None:
    """One line a request. OptionError (E-OPT-WRITE)."""
    try:
        path.write_text("".join(json.dumps(asdict(a)) + "\n" for a in trace))
    except OSError as error:
        raise OptionError("E-OPT-WRITE", f"cannot write {path}: {error}", "give a path in a folder that exists and is writable") from error


def read(path: Path) -> list[Arrival]:
    """The requests of a file by arrival. OptionError (E-OPT-TRACE) that names the line for anything that is not one."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("E-OPT-TRACE", f"cannot read {path}: {error}", "write one with `effllm trace FILE`") from error
    rows = [_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise OptionError("E-OPT-TRACE", f"{path} has no request", "write one with `effllm trace FILE`")
    return sorted(rows, key=lambda a: a.arrival)


def _row(path: Path, number: int, line: str) -> Arrival:
    try:
        found = json.loads(line)
        ok = isinstance(found, dict) and set(found) == {"arrival", "prompt", "new"} and all(type(found[k]) is int and found[k] > 0 for k in ("prompt", "new"))
        ok = ok and isinstance(found["arrival"], (int, float)) and not isinstance(found["arrival"], bool) and 0 <= found["arrival"] < math.inf
    except ValueError:
        ok = False
    if not ok:
        raise OptionError("E-OPT-TRACE", f"{path}, line {number} is no request: {line[:80]!r}", 'write {"arrival": 0.25, "prompt": 130, "new": 40}')
    return Arrival(float(found["arrival"]), found["prompt"], found["new"])
