"""Columns of a result row, and the comparisons between the rows of one shape and M."""

from __future__ import annotations

from typing import Any

from effllm.autotune.bench.candidate import Candidate
from effllm.autotune.bench.clock import Times


def describe(candidate: Candidate, at: dict[str, Any]) -> dict[str, Any]:
    """Who: name, version, width, bytes."""
    return {
        "name": candidate.name, "kind": candidate.kind, "version": candidate.version, "op": candidate.op or None,
        "bits": candidate.bits, "act": candidate.act, "packed_bytes": candidate.nbytes,
        "bits_per_weight": 8 * candidate.nbytes / (at["n"] * at["k"]), "copies": candidate.copies,
    }  # fmt: skip


def timed(candidate: Candidate, at: dict[str, Any], times: Times) -> dict[str, Any]:
    """How fast: µs with quartiles, GB/s of packed bytes, GFLOP/s, flops per byte moved; for our kernels the model's figures too."""
    seconds, flops = times.median, 2 * at["m"] * at["n"] * at["k"]
    size = {"int8": 1, "fp32": 4}.get(candidate.act, 2)
    moved = candidate.nbytes + at["m"] * (at["k"] * size + at["n"] * (4 if candidate.act == "fp32" else 2))
    found = {
        "us": seconds * 1e6, "us_quartiles": [q * 1e6 for q in times.quartiles], "samples": len(times.samples), "timed_by": times.how,
        "gb_s": candidate.nbytes / seconds / 1e9, "gflops": flops / seconds / 1e9, "intensity": flops / moved,
    } | candidate.figures()  # fmt: skip
    if found.get("bound_us"):
        found["of_bound"] = found["bound_us"] / found["us"]
    return found


def finish(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to our rows of one shape and M the best peer that keeps at least as many bits, and how many times faster than it we are.

    `times_best_peer` and `times_torch_bf16` are their time over ours: above 1 we are faster.
    """
    timed = [r for r in rows if r["status"] == "timed"]
    torch_bf16 = next((r for r in timed if r["name"] == "torch-bf16"), None)
    for row in timed:
        if torch_bf16 is not None:
            row["times_torch_bf16"] = torch_bf16["us"] / row["us"]
        if row["kind"] == "effllm":
            rivals = [r for r in timed if r["kind"] != "effllm" and r["bits"] >= row["bits"]]
            best = min(rivals, key=lambda r: float(r["us"]), default=None)
            if best is not None:
                row |= {"best_peer": best["name"], "best_peer_version": best["version"], "times_best_peer": best["us"] / row["us"]}
    return rows
