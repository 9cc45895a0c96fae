"""One measurement, and its line in a file: JSON with every field in clear, led by a checksum over the rest of the line.

    {"sum":"8 hex digits","v":1,"op":...,"align":16,"config":{...},"status":"ok","seconds":4.1e-05,...,"hard":{...},"soft":{...}}
"""

from __future__ import annotations

import functools
import json
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from effllm.autotune.fingerprint import Environment, Scalar
from effllm.autotune.key import Key, scalars
from effllm.errors import TuneError, nearest

VERSION = 1
STATUSES = ("ok", "wrong", "error", "timeout", "oom")
_HEAD = len(b'{"sum":"00000000",')
_KEYS = ("op", "provider", "source", "problem", "m_bucket", "align")


class LineError(ValueError):
    """A line that cannot be used; the text says why. `newer` where it is of a later format and not damaged."""

    def __init__(self, reason: str, newer: bool = False) -> None:
        super().__init__(reason)
        self.newer = newer


@dataclass(frozen=True)
class Measurement:
    """A configuration that was tried for a key on a machine.

    `seconds` is the median and `spread` the interquartile range of `n` runs, both in seconds (never relative); None unless the status is ok. `predicted` is
    the cost model's time. `when` is the wall time in seconds since 1970. `seq` orders the lines of one file, also where the clock went
    backwards; the store gives it.
    """

    key: Key
    config: Mapping[str, Scalar]
    status: str
    environment: Environment
    seconds: float | None = None
    spread: float | None = None
    n: int = 0
    predicted: float | None = None
    when: float = field(default_factory=time.time)
    seq: int = 0

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise TuneError("E-TUN-STATUS", f"unknown status {self.status!r}", nearest(str(self.status), STATUSES))
        timed = self.seconds is not None and math.isfinite(self.seconds) and self.seconds > 0
        if (self.status == "ok") != timed:
            raise TuneError("E-TUN-STATUS", f"status {self.status!r} with {self.seconds} seconds", "give a positive time for ok, and none otherwise")
        object.__setattr__(self, "config", scalars("config", self.config))

    @functools.cached_property
    def config_text(self) -> str:
        """The configuration as canonical JSON."""
        return json.dumps(dict(self.config), sort_keys=True)

    @property
    def slot(self) -> tuple[str, str, str]:
        """What a newer measurement replaces: same key, configuration and software (two installations may share a store)."""
        return self.key.text, self.config_text, self.environment.soft_digest


def encode(m: Measurement) -> bytes:
    """The measurement's line, without the newline."""
    # the order is part of the format: what lines share comes first and last, and is parsed once
    data = {
        "v": VERSION,
        **m.key.to_dict(),
        "config": dict(m.config),
        "status": m.status,
        "seconds": m.seconds,
        "spread": m.spread,
        "n": m.n,
        "predicted": m.predicted,
        "when": m.when,
        "seq": m.seq,
        "hard": dict(m.environment.hard),
        "soft": dict(m.environment.soft),
    }
    body = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()[1:]
    return b'{"sum":"%08x",' % zlib.crc32(body) + body


class Shared:
    """Keys and environments that the lines of a file have in common, by their text, each made once: files are read at compile time."""

    def __init__(self) -> None:
        self._keys: dict[bytes, Key] = {}
        self._environments: dict[bytes, Environment] = {}

    def key(self, text: bytes) -> Key:
        """The key in the first part of a line."""
        if text not in self._keys:
            data = json.loads(b"{" + text + b"}")
            self._keys[text] = Key(**{k: data[k] for k in _KEYS})
        return self._keys[text]

    def environment(self, text: bytes) -> Environment:
        """The fingerprints in the last part of a line."""
        if text not in self._environments:
            data = json.loads(b"{" + text)
            self._environments[text] = Environment(data["hard"], data["soft"])
        return self._environments[text]


def decode(line: bytes, shared: Shared | None = None) -> Measurement:
    """The measurement of a line. Raises LineError."""
    start = b'{"sum":"%08x","v":%d,' % (zlib.crc32(line[_HEAD:]), VERSION)
    if not line.startswith(start):
        raise _refusal(line)
    shared = shared or Shared()
    # all other values are scalars and quotes in strings are escaped, so these two can be nowhere else
    config, hard = line.find(b',"config":{'), line.rfind(b',"hard":{')
    try:
        data = json.loads(b"{" + line[config + 1 : hard] + b"}")
        if not isinstance(data["seq"], int) or not isinstance(data["when"], int | float):
            raise LineError("seq or when is not a number")
        return Measurement(
            shared.key(line[len(start) : config]), data["config"], data["status"], shared.environment(line[hard + 1 :]),
            data["seconds"], data["spread"], data["n"], data["predicted"], data["when"], data["seq"],
        )  # fmt: skip
    except TuneError as error:
        raise LineError(error.cause) from error
    except LineError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LineError(f"a field is missing or of the wrong type ({error!r})") from error


def _refusal(line: bytes) -> LineError:
    """Why a line does not begin as one of this format with a matching checksum."""
    try:
        data = json.loads(line)
    except ValueError as error:
        return LineError(f"not JSON ({error})")
    version = data.get("v") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        return LineError(f"format {version}, this version reads up to {VERSION}", newer=True)
    return LineError("the checksum does not match" if version == VERSION else "not a measurement")
