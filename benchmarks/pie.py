"""What edit sessions cost and lose on the demo model, with code of networkx as text.

    python benchmarks/pie.py quality [--edits 200] [--each 10] [--dtype float32] [--refresh 16] [--tail 64]
    python benchmarks/pie.py cost [--lengths 2048,4096,8192] [--sizes 1,8,64]
    python benchmarks/pie.py drift [--edits 100]
    python benchmarks/pie.py packed [--cache "kivi(bits=4)"]

quality: contexts of 1024 tokens and more (beginnings of files) that end with a line. An edit inserts, deletes or replaces 4 to 48 tokens,
what is new being code of another file; a fifth of the edits does so in three places at once. Compared to reading everything behind the edit
again: KL of the next token, the same most likely token, and the same greedy next line (up to 24 tokens); for PIE, and for the same
edit without moving keys ("unfixed"); and the KL where nothing but the last token is encoded again (kl_bare).
cost: median seconds of one edit of N tokens in the middle against reading the whole text.
packed: one text of 1024 tokens, 20 edits one after the other; after 1, 5 and 20 of them the KL of the next token of an edited session to a
new session over the same text and cache, for a dense cache and for a packed one. drift: bf16 keys of layer 0 after many edits against those
of the same model in fp64, beside what the bf16 model itself rounds when it reads the final text.
Results go to benchmarks/results/pie.json, rows of other parts stay there; each edit of "quality" also goes to results/pie_quality.jsonl as
soon as it is measured, and a run that was stopped continues behind the edits found there (--fresh forgets them).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.autotune.machine import describe
from effllm.hf.demo import load_demo
from effllm.hf.edit import REFRESH, TAIL, EditSession
from effllm.runtime.edit.plan import Plan
from effllm.runtime.edit.slots import Slots

RESULTS = Path(__file__).parent / "results" / "pie.json"
EDITS = RESULTS.with_name("pie_quality.jsonl")
LINE = 24  # tokens of a next line at most
_BEFORE = {"cache": "dense", "refresh": 0, "tail": 0}  # of rows from before these could be chosen
Edits = list[tuple[int, int, list[int]]]


def files() -> list[str]:
    """Source files of networkx, longest first."""
    spec = importlib.util.find_spec("networkx")
    assert spec is not None and spec.origin is not None
    found = [p.read_text() for p in sorted(Path(spec.origin).parent.rglob("*.py")) if "tests" not in p.parts]
    return sorted(found, key=lambda t: (-len(t), t))


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def context(tokenizer: Any, text: str, low: int, high: int, rng: random.Random) -> list[int]:
    """The beginning of a file, `low` to `high` tokens, up to the end of a line."""
    ids = encode(tokenizer, text)[:high]
    ends = [i + 1 for i, t in enumerate(ids) if i + 1 >= low and "\n" in tokenizer.decode([t])]
    return ids[: rng.choice(ends)] if ends else ids


def made_edit(ids: list[int], filler: list[int], rng: random.Random) -> tuple[list[int], Edits, str]:
    """An edit of a file, the text after it, and its kind."""
    kind = rng.choice(("insert", "delete", "replace"))
    places = 3 if rng.random() < 0.2 else 1
    marks = sorted(rng.sample(range(16, len(ids) - 64, 64), places))
    after, edits, at = list[int](), list[tuple[int, int, list[int]]](), 0
    for mark in marks:
        stop = mark + (0 if kind == "insert" else rng.randint(4, 48))
        o = rng.randrange(len(filler) - 48)
        new = [] if kind == "delete" else filler[o : o + rng.randint(4, 48)]
        edits.append((mark, stop, new))
        after += ids[at:mark] + new
        at = stop
    return after + ids[at:], edits, kind + ("" if places == 1 else "-3")


@contextlib.contextmanager
def unfixed() -> Iterator[None]:
    """Edits leave keys where they were: the stored position counts as the present one."""
    right = Slots.after

    def wrong(self: Slots, plan: Plan, again: Any = ()) -> tuple[Slots, list[int]]:
        slots, encode = right(self, plan, again)
        for p, slot in enumerate(slots.order):
            slots.stored[slot] = p
        return slots, encode

    Slots.after = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        Slots.after = right  # type: ignore[method-assign]


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two rows of logits, nats."""
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum())


