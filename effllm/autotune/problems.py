"""The distinct problems of a rewritten graph, with how often each is called, and the order in which to tune them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider


@dataclass(frozen=True)
class Site:
    """A problem with the provider that runs it. `weight` is calls times how often the graph runs; `part` names that graph."""

    problem: Problem
    provider: Provider
    count: int
    part: str = ""
    weight: float = 1.0

    @property
    def seconds(self) -> float:
        """Predicted time of all calls together, with the configuration that the cost model chooses."""
        tuning = self.provider.tuning
        assert tuning is not None
        return tuning.predict(self.problem, tuning.first(self.problem)).seconds * self.weight


def of_graph(gm: fx.GraphModule, part: str = "", runs: float = 1.0) -> list[Site]:
    """The problems of a graph that can be tuned, the largest predicted share first. Layers that share a subgraph count once per call.

    `runs` is how often the graph runs, for weighing it against others. Dynamic rows are left out: there is no one problem to tune.
    """
    counts = _count(gm)
    found = []
    for (problem, kernel), count in counts.items():
        providers.load(problem.device)
        provider = OPS[problem.op].providers.get(kernel)
        if problem.m and provider is not None and provider.tuning is not None and OPS[problem.op].inputs is not None:
            found.append(Site(problem, provider, count, part, count * runs))
    return ordered(found)


def ordered(sites: Iterable[Site]) -> list[Site]:
    """Largest predicted share of the total first."""
    return sorted(sites, key=lambda s: -s.seconds)


def merged(sites: Iterable[Site]) -> list[Site]:
    """One site per problem and kernel: a problem that occurs in several graphs is tuned once."""
    groups: dict[tuple[Problem, str], list[Site]] = {}
    for s in sites:
        groups.setdefault((s.problem, s.provider.name), []).append(s)
    return ordered(
        Site(g[0].problem, g[0].provider, sum(s.count for s in g), ", ".join(dict.fromkeys(s.part for s in g)), sum(s.weight for s in g))
        for g in groups.values()
    )


def _count(gm: fx.GraphModule) -> Counter[tuple[Problem, str]]:
    readers = _readers()
    found: Counter[tuple[Problem, str]] = Counter()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is compat.INVOKE_SUBGRAPH:
            body = node.args[0]
            assert isinstance(body, fx.Node)
            inner = gm.get_submodule(str(body.target))
            assert isinstance(inner, fx.GraphModule)
            found += _count(inner)
        elif node.target in readers:
            found[readers[node.target](*fx.node.map_arg(_arguments(node), compat.example_value))] += 1
    return found


def _readers() -> dict[Any, Callable[..., tuple[Problem, str]]]:
    """Op (packet or overload) -> its `problem` function."""
    found: dict[Any, Callable[..., tuple[Problem, str]]] = {}
    for name, op in OPS.items():
        if op.problem is not None:
            packet = getattr(torch.ops.effllm, name)
            found[packet] = found[packet.default] = op.problem
    return found


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments by position; the modules of a packed model may call an op by keyword."""
    if not node.kwargs:
        return node.args
    names = compat.argument_names(node.target)
    return (*node.args, *(node.kwargs[n] for n in names[len(node.args) :]))
