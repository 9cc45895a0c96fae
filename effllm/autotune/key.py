"""The key of a measurement: what was run, without the configuration that ran it and without the machine."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from effllm.autotune.fingerprint import Scalar
from effllm.autotune.source import provider_source, source_hash
from effllm.errors import TuneError
from effllm.lowering.op import Problem

__all__ = ["BUCKETS", "SHAPE_FIELDS", "Key", "align_class", "bucket", "problem_fields", "problem_of", "provider_source", "source_hash"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SCALARS = (str, int, float, bool, type(None))
SHAPE_FIELDS = ("n", "k")  # two problems that differ only in these are neighbours


def bucket(m: int) -> int:
    """The bucket of M rows: the smallest that holds them, 2048 for all beyond; an empty activation counts as one row."""
    if m < 0:
        raise TuneError("E-TUN-KEY", f"{m} rows", "give the number of rows of the activation")
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def align_class(*values: int) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides all addresses and strides (in bytes) given."""
    return next(a for a in (16, 8, 4, 2, 1) if all(v % a == 0 for v in values))


@dataclass(frozen=True, eq=False)
class Key:
    """One tuning problem. `source` is the hash of the implementing sources, `m_bucket` a value of `bucket`, `align` of `align_class`.

    Keys are equal where all their fields are, whatever the order of the problem's fields. The list of configurations is not part of
    it: a new configuration costs one measurement, a removed one drops out.
    """

    op: str
    provider: str
    source: str
    problem: Mapping[str, Scalar]
    m_bucket: int
    align: int = 16

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.op):  # names a file
            raise TuneError("E-TUN-KEY", f"the op's name {self.op!r} is not a word", "give the name of a registered op")
        for name in ("m_bucket", "align"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TuneError("E-TUN-KEY", f"{name}={value!r} is not a positive whole number", f"use {'bucket(m)' if name == 'm_bucket' else 'align_class'}")
        object.__setattr__(self, "problem", scalars("problem", self.problem))
        taken = sorted(self.problem.keys() & {f.name for f in fields(self)})
        if taken:  # a comparison field by field shows them side by side
            raise TuneError("E-TUN-KEY", f"the problem has a field named {taken[0]!r}, as the key itself has", "give the field another name")

    @staticmethod
    def of(problem: Problem, provider: str, m: int | None = None, *, source: str | None = None, align: int = 16, **more: Scalar) -> Key:
        """The key of a Problem. `m` overrides its rows; `more` adds fields, such as bias or the layout's version. Raises TuneError."""
        rows = problem.m if m is None else m
        if rows is None:
            raise TuneError("E-TUN-KEY", f"{problem.op}: the number of rows is dynamic", "give m")
        return Key(problem.op, provider, source or provider_source(provider, problem.op), problem_fields(problem) | more, bucket(rows), align)

    @functools.cached_property
    def text(self) -> str:
        """The key as canonical JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @functools.cached_property
    def family(self) -> str:
        """What keys share that differ in M alone."""
        return json.dumps(self.to_dict() | {"m_bucket": 0}, sort_keys=True)

    @functools.cached_property
    def kind(self) -> str:
        """What keys share that differ in N and K alone."""
        return json.dumps(self.to_dict() | {"problem": {f: v for f, v in self.problem.items() if f not in SHAPE_FIELDS}}, sort_keys=True)

    @property
    def device(self) -> str:
        """The device type that the problem names; cpu where it names none."""
        return str(self.problem.get("device", "cpu"))

    def to_dict(self) -> dict[str, Any]:
        """All fields in clear, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"problem": dict(self.problem)}

    def flat(self) -> dict[str, Scalar]:
        """Every field by one name, for a comparison field by field."""
        return {"op": self.op, "provider": self.provider, "source": self.source, **self.problem, "m_bucket": self.m_bucket, "align": self.align}

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Key) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)


def problem_fields(problem: Problem) -> dict[str, Scalar]:
    """The fields of a Problem that a key holds: all but the op and M, its detail spread out; dtypes by name, the device by its type."""
    found: dict[str, Scalar] = {}
    for f in fields(problem):
        value = getattr(problem, f.name)
        if f.name not in ("op", "m", "detail"):
            found[f.name] = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    return found | dict(problem.detail) | {"device": torch.device(problem.device).type}


def problem_of(key: Key) -> Problem | None:
    """The Problem behind a key, with the bucket as its rows; None where the key lacks a field of one."""
    names = {f.name for f in fields(Problem)}
    values: dict[str, Any] = {f: getattr(torch, str(v), None) if f.endswith("dtype") else v for f, v in key.problem.items() if f in names}
    detail = tuple(sorted((f, v) for f, v in key.problem.items() if f not in names and isinstance(v, str | int | float)))
    try:
        return Problem(key.op, **values, m=key.m_bucket, detail=detail)
    except TypeError:
        return None


def scalars(what: str, values: Mapping[str, Any]) -> dict[str, Scalar]:
    """A copy of a mapping to strings, numbers, booleans and None. Raises TuneError (E-TUN-KEY) for anything else."""
    for name, value in values.items():
        # NaN and infinity have no JSON form
        if not isinstance(name, str) or not isinstance(value, _SCALARS) or (isinstance(value, float) and not math.isfinite(value)):
            raise TuneError("E-TUN-KEY", f"{what}: {name}={value!r} cannot be stored", "use strings, finite numbers, booleans or None")
    return dict(values)
