"""The op registry: a plain-torch reference per op, providers that run it, and verdicts that say why one does not.

An op's reference is schema, fake and oracle at once. A provider is one way to run the op on one kind of device. The graph op
itself is registered as composite: it decomposes into the chosen provider's own op (or into the reference's torch ops), so any
backend can trace it and nothing of it costs Python time in a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from effllm.autotune.cost import Prediction
    from effllm.autotune.inputs import Generator

LIBRARY = torch.library.Library("effllm", "FRAGMENT")


@dataclass(frozen=True)
class Verdict:
    """Whether a provider takes a problem, and why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Verdict(True)
Config = Mapping[str, Any]  # one way to run a problem: field name -> string or number


@dataclass(frozen=True)
class Problem:
    """What a provider must know about a call. `m` is None where the number of rows is dynamic.

    `bits` is 0 where the stored values are floating point. `detail` holds an op's own sizes by name, sorted: rank, blocks, pattern.
    """

    op: str
    n: int
    k: int
    bits: int
    group: int
    affine: bool
    act: str = "a16"
    m: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scale_dtype: torch.dtype = torch.float16
    detail: tuple[tuple[str, str | int | float], ...] = ()

    def at(self, m: int | None) -> Problem:
        """The same problem with another number of rows."""
        return replace(self, m=m)


class Tuning(Protocol):
    """The configurations of a provider: which there are, which may run, and what the cost model says of them."""

    def configs(self, problem: Problem) -> Iterable[Config]:
        """Every legal configuration of a problem with static rows."""
        ...

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run, for one that comes from a store."""
        ...

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The cost model's figures on this machine; dynamic rows count as one."""
        ...

    def first(self, problem: Problem) -> Config:
        """The model's choice."""
        ...


@dataclass(frozen=True)
class Provider:
    """One way to run an op. `call` takes the op's arguments and `config`, a configuration or None for the provider's own choice."""

    name: str
    op: str
    device: str
    layout: str
    supports: Callable[[Problem], Verdict]
    call: Callable[..., Any]
    tuning: Tuning | None = None
    prepare: Callable[[], None] | None = None  # builds or loads what `call` needs; raises KernelError
    late: bool = False  # picks its configuration at each call, for the rows that come, not when a graph is traced
    rank: int = 0  # among providers that support a problem the highest rank wins


def rows_of(value: Any) -> int | None:
    """Rows of an activation (all dimensions but the last), None where dynamic."""
    count = 1
    for size in value.shape[:-1]:
        if not isinstance(size, int):
            return None
        count *= size
    return count


@dataclass
class Op:
    """A registered op with everything a generic contract test needs.

    `inputs` makes random operands (autotune/inputs.py); `problem` reads the problem and the kernel's name off the graph op's
    arguments, which may be fake. An op without the two cannot be tuned.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    cases: Callable[[], list[dict[str, Any]]] = list
    tolerance: dict[torch.dtype, float] = field(default_factory=dict)  # floor of the relative error, by output dtype
    providers: dict[str, Provider] = field(default_factory=dict)
    inputs: Generator | None = None
    problem: Callable[..., tuple[Problem, str]] | None = None

    def register(self, provider: Provider) -> Provider:
        """Add a provider; the last one of a name stays."""
        self.providers[provider.name] = provider
        return provider


OPS: dict[str, Op] = {}


def define(schema: str, reference: Callable[..., Any], composite: Callable[..., Any], **kw: Any) -> Op:
    """Register an op in the `effllm` namespace: its schema, its oracle, and the composite that picks a provider."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, composite, "CompositeImplicitAutograd")
    OPS[name] = Op(name, schema, reference, **kw)
    return OPS[name]
