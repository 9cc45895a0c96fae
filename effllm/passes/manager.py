"""Runs passes in the order of their declared edges and checks the graph after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import networkx as nx
from torch import Tensor, fx

from effllm import compat
from effllm.errors import PassError
from effllm.passes.base import Context, Pass, fake_call
from effllm.report import PassReport


def ordered(passes: Sequence[Pass]) -> list[Pass]:
    """Topological order by `requires` and `after`; ties keep the given order. Raises PassError on a cycle or a missing pass."""
    by_name = {p.name: p for p in passes}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(by_name)
    for p in passes:
        for needed in p.requires:
            if needed not in by_name:
                raise PassError("E-PAS-MISSING", f"pass {p.name!r} requires {needed!r}, which is not in the pipeline", f"add {needed!r}")
            graph.add_edge(needed, p.name)
        for earlier in p.after:
            if earlier in by_name:
                graph.add_edge(earlier, p.name)
    position = {p.name: i for i, p in enumerate(passes)}
    try:
        return [by_name[n] for n in nx.lexicographical_topological_sort(graph, key=lambda n: position[n])]
    except nx.NetworkXUnfeasible as error:
        cycle = " -> ".join(a for a, _ in nx.find_cycle(graph))
        raise PassError("E-PAS-CYCLE", f"passes depend on each other: {cycle}", "remove one of these edges") from error


def run(passes: Sequence[Pass], graph: fx.Graph, context: Context) -> list[PassReport]:
    """Run all passes on a graph that is ours; verify after each."""
    reports = []
    for p in ordered(passes):
        context.changed.clear()
        start = time.perf_counter()
        report = p.run(graph, context)
        verify(graph, context, p.name)
        report.seconds = time.perf_counter() - start
        reports.append(report)
    return reports


def verify(graph: fx.Graph, context: Context, name: str) -> None:
    """Lint, and fake values of replaced nodes: same shape, dtype and stride as what they replaced. Raises PassError."""
    try:
        graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise PassError("E-PAS-LINT", f"pass {name!r} left a broken graph: {error}", "report this bug") from error
    for node in context.changed:
        if node.op != "call_function" or node not in context.expected:
            continue
        again = fake_call(graph, node.target, node.args)
        problem = differs(context.expected[node], again) or differs(again, compat.example_value(node))
        if problem:
            raise PassError("E-PAS-SHAPE", f"pass {name!r} changed {problem} of {node.name}", "report this bug")


def differs(a: Any, b: Any) -> str:
    """What differs between two fake values: shape, dtype, stride, device; empty if nothing."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return "" if type(a) is type(b) else "the type"
    if len(a.shape) != len(b.shape) or any(_unequal(x, y) for x, y in zip(a.shape, b.shape, strict=True)):
        return f"the shape, {tuple(a.shape)} to {tuple(b.shape)},"
    if a.dtype != b.dtype:
        return f"the dtype, {a.dtype} to {b.dtype},"
    if any(_unequal(x, y) for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True) if not (isinstance(n, int) and n == 1)):
        return f"the stride, {a.stride()} to {b.stride()},"
    return "" if a.device == b.device else "the device"


def _unequal(x: Any, y: Any) -> bool:
    if isinstance(x, int) and isinstance(y, int):
        return x != y
    # symbolic sizes: compare their expressions, never guard on them
    ex, ey = (getattr(getattr(v, "node", None), "expr", v) for v in (x, y))
    return str(ex) != str(ey)
