"""A small check of caches over their life, after SCBench (arXiv 2412.10319): one context, several questions, and what becomes of the cache between.

    rows = run(model, sessions, lambda: CompressedCache(model, "kivi(bits=4)"))

A session is a context and turns of (question, answer). Turns are scored on the answer's tokens given the golden ones before, so "right" is what
greedy decoding would have produced. Two modes: in "turns" the context and the first question are one prompt, and every question and its golden answer
stay in the cache for the next one; in "requests" every question starts from the cache as it was after the context alone. Two invariants are
checked bit by bit: a request gives the same logits whatever was asked before it, as on a fresh cache, and the cache goes on as before when it was
written to a file and read back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.hf.kv_evict import EvictingCache, observing


@dataclass(frozen=True)
class Session:
    """Token ids (n,) of a context, and of questions and answers over it."""

    task: str
    context: Tensor
    turns: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Row:
    """A task: shares of right answers at the first turn, at later turns and as requests, mean KL of the dense model's answer distributions to the
    cache's in nats over all turns, bytes of the cache per token after the context, and whether the invariants held."""

    task: str
    first: float
    later: float
    requests: float
    kl: float
    bytes_per_token: float
    isolated: bool
    reloaded: bool


@torch.no_grad()
def run(model: Any, sessions: Sequence[Session], make: Callable[[], Any], dense: Callable[[], Any]) -> list[Row]:
    """One row per task. `make` and `dense` give an empty cache (a CompressedCache or EvictingCache) each time they are called."""
    rows = []
    for task in dict.fromkeys(s.task for s in sessions):
        found = [_session(model, s, make, dense) for s in sessions if s.task == task]
        turns = [f.turns for f in found]
        later = [x for t in turns for x in t[1:]]
        rows.append(Row(
            task, _mean([t[0] for t in turns]), _mean(later), _mean([x for f in found for x in f.requests]), _mean([x for f in found for x in f.kl]),
            _mean([f.bytes_per_token for f in found]), all(f.isolated for f in found), all(f.reloaded for f in found),
        ))  # fmt: skip
    return rows


@dataclass
class _Found:
    turns: list[float]
    requests: list[float]
    kl: list[float]
    bytes_per_token: float
    isolated: bool
    reloaded: bool


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x) if x else float("nan")


def _session(model: Any, s: Session, make: Callable[[], Any], dense: Callable[[], Any]) -> _Found:
    with _seen(model, dense()):
        exact = _turns(model, s, dense())
    with _seen(model, make()):
        made = _turns(model, s, make())
        cache = _read(model, s, make())
        size = cache.nbytes / s.context.shape[0]
        state = cache.snapshot()
        asked = []
        for turn in s.turns:
            cache.restore(state)
            asked.append(_ask(model, cache, *turn))
        alone = _ask(model, _read(model, s, make()), *s.turns[-1])
        cache.restore(state)
        again = _reloaded(cache, make())
        continued = _ask(model, again, *s.turns[-1])
    kl = [float((e.softmax(-1) * (e.log_softmax(-1) - m.log_softmax(-1))).sum(-1).mean()) for e, m in zip(exact, made, strict=True)]
    right = [[_right(logits, turn[1]) for logits, turn in zip(part, s.turns, strict=True)] for part in (made, asked)]
    return _Found(right[0], right[1], kl, size, torch.equal(alone, asked[-1]), torch.equal(continued, asked[-1]))


def _read(model: Any, s: Session, cache: Any) -> Any:
    model(input_ids=s.context[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _turns(model: Any, s: Session, cache: Any) -> list[Tensor]:
    question, answer = s.turns[0]
    prompt = torch.cat((s.context, question))[None]
    first = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0].float()
    rest = _ask(model, cache, answer[:1], answer[1:])[: len(answer) - 1]
    return [torch.cat((first, rest)), *(_ask(model, cache, *turn) for turn in s.turns[1:])]


def _ask(model: Any, cache: Any, question: Tensor, answer: Tensor) -> Tensor:
    """Logits (tokens of the answer, vocabulary), with question and answer in the cache afterwards."""
    at = int(cache.get_seq_length())
    ids = torch.cat((question, answer))[None]
    positions = torch.arange(at, at + ids.shape[1])[None]
    logits: Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0].float()
    return logits[len(question) - 1 : -1].clone()


def _right(logits: Tensor, answer: Tensor) -> float:
    return float(torch.equal(logits.argmax(-1), answer))


def _reloaded(cache: Any, other: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        return other.load(path)


@contextmanager
def _seen(model: Any, cache: Any) -> Iterator[None]:
    with observing(model) if isinstance(cache, EvictingCache) else nullcontext():
        yield
