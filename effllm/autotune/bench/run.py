"""The kernel benchmark: for every shape, candidates are built once; for every M they are verified, then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import machine, peers
from effllm.autotune.bench import clock, correlation, ours, roofs, rows
from effllm.autotune.bench.candidate import Candidate, last_level_cache
from effllm.autotune.bench.verify import verify
from effllm.autotune.peers.base import ERRORS, Peer
from effllm.autotune.shapes import Site, sites
from effllm.errors import KernelError, OptionError

HEAD_ROWS = 16  # a prompt's logits are needed for its last token only
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """What to time: shapes of `models`, widths, rows M, ops, peers by name, and seconds of timing for each shape and M."""

    models: Sequence[str] = ("SmolLM2-135M",)
    bits: Sequence[int] = (8, 4)
    rows: Sequence[int] = (1, 16, 512)
    ops: Sequence[str] = tuple(ours.REGISTRY)
    peers: Sequence[str] = ("all",)
    group: int = 32
    device: str = "cpu"
    seconds: float = 2.0


def run(
    plan: Plan, progress: Progress = lambda what, share: None, keep: Callable[[dict[str, Any]], None] = lambda so_far: None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The result described in docs/kernel-benchmarks.md; `keep` gets it after every shape, so that a run that is stopped loses one shape.

    `before` is the result of such a run: shapes that it has are not timed again, and their rows say so ("resumed").
    Raises OptionError for an unknown model, op or peer, and for settings other than those of `before`, before anything runs.
    """
    ours.check(list(plan.ops))
    wanted = [site for model in plan.models for site in sites(model)]
    if before is not None and before["settings"] != settings(plan):
        differ = ", ".join(k for k, v in settings(plan).items() if before["settings"].get(k) != v)
        raise OptionError("E-OPT-RESUME", f"the file has results of other settings: {differ}", "give the same options, or another file")
    rivals, peer_rows = present(peers.chosen(plan.peers), plan.device)
    progress("measuring the machine", 0.0)
    about = machine.describe() | roofs.measure(plan.device)
    cache, load = last_level_cache(plan.device), machine.OtherLoad()
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []

    def result() -> dict[str, Any]:
        now = about | {"last_level_cache_bytes": cache, "other_cores_busy": load.cores()}
        parts = {"peers": peer_rows, "rows": found, "skipped": skipped, "correlation": correlation.by_group(found)}
        return {"machine": now, "settings": settings(plan), **parts}

    for i, site in enumerate(wanted):
        at = {"model": site.model, "layers": list(site.layers), "n": site.n, "k": site.k}
        share = i / len(wanted)
        if before is not None and _take(before, at, found, skipped):
            continue
        progress(f"{site.model} {'/'.join(site.layers)} {site.n}x{site.k}", share)
        dense = random_weight(site, plan.device)
        built, refused = build(site, plan, rivals, dense, cache)
        skipped += [at | r for r in refused]
        for m in plan.rows:
            if site.is_head and m > HEAD_ROWS:
                skipped.append(at | {"m": m, "name": "all", "reason": "a head is computed for the last token of a prompt only"})
                continue
            found += rows.finish(time_one(built, at | {"m": m}, dense, plan))
        built.clear()
        gc.collect()
        keep(result())
    progress("done", 1.0)
    return result()


def _take(before: Mapping[str, Any], at: Mapping[str, Any], found: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> bool:
    """Take over the rows of a shape from an earlier result; False where it has none."""
    same = {kind: [r for r in before[kind] if all(r[k] == v for k, v in at.items())] for kind in ("rows", "skipped")}
    found += [r | {"resumed": True} for r in same["rows"]]
    skipped += same["skipped"]
    return bool(same["rows"])


def present(wanted: Sequence[Peer], device: str) -> tuple[list[Peer], list[dict[str, Any]]]:
    """The peers that can run, and a line on every one that was asked for: version, or why it is missing and how to install it."""
    able, lines = [], []
    for peer in wanted:
        reason = peer.missing(device)
        able += [] if reason else [peer]
        install = peer.install if reason and device in peer.devices else ""
        lines.append({"name": peer.name, "version": None if reason else peer.version(), "missing": reason or None, "install": install or None})
    return able, lines


def build(site: Site, plan: Plan, rivals: Sequence[Peer], dense: Tensor, cache: int) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Every candidate for a shape, and what could not be built, with reasons."""
    built: list[Candidate] = []
    refused: list[dict[str, Any]] = []
    for op in plan.ops:
        for bits in plan.bits:
            try:
                built.append(ours.REGISTRY[op](site, bits, plan.group, plan.device, cache))
            except KernelError as error:
                refused.append({"name": f"{op} {bits} bits", "reason": error.cause})
    for peer in rivals:
        reason = peer.refuses(site.n, site.k, plan.group)
        if not reason:
            try:
                built.append(peer.build(dense, plan.group, cache))
                continue
            except ERRORS as error:
                reason = why(error)
        refused.append({"name": peer.name, "reason": reason})
    return built, refused


def time_one(built: Sequence[Candidate], at: dict[str, Any], dense: Tensor, plan: Plan) -> list[dict[str, Any]]:
    """One row per candidate: "timed", or "wrong" or "failed" with a reason and without times."""
    x = random_activations(at["m"], at["k"], plan.device)
    found: list[dict[str, Any]] = []
    right: list[Candidate] = []
    for candidate in built:
        row = at | rows.describe(candidate, at)
        try:
            candidate.load(x)
            checked = verify(candidate, x, dense if candidate.kind != "effllm" else None)
        except ERRORS as error:
            found.append(row | {"status": "failed", "reason": why(error)})
            continue
        row |= {"error": checked.error, "limit": checked.limit, "against": checked.against}
        found.append(row | {"status": "wrong" if checked.refused else "timed", "reason": checked.refused or None})
        right += [] if checked.refused else [candidate]
    timed = [row for row in found if row["status"] == "timed"]
    load = machine.OtherLoad()
    measured = clock.interleaved(right, plan.seconds, device=plan.device)
    others = load.cores()
    for row, candidate, times in zip(timed, right, measured, strict=True):
        row |= rows.timed(candidate, at, times) | {"other_cores_busy": others}
    return found


def random_weight(site: Site, device: str) -> Tensor:
    """The dense weight (N, K) bf16 that peers quantize."""
    g = torch.Generator(device=device).manual_seed(1)
    return (torch.randn(site.n, site.k, generator=g, device=device) / site.k**0.5).bfloat16()


def random_activations(m: int, k: int, device: str) -> Tensor:
    """Activations (M, K) bf16, rows of different size."""
    g = torch.Generator(device=device).manual_seed(2)
    powers = torch.randint(-3, 4, (m, 1), generator=g, device=device).float()
    return (torch.randn(m, k, generator=g, device=device) * torch.exp2(powers)).bfloat16()


def why(error: BaseException) -> str:
    """The first line of a foreign error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def settings(plan: Plan) -> dict[str, Any]:
    """What was asked, for the result."""
    return {
        "models": list(plan.models), "bits": list(plan.bits), "rows": list(plan.rows), "ops": list(plan.ops), "peers": list(plan.peers),
        "group": plan.group, "grid": ours.GRID, "device": plan.device, "seconds_per_case": plan.seconds,
        "activations": "bf16; int8 ops get activations that are quantized already, peers that quantize do so inside the timed call",
    }  # fmt: skip
