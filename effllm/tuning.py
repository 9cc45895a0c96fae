"""`effllm.tune`: the problems of a model, each searched with its share of the budget, and what that gained.

Nothing of it runs unless asked for. Results go to the store in the user's cache directory, where every later compilation finds them.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effllm.autotune import problems, search, use
from effllm.autotune.budget import parse_budget
from effllm.autotune.problems import Site
from effllm.autotune.search import Result, Runner
from effllm.autotune.store import Store, open_store
from effllm.autotune.worker import Worker
from effllm.errors import TuneError
from effllm.lowering import providers

DECODE_STEPS = 128  # steps per prefill, for weighing the two
_LEAST = 0.25  # s: the budget of a problem is at least this, or what is left
_OF_THE_PROBLEM = ("E-TUN-PROVIDER", "E-TUN-OP", "E-TUN-SHAPE")  # such as a kernel from outside of effllm: the others can still be tuned
Progress = Callable[[str, float], None]


@dataclass
class Tuned:
    """Sites with their results, in the order in which they were tuned; results are None for those that the budget did not reach."""

    sites: list[Site] = field(default_factory=list)
    results: list[Result | None] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> int:
        """Trials of this run over all problems."""
        return sum(r.measured for r in self.results if r is not None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: one row per problem, times in seconds."""
        rows = [_row(s, r) for s, r in zip(self.sites, self.results, strict=True)]
        return {"rows": rows, "seconds": self.seconds, "measured": self.measured, "notes": self.notes, "summary": summary(self)}


def tune(
    model: nn.Module, recipe: Any = "w8", *, budget: object = "120s", prefill: int = 512, inputs: Any = None,
    store: Path | str | None = None, progress: Progress | None = None, **options: Any,
) -> Tuned:  # fmt: skip
    """Tune the kernels that `torch.compile(model, backend="effllm", options={"recipe": recipe, **options})` would run.

    A causal LM is tuned for decoding one token at a time and for a prompt of `prefill` tokens; any other model for `inputs`, what it
    is called with (a tensor, a tuple, or a dict of keywords). `budget` is a time such as "120s" or "2m"; `store` a directory other
    than the default. Raises OptionError (E-OPT-BUDGET), TuneError and PassError.
    """
    from effllm.backend import Options

    show = progress or (lambda what, share: None)
    seconds = parse_budget(budget)
    start = time.monotonic()
    chosen = Options.parse({"recipe": recipe, **options}, None)
    sites = sites_of(model, chosen, prefill, inputs, show)
    done = tune_sites(sites, seconds - (time.monotonic() - start), store=None if store is None else Store(store), progress=show)
    done.seconds = time.monotonic() - start
    return done


def sites_of(model: nn.Module, options: Any, prefill: int, inputs: Any, show: Progress = lambda what, share: None) -> list[Site]:
    """The distinct problems of a model, by predicted share of the time of a prompt and 128 decoded tokens."""
    from effllm.backend import capture

    found: list[Site] = []
    parts = [("", 1.0, inputs)] if inputs is not None else [("decode", float(DECODE_STEPS), _ids(model, 1)), ("prefill", 1.0, _ids(model, prefill))]
    for i, (part, runs, given) in enumerate(parts):
        show(f"tracing {part or 'the model'}", 0.05 * i)
        done = capture(model, given, replace(options, step="off"), dynamic=False)  # a program hides its kernels
        found += problems.of_graph(done.gm, part, runs) if done is not None else []
    return problems.merged(found)


def _ids(model: nn.Module, length: int) -> dict[str, Any]:
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        raise TuneError("E-TUN-INPUTS", f"{type(model).__name__} takes no input_ids, so its inputs cannot be made up", "give inputs=, what it is called with")
    where = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    given: dict[str, Any] = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=where), "use_cache": False, "logits_to_keep": 1}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    return {k: v for k, v in given.items() if k in names or (takes_all and k == "use_cache")}


def tune_sites(
    sites: Sequence[Site], budget_s: float, *, store: Store | None = None, runner: Runner | None = None, progress: Progress | None = None
) -> Tuned:
    """Search each problem with its predicted share of the budget; what one leaves goes to the next. Raises TuneError."""
    start = time.monotonic()
    done = Tuned(list(sites))
    where = store or open_store()
    worker = None if runner is not None else Worker()
    try:
        for i, site in enumerate(sites):
            left = budget_s - (time.monotonic() - start)
            if progress is not None:
                progress(f"{label(site)} ({i + 1} of {len(sites)})", min(0.99, 0.1 + 0.9 * i / len(sites)))
            verdict = providers.ready(site.provider)
            if left <= 0 or not verdict:
                done.results.append(None)
                done.notes += [] if verdict else [f"{label(site)}: {verdict.reason}"]
                continue
            # at least an even share: what is left over goes to those behind anyway
            weights = [s.seconds for s in sites[i:]]
            share = max(weights[0] / max(sum(weights), 1e-12), 1 / len(weights))
            try:
                result = search.tune(site.provider, site.problem, where, max(share * left, min(_LEAST, left)), runner or worker or Worker())
            except TuneError as error:
                if error.code not in _OF_THE_PROBLEM:
                    raise
                done.results.append(None)
                done.notes.append(f"{label(site)}: {error.cause}")
                continue
            done.results.append(result)
            done.notes += [f"{label(site)}: {n}" for n in result.notes]
    finally:
        if worker is not None:
            worker.close()
        use.forget()  # also after an error: what was measured counts from here on
    done.seconds = time.monotonic() - start
    return done


def label(site: Site) -> str:
    """A problem in a few words."""
    p = site.problem
    act = " a8" if p.act == "a8" else ""
    merged = " merged" if p.op.endswith("_many") else ""
    return f"{p.m}x{p.k}x{p.n} w{p.bits}{act} g{p.group}{merged}"


def summary(done: Tuned) -> str:
    """One line on what was measured and what is missing."""
    open_ = sum(r is None or r.stopped == "budget" or r.stopped.startswith("not measured") for r in done.results)
    if not done.sites:
        return "the model has no kernels that can be tuned"
    if not done.measured and not open_:
        return f"nothing new to measure: the store has {sum(len(r.trials) for r in done.results if r)} trials of these {len(done.sites)} problems"
    text = f"{done.measured} new trials on {len(done.sites)} problems in {done.seconds:.1f} s"
    return text if not open_ else f"{text}; {open_} problems are not finished: run again, what was measured is kept"


def _row(site: Site, result: Result | None) -> dict[str, Any]:
    total = {"problem": label(site), "op": site.problem.op, "part": site.part, "count": site.count, "kernel": site.provider.name}
    best, first = (result.best, result.first) if result is not None else (None, None)
    before = first.seconds if first is not None else None
    after = best.seconds if best is not None else None
    return total | {
        "config": dict(best.config) if best is not None else None,
        "first_s": before,
        "tuned_s": after,
        "gain": before / after - 1 if before and after else None,
        "bound_share": result.bound / after if result is not None and after else None,
        "trials": len(result.trials) if result is not None else 0,
        "new": result.measured if result is not None else 0,
        "spearman": result.spearman if result is not None else None,
        "stopped": result.stopped if result is not None else "not reached",
    }
