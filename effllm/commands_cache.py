"""What `effllm cache` does, from plain arguments to a JSON-ready result: list, why, compact."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from effllm.autotune import artifacts
from effllm.autotune.difference import Difference, compare, distance
from effllm.autotune.fingerprint import Environment, Scalar, environment
from effllm.autotune.key import Key, bucket, problem_of, provider_source
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store
from effllm.errors import TuneError, nearest
from effllm.lowering.op import OPS, YES, Verdict

_NOT_ASKED = ("op", "source")  # of the key: not part of a shape


def listing(directory: Path | None) -> dict[str, Any]:
    """{"store", "rows", "damage", "travels"}: the best configuration per key and machine, and how many were tried for it."""
    store = Store(directory)
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    newest = {m.slot: m for m in store.load()}
    for m in newest.values():
        groups.setdefault((m.environment.hard_digest, m.environment.soft_digest, m.key.text), []).append(m)
    rows = [_row(group) for group in groups.values()]
    rows.sort(key=lambda r: (r["op"], str(r["problem"]), r["m_bucket"], r["when"]))
    travels = artifacts.unavailable() or "with torch.compiler.save_cache_artifacts()"
    return {"store": str(store.directory), "rows": rows, "damage": [str(d) for d in store.damage], "travels": travels}


def compact(directory: Path | None) -> dict[str, Any]:
    """{"store", "files", "kept", "dropped", "damaged"} in lines."""
    store = Store(directory)
    return {"store": str(store.directory)} | asdict(store.compact())


def why(op: str, shape: str, directory: Path | None) -> dict[str, Any]:
    """{"op", "store", "line", "used", "entry", "differences", "damage"}: the nearest entry against what is wanted here and now.

    Fields that the shape leaves out are taken from the entry. Raises TuneError for an unknown op or field and for a shape that cannot be read.
    """
    store = Store(directory)
    entries = store.load()
    _known_op(op, {m.key.op for m in entries})
    asked = _shape(shape, _fields([m for m in entries if m.key.op == op]))
    result: dict[str, Any] = {"op": op, "store": str(store.directory), "used": False, "entry": None, "differences": []}
    result["damage"] = [str(d) for d in store.damage]
    compared = [(distance(diffs), -m.seq, m, wanted, now, diffs) for m in entries if m.key.op == op for wanted, now, diffs in _wanted(m, asked)]
    if not compared:
        return result | {"line": f"the store {store.directory} has no entry of {op}"}
    _, _, entry, wanted, now, differences = min(compared, key=lambda c: c[:2])
    found = store.find(wanted, _legal(wanted), now) if now is not None else None
    if found is None and now is not None:
        differences = [*differences, *_refused(wanted, entry)]
    line = _verdict(entry, differences) if found is None else f"an entry applies: {found.note}"
    best = found.entry if found is not None else entry
    if found is not None:
        differences = compare(best, wanted, now)
    row = _row([best]) | {"hard": dict(best.environment.hard), "soft": dict(best.environment.soft)}
    return result | {"line": line, "used": found is not None, "entry": row, "differences": [asdict(d) for d in differences]}


def _wanted(m: Measurement, asked: dict[str, Scalar]) -> list[tuple[Key, Environment | None, list[Difference]]]:
    """The key and environment to compare an entry with: the shape asked for, on this machine, by the present sources."""
    own: dict[str, Any] = {f: asked[f] for f in ("provider", "align") if f in asked}
    provider = str(own.pop("provider", m.key.provider))
    problem = dict(m.key.problem) | {f: v for f, v in asked.items() if f not in ("m", "m_bucket", "provider", "align")}
    rows = asked.get("m", asked.get("m_bucket", m.key.m_bucket))
    try:
        source = provider_source(provider, m.key.op)
    except TuneError as error:
        source = f"none ({error.cause})"
    key = Key(m.key.op, provider, source, problem, bucket(_whole("m", rows)), _whole("align", own.get("align", m.key.align)))
    now = _environment(key.device)
    return [(key, now, compare(m, key, now))]


def _legal(key: Key) -> Callable[[Mapping[str, Scalar]], Verdict] | None:
    """Whether the key's kernel still takes a configuration; None for a kernel or problem that this version does not have."""
    problem = problem_of(key)
    provider = OPS[key.op].providers.get(key.provider) if problem is not None and key.op in OPS else None
    tuning = provider.tuning if provider is not None else None
    return None if tuning is None or problem is None else lambda config: tuning.legal(problem, config)


