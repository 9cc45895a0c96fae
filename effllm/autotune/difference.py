"""A stored entry against what is wanted, field by field: the answer to why it was not used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from effllm.autotune.fingerprint import Environment, Scalar
from effllm.autotune.key import SHAPE_FIELDS, Key
from effllm.autotune.ladder import differing
from effllm.autotune.measurement import Measurement

_WEIGHTS = {"problem": 16.0, "hard": 8.0, "source": 4.0, "provider": 4.0, "align": 4.0, "status": 2.0, "soft": 0.1}


@dataclass(frozen=True)
class Difference:
    """One field. `part` is problem, provider, source, align, m_bucket, status, hard or soft; `effect` what the difference means.

    Effects: "never used", "seed: stale", "near M bucket", "near shape".
    """

    part: str
    field: str
    wanted: Scalar
    entry: Scalar
    effect: str


def compare(m: Measurement, key: Key, now: Environment | None) -> list[Difference]:
    """The fields in which an entry differs from the wanted key and the present machine (None: this machine has no such device)."""
    found = []
    for field in ("provider", "source", "align"):
        wanted, stored = getattr(key, field), getattr(m.key, field)
        if wanted != stored:
            found.append(Difference(field, field, wanted, stored, "never used"))
    for field in differing(key.problem, m.key.problem):
        effect = "near shape" if field in SHAPE_FIELDS else "never used"
        found.append(Difference("problem", field, key.problem.get(field), m.key.problem.get(field), effect))
    if key.m_bucket != m.key.m_bucket:
        found.append(Difference("m_bucket", "m_bucket", key.m_bucket, m.key.m_bucket, "near M bucket"))
    if m.status != "ok":
        found.append(Difference("status", "status", "ok", m.status, "never used"))
    if now is None:
        found.append(Difference("hard", "hardware", f"no {key.device} device here", m.environment.kind, "never used"))
    else:
        for part, effect in (("hard", "never used"), ("soft", "seed: stale")):
            wanted, stored = getattr(now, part), getattr(m.environment, part)
            found += [Difference(part, f"{part}.{f}", wanted.get(f), stored.get(f), effect) for f in differing(wanted, stored)]
    near = {d.effect for d in found if d.effect.startswith("near")}
    # the ladder moves along M or along (N, K), not along both at once
    return [Difference(d.part, d.field, d.wanted, d.entry, "never used") if len(near) > 1 and d.effect in near else d for d in found]


def distance(differences: Sequence[Difference]) -> float:
    """How far an entry is from being used: small where only sizes or versions differ."""
    total = 0.0
    for d in differences:
        if d.field in (*SHAPE_FIELDS, "m_bucket") and isinstance(d.wanted, int) and isinstance(d.entry, int) and d.wanted > 0 and d.entry > 0:
            total += min(abs(math.log2(d.wanted / d.entry)) / 4, 8.0)
        else:
            total += _WEIGHTS.get(d.part, 16.0)
    return total
