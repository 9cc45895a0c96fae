"""What a rule sees of one call in a graph, and the table of rules by operator name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from effllm.coupling.axes import Expr, fresh, unify

Axes = list[Expr]
Result = Axes | list[Axes]


@dataclass
class Call:
    """One operator call: arguments by name, the axes of its operands, and the sizes of its results.

    A rule returns the axes of the result, a list of them for several results. `reduced` takes the axes that remain inside an operation after a sum
    that the result does not show (a softmax): what is permuted differently along the summed axes must know of it. `summed` takes
    (operand, axis) pairs that a matrix product sums over.
    """

    node: fx.Node
    op: str
    args: dict[str, Any]
    values: dict[fx.Node, Any]
    reduced: list[Axes] = field(default_factory=list)
    summed: list[tuple[fx.Node, int]] = field(default_factory=list)

    @property
    def why(self) -> str:
        """The call's name in a reason."""
        return f"{self.op.rsplit('.', 1)[-1]} ({self.node.name})"

    def axes(self, name: str) -> Axes:
        """The axes of a tensor argument."""
        return self.of(self.args[name])

    def of(self, node: fx.Node) -> Axes:
        """The axes of an operand."""
        found: Axes = self.values[node]
        return found

    def has(self, name: str) -> bool:
        """Whether an optional tensor argument is given."""
        return isinstance(self.args.get(name), fx.Node)

    @property
    def out_sizes(self) -> list[int]:
        """Sizes of the (first) result."""
        value = self.node.meta["val"]
        first = value if isinstance(value, Tensor) else next(v for v in value if isinstance(v, Tensor))
        return [int(s) for s in first.shape]

    @property
    def all_sizes(self) -> list[list[int]]:
        """Sizes of every result."""
        return [[int(s) for s in v.shape] for v in self.node.meta["val"]]


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}
MOVES: set[str] = set()


def rule(*names: str, moves: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators whatever the overload; a name without a namespace is aten's. `moves`: they compute nothing."""

    def register(function: Rule) -> Rule:
        for name in names:
            full = name if "." in name else f"aten.{name}"
            RULES[full] = function
            if moves:
                MOVES.add(full)
        return function

    return register


def broadcast(operands: Sequence[Axes], why: str) -> Axes:
    """Axes of an element-wise result; operands' axes at one place are permuted together, axes of size 1 are repeated."""
    rank = max((len(o) for o in operands), default=0)
    found: Axes = []
    for place in range(-rank, 0):
        here = [o[place] for o in operands if len(o) >= -place and o[place].size != 1]
        for other in here[1:]:
            unify(here[0], other, why)
        found.append(here[0] if here else fresh(1))
    return found


def dims_of(call: Call, rank: int, name: str = "dim") -> list[int]:
    """The axes that a reduction works on, counted from zero; all of them where none is given."""
    given = call.args.get(name)
    if given is None or given == []:
        return list(range(rank))
    return sorted({d % rank for d in ([given] if isinstance(given, int) else given)}) if rank else []


def pinned_like(sizes: Sequence[int], reason: str) -> Axes:
    """Axes that must keep their order."""
    return [fresh(s, reason) for s in sizes]
