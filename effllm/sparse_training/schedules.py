"""Progressive Gradient Flow (arXiv 2402.04744): N:M masks that close over training, as pure functions of the step.

MdGf: pruned weights are not cut but scaled by a decay that falls from 1 to 0. SdGf: the pattern itself tightens in equal frames, stepwise
(M-1):M, M/2:M, M/4:M, ..., N:M, or geometrically at constant density 8N:8M, 4N:4M, 2N:2M, N:M.
"""

from __future__ import annotations

import math

from effllm.errors import OptionError

COEFFICIENT = 1e-2
KINDS = ("linear", "exp")


def decay(step: int, total: int, *, kind: str = "linear", coefficient: float = COEFFICIENT, hard: float = 0.1) -> float:
    """Scale of pruned weights at optimizer step 0 <= step < total: max(0, 1 - beta t) or exp(-beta t); 0 in the last share `hard`."""
    if kind not in KINDS:
        raise OptionError("E-OPT-SCHEDULE", f"unknown decay {kind!r}", f"valid: {', '.join(KINDS)}")
    if not (coefficient > 0 and 0 <= hard <= 1 and total > 0 and step >= 0):
        cause = f"step {step} of {total}, coefficient {coefficient}, hard {hard}"
        raise OptionError("E-OPT-SCHEDULE", cause, "give a positive coefficient and total, and a share from 0 to 1")
    if step >= total - round(hard * total):
        return 0.0
    return max(0.0, 1 - coefficient * step) if kind == "linear" else math.exp(-coefficient * step)


def stepwise(n: int, m: int) -> list[tuple[int, int]]:
    """(M-1):M, then M/2:M and on by halves to N:M: log2(M/N) + 1 patterns. M/N has to be a power of two."""
    if n < 1 or m % n or (m // n) & (m // n - 1) or m == n:
        raise OptionError("E-OPT-SCHEDULE", f"{m}/{n} is no power of two above 1", "choose a pattern such as 2:4 or 1:8")
    halves = [(m >> i, m) for i in range(1, (m // n).bit_length())]
    return [(m - 1, m), *halves]


def geometric(n: int, m: int) -> list[tuple[int, int]]:
    """8N:8M, 4N:4M, 2N:2M, N:M."""
    if not 1 <= n < m:
        raise OptionError("E-OPT-SCHEDULE", f"pattern {n}:{m}", "keep fewer than all of every m")
    return [(k * n, k * m) for k in (8, 4, 2, 1)]


def pattern_at(step: int, total: int, sequence: list[tuple[int, int]]) -> tuple[int, int]:
    """The pattern of a step: equal frames, the last one to the end of training and beyond."""
    if total < 1 or step < 0 or not sequence:
        raise OptionError("E-OPT-SCHEDULE", f"step {step} of {total} over {len(sequence)} patterns", "give a positive total and at least one pattern")
    return sequence[min(len(sequence) - 1, step * len(sequence) // total)]
