"""Keys, environments and measurements for the tests of the store."""

from __future__ import annotations

from typing import Any

from effllm.autotune.fingerprint import Environment
from effllm.autotune.key import Key
from effllm.autotune.measurement import Measurement

HARD = {"kind": "cpu", "model": "Made Up 9000", "isa": "avx2", "threads": 4, "l2": 1 << 20, "l3": 1 << 25, "numa_nodes": 1}
HERE = Environment(HARD, {"torch": "2.13.0", "compiler": "g++ 12"})
OTHER_SOFT = Environment(HARD, {"torch": "2.12.0", "compiler": "g++ 12"})
OTHER_HARD = Environment(HARD | {"threads": 8}, HERE.soft)


def key(m: int = 1, source: str = "aaaa", provider: str = "cpu-avx512", align: int = 16, op: str = "bipolar_linear", **problem: Any) -> Key:
    base = {"n": 576, "k": 1536, "bits": 4, "group": 32, "affine": True, "dtype": "bfloat16", "device": "cpu"}
    return Key(op, provider, source, base | problem, m, align)


def took(us: float | None, bn: int = 64, of: Key | None = None, at: Environment = HERE, status: str = "ok", **more: Any) -> Measurement:
    """A measurement of `us` microseconds with configuration {"bn": bn}."""
    return Measurement(of or key(), {"bn": bn}, status, at, None if us is None else us * 1e-6, **more)