def _refused(key: Key, entry: Measurement) -> list[Difference]:
    """The difference that bars an entry whose configuration the kernel does not take any more."""
    legal = _legal(key)
    verdict = legal(entry.config) if legal is not None else YES
    return [] if verdict.ok else [Difference("config", "config", verdict.reason, entry.config_text, "never used")]


def _environment(device: str) -> Environment | None:
    """The fingerprints of a device type here; None where this machine has no such device."""
    import torch

    return None if device == "cuda" and not torch.cuda.is_available() else environment(device)


def _verdict(entry: Measurement, differences: list[Difference]) -> str:
    barred = [d.field for d in differences if d.effect == "never used"]
    if barred:
        return f"no entry applies; the nearest differs in {', '.join(barred)}"
    return f"no entry applies; the nearest has status {entry.status!r}"


def _row(group: list[Measurement]) -> dict[str, Any]:
    best = min(group, key=lambda m: (m.seconds is None, m.seconds or 0.0))
    key = best.key
    return {
        "op": key.op,
        "problem": dict(key.problem),
        "m_bucket": key.m_bucket,
        "align": key.align,
        "provider": key.provider,
        "config": dict(best.config),
        "status": best.status,
        "seconds": best.seconds,
        "spread": best.spread,
        "n": best.n,
        "predicted": best.predicted,
        "tried": len(group),
        "when": best.when,
        "age_days": round(max(0.0, time.time() - best.when) / 86400, 1),
        "state": _state(best),
    }


def _state(m: Measurement) -> str:
    """Whether an entry is used as it is here, is a seed (stale), or is never used, and why."""
    now = _environment(m.environment.kind) if m.environment.kind in ("cpu", "cuda") else None
    if now is None or now.hard != m.environment.hard:
        return "other machine"
    try:
        if provider_source(m.key.provider, m.key.op) != m.key.source:
            return "other sources"
    except TuneError:
        return "unknown provider"
    return "current" if now.soft == m.environment.soft else "stale"


def _known_op(op: str, stored: set[str]) -> None:
    from effllm.lowering import providers


    providers.load("cpu")
    if op not in OPS and op not in stored:
        raise TuneError("E-TUN-OP", f"unknown op {op!r}", nearest(op, {*OPS, *stored}))


def _fields(entries: list[Measurement]) -> set[str]:
    from effllm.lowering.op import Problem

    named = {f for m in entries for f in m.key.flat()} | {f.name for f in fields(Problem)} | {"provider", "align"}
    return named - set(_NOT_ASKED)


def _shape(text: str, valid: set[str]) -> dict[str, Scalar]:
    """Read "m=1,n=576,bits=4". Raises TuneError (E-TUN-SHAPE, E-TUN-FIELD)."""
    found: dict[str, Scalar] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not name or not value:
            advice = "write field=value parts with commas: m=1,n=576,k=1536,bits=4,group=32"
            raise TuneError("E-TUN-SHAPE", f"cannot read {part!r} in the shape {text!r}", advice)
        if name not in valid:
            raise TuneError("E-TUN-FIELD", f"unknown field {name!r}", nearest(name, valid))
        found[name] = _value(value)
    for name in ("m", "m_bucket", "n", "k", "bits", "group", "align"):
        if name in found:
            _whole(name, found[name])
    return found


def _value(text: str) -> Scalar:
    words: dict[str, Scalar] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _whole(name: str, value: Scalar) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TuneError("E-TUN-SHAPE", f"{name}={value} is not a whole number", f"write for example {name}=1")
    return value