def line(session: EditSession, tokenizer: Any, guess: list[int] | None = None) -> list[int]:
    """The greedy next line. Where `guess` is it, which one pass over all of it tells, no token is generated."""
    if guess and int(session.next_token_logits().argmax()) == guess[0] and followed(session, guess[:-1]) == guess[1:]:
        return guess
    return session.generate(LINE, stop=_newlines(tokenizer))


@torch.no_grad()
def followed(session: EditSession, ids: list[int]) -> list[int]:
    """The most likely token behind each of `ids`, appended to the text. The session stays as it is."""
    if not ids:
        return []
    before, n = session._slots, len(session)
    session._reserve(len(ids))
    slots = session._slots.extended(session._slots.take(len(ids)))
    try:
        session._slots = slots
        tables = session._tables(slots.order[n:], high=slots.high)
        session._cache.use(tables)
        at = list(range(n, n + len(ids)))
        mask = session._mask(slots.positions(), at, tables.high)
        out = session.model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([at]), attention_mask=mask, past_key_values=session._cache)
    finally:
        session._slots = before
    tokens: list[int] = out.logits[0].argmax(-1).tolist()
    return tokens


_cache: dict[int, list[int]] = {}


def _newlines(tokenizer: Any) -> list[int]:
    if not _cache:
        _cache[0] = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return _cache[0]


def quality(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per kind of edit, and one for all."""
    model, tokenizer = load_demo(getattr(torch, a.dtype))
    rng = random.Random(0)
    texts = files()
    pool = [t for t in texts if len(t) > 12000]
    filler = encode(tokenizer, texts[len(pool)][:20000])
    run = {"dtype": a.dtype, "refresh": a.refresh, "tail": a.tail, "each": a.each, "longest": a.longest, "cache": a.cache}
    found = _measured(run) if not a.fresh and not a.only else []
    done = len(found)
    start = time.perf_counter()
    base: Any = None
    for i in range(a.edits):
        if i % a.each == 0:
            after, base = context(tokenizer, pool[i // a.each * 7 % len(pool)], 1024, a.longest, rng), None
        ids, edits, kind = made_edit(after, filler, rng)
        if i < done or (a.only and i not in a.only):
            continue  # the random numbers are drawn all the same, so that later edits are those of an unbroken run
        if base is None:
            session = EditSession(model, after, cache=a.cache, capacity=2 * len(after) + 512)  # room for all edits: states can be put back
            base = _state(session)
        about = {"edit": i, "kind": kind, "tokens": len(after), "from_end": len(ids) - edits[-1][0]}
        row = {**about, **compare(session, base, ids, edits, tokenizer, (a.refresh, a.tail))}
        found.append(row)
        if a.only:
            print(row, flush=True)
            continue
        with EDITS.open("a") as file:
            file.write(json.dumps({**run, **row}) + "\n")
        if i % 10 == 9:
            print(f"{i + 1} edits, {time.perf_counter() - start:.0f} s, last {row}", flush=True)
            yield _summary("all", found, a)
    if found and not a.only:
        yield _summary("all", found, a)
        for kind in sorted({f["kind"] for f in found}):
            yield _summary(kind, [f for f in found if f["kind"] == kind], a)


def compare(session: EditSession, state: dict[str, Any], ids: list[int], edits: Edits, tokenizer: Any, again: tuple[int, int]) -> dict[str, Any]:
    """One edit from a state: PIE, PIE with the last token alone encoded again, keys left where they were, and everything behind the edit read again.
    `state` learns the next line."""
    _edit(session, state, edits, (1 << 30, 0))  # everything behind the edit again: full recomputation, less the unchanged beginning
    full, want = session.next_token_logits(), line(session, tokenizer, state["line"])
    state["line"] = want
    start = time.perf_counter()
    encoded = _edit(session, state, edits, again)
    seconds = time.perf_counter() - start
    assert session.ids == ids
    pie, said = session.next_token_logits(), line(session, tokenizer, want)
    _edit(session, state, edits, (0, 0))
    bare = session.next_token_logits()
    with unfixed():
        _edit(session, state, edits, (0, 0))
    bad = session.next_token_logits()
    two = full.double().softmax(-1).topk(2).values.tolist()
    return {
        "kl": kl(full, pie), "unfixed_kl": kl(full, bad), "kl_bare": kl(full, bare), "top1": bool(full.argmax() == pie.argmax()), "line": said == want,
        "margin": two[0] - two[1], "line_tokens": len(want), "encoded": encoded, "edit_s": seconds,
    }  # fmt: skip


def _edit(session: EditSession, state: dict[str, Any], edits: Edits, again: tuple[int, int]) -> int:
    """An edit from a state with `again` tokens behind it and at the end; tokens that passed through the model."""
    _reset(session, state)
    session.refresh, session.tail = again
    return session.edit(edits).encoded


def _measured(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Edits of a run with these settings that a stopped one has left, in order."""
    rows = [json.loads(s) for s in EDITS.read_text().splitlines()] if EDITS.is_file() else []
    of = {r["edit"]: r for r in rows if all({"tail": 0, **r}.get(k) == v for k, v in run.items())}
    return [of[i] for i in range(len(of)) if i in of]


def _state(session: EditSession) -> dict[str, Any]:
    """A copy: new tokens of one edit may take the places of those that it deletes."""
    held = [(layer.keys.clone(), layer.values.clone()) for layer in session._cache.own]
    return {"slots": session._slots, "ids": session._ids, "logits": session._logits, "held": held, "line": None}


def _reset(session: EditSession, state: dict[str, Any]) -> None:
    session._slots, session._ids, session._logits = state["slots"], state["ids"], state["logits"]
    for layer, (keys, values) in zip(session._cache.own, state["held"], strict=True):
        layer.keys.copy_(keys)
        layer.values.copy_(values)


def _summary(kind: str, rows: list[dict[str, Any]], a: argparse.Namespace) -> dict[str, Any]:
    keys = ("kl", "unfixed_kl", "top1", "line", *(("kl_bare", "encoded") if "encoded" in rows[0] else ()))
    mean = {k: statistics.fmean(r[k] for r in rows) for k in keys}
    return {
        "part": "quality", "edits": kind, "dtype": a.dtype, "refresh": a.refresh, "tail": a.tail, "cache": a.cache, "longest": a.longest, "count": len(rows),
        "kl_mean": mean["kl"],
        "kl_median": statistics.median(r["kl"] for r in rows), "kl_max": max(r["kl"] for r in rows), "unfixed_kl_mean": mean["unfixed_kl"],
        "ratio": mean["unfixed_kl"] / mean["kl"], "top1": mean["top1"], "same_line": mean["line"],
        "kl_bare_mean": mean.get("kl_bare"), "encoded_mean": mean.get("encoded"),
    }  # fmt: skip


def cost(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per length of text and size of edit."""
    model, tokenizer = load_demo(getattr(torch, a.dtype))
    ids = [i for t in files() for i in encode(tokenizer, t[:40000])]
    EditSession(model, ids[:8])  # the proof, which is kept for the model
    for length in (int(n) for n in a.lengths.split(",")):
        whole = []
        for _ in range(a.rounds):
            start = time.perf_counter()
            session = EditSession(model, ids[:length], cache=a.cache, refresh=a.refresh, tail=a.tail)
            whole.append(time.perf_counter() - start)
        for form in ("lazy", "eager") if a.cache == "dense" else ("lazy",):
            session.form = form
            for size in (int(n) for n in a.sizes.split(",")):
                times = []
                for _ in range(a.rounds + 1):
                    start = time.perf_counter()
                    session.edit([(length // 2, length // 2, ids[length : length + size])])
                    times.append(time.perf_counter() - start)
                    session.edit([(length // 2, length // 2 + size, [])])
                edit, full = statistics.median(times[1:]), statistics.median(whole)
                yield {
                    "part": "cost", "form": form, "dtype": a.dtype, "length": length, "size": size, "refresh": a.refresh, "tail": a.tail,
                    "cache": a.cache, "edit_s": edit, "full_s": full,
                    "share": edit / full, "cache_bytes": session.cache_bytes,
                    "threads": torch.get_num_threads(),
                }  # fmt: skip


def packed(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows after 1, 5 and 20 edits: what editing loses over a dense cache and over a packed one."""
    model, tokenizer = load_demo(torch.float32)
    rng, texts = random.Random(2), files()
    ids = context(tokenizer, texts[3], 1024, 1200, rng)
    filler = encode(tokenizer, texts[50][:20000])
    kinds = ("dense", a.cache if a.cache != "dense" else "kivi(bits=4)")
    sessions = [EditSession(model, ids, cache=kind, capacity=3000, refresh=a.refresh, tail=a.tail) for kind in kinds]
    for i in range(1, 21):
        ids, edits, _ = made_edit(ids, filler, rng)
        for session in sessions:
            session.edit(edits)
        if i in (1, 5, 20):
            fresh = [EditSession(model, ids, cache=kind).next_token_logits() for kind in kinds]
            for kind, session, new in zip(kinds, sessions, fresh, strict=True):
                now = session.next_token_logits()
                yield {
                    "part": "packed", "cache": kind, "edits": i, "refresh": a.refresh, "tail": a.tail, "tokens": len(ids),
                    "kl_to_fresh": kl(new, now), "kl_to_dense_fresh": kl(fresh[0], now),
                    "segments": session._slots.segments(), "cache_bytes": session.cache_bytes,
                }  # fmt: skip


def drift(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for both forms: error of layer-0 keys after one edit and after many."""
    model, tokenizer = load_demo(torch.bfloat16)
    model.model.layers = model.model.layers[:1]  # nothing else is looked at
    model.config.num_hidden_layers = 1
    wide = copy.deepcopy(model).double()
    ids = encode(tokenizer, files()[0])[:512]
    rng = random.Random(1)
    script: list[Edits] = []
    length = len(ids)
    for _ in range(a.edits):
        at = rng.randrange(length // 2)
        remove = rng.random() < 0.4
        script.append([(at, at + 1, [])] if remove else [(at, at, [rng.choice(ids)])])
        length += -1 if remove else 1
    for form in ("eager", "lazy"):
        session = EditSession(model, ids, form=form, refresh=0, tail=0)  # what moving keys rounds, and nothing encoded anew
        for i, edits in enumerate(script, start=1):
            session.edit(edits)
            if i in (1, a.edits):
                truth, fresh = EditSession(wide, session.ids).keys(0), EditSession(model, session.ids)
                error, own = _key_error(session, truth), _key_error(fresh, truth)
                about = {"part": "drift", "form": form, "edits": i, "segments": session._slots.segments()}
                yield {**about, "rms": error[0], "max": error[1], "model_rms": own[0], "model_max": own[1]}


def _key_error(session: EditSession, truth: Tensor) -> tuple[float, float]:
    """Root mean square and maximum, over the layer-0 keys of the last 200 tokens, of what a query turned in full precision sees less the truth."""
    from effllm.runtime.rotary import rotate, shift_angles, turns

    rotary, slots = session.rotary, session._slots
    stored = session._layer(0).stored()[0][:, :, slots.order].double()
    shifts = torch.tensor([p - slots.stored[s] for p, s in enumerate(slots.order)])
    seen = rotate(stored, *turns(shift_angles(shifts, rotary.omega), torch.float64), rotary.layout)
    off = (seen - truth)[:, :, -200:]  # behind all edits, so moved by each of them
    return float(off.square().mean().sqrt()), float(off.abs().max())


def main() -> None:
    """Print each row and keep it in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "cost", "drift", "packed"))
    parser.add_argument("--edits", type=int)
    parser.add_argument("--each", type=int, default=10, help="edits per context")
    parser.add_argument("--only", type=lambda t: [int(x) for x in t.split(",")], help="quality: only these edits, by number; printed, not kept")
    parser.add_argument("--longest", type=int, default=1536, help="tokens of the longest context")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--refresh", type=int)
    parser.add_argument("--tail", type=int)
    parser.add_argument("--cache", default="dense", help="format of the session's cache")
    parser.add_argument("--fresh", action="store_true", help="quality: measure all edits again")
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--sizes", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    a.edits = a.edits or {"quality": 200, "drift": 100}.get(a.part, 0)
    a.dtype = a.dtype or ("float32" if a.part == "quality" else "bfloat16")
    a.refresh = (REFRESH if a.cache == "dense" else 0) if a.refresh is None else a.refresh
    a.tail = (TAIL if a.cache == "dense" else 0) if a.tail is None else a.tail
    key = ("part", "edits", "form", "dtype", "length", "size", "refresh", "tail", "cache")
    for row in {"quality": quality, "cost": cost, "drift": drift, "packed": packed}[a.part](a):
        print("  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        old = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
        keep = [r for r in old if any((_BEFORE | r).get(k) != (_BEFORE | row).get(k) for k in key)]
        RESULTS.write_text(json.dumps({"machine": describe(), "rows": [*keep, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
