"""Which parameters a recovery trains: pure functions from a model to named parameters, and the table of what was chosen.

A compressed module says what of it can be trained by two attributes, read here and nowhere else:

    recovery_factors: tuple[str, ...]      names of its own parameters that hold factors or sparse values
    recovery_pair: tuple[str, str] | None  the two of them whose product a[:, :r] (N, r) @ b (r, K) is a low-rank weight; further columns
                                           of a belong to something else (input channels folded in) and are never truncated

and, where its rank can be cut, by a method `shrink(rank: int)` that keeps the first columns of a and rows of b,
and what lies behind the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from effllm.errors import OptionError, RecoveryError, nearest

WHAT = ("factors", "perp", "lora", "dsee", "all")


@dataclass(frozen=True)
class Pair:
    """The two factors of a low-rank weight: a (N, r) or wider, b (r, K)."""

    name: str
    module: nn.Module
    a: nn.Parameter
    b: nn.Parameter

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[0]

    @property
    def left(self) -> Tensor:
        """The columns (N, r) of a that meet b; a view."""
        return self.a[:, : self.rank]


@dataclass(frozen=True)
class Selection:
    """What is trained. `parameters`: name -> parameter, each once; `total`: number of weights of the whole model."""

    what: str
    parameters: dict[str, nn.Parameter]
    total: int

    @property
    def count(self) -> int:
        """Weights that are trained."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def share(self) -> float:
        """Part of the model's weights that is trained."""
        return self.count / max(1, self.total)

    def __str__(self) -> str:
        merged: dict[str, list[nn.Parameter]] = {}
        for name, p in self.parameters.items():
            merged.setdefault(".".join("*" if s.isdigit() else s for s in name.split(".")), []).append(p)
        lines = [f"trained ({self.what}): {self.count} of {self.total} weights ({self.share:.2%})"]
        return "\n".join(lines + [f"  {len(ps):4d} x {name} {sum(p.numel() for p in ps)}" for name, ps in merged.items()])


def selected(model: nn.Module, what: str | Sequence[str]) -> Selection:
    """The parameters that `what` means, adapters ("lora", "dsee") as far as they are installed.

    what: "factors" (of compressed modules), "perp" (norms, biases and adapters), "lora" or "dsee" (adapters alone), "all" (every
    floating-point parameter), or globs over parameter names. Raises OptionError (E-OPT-WHAT) and RecoveryError (E-REC-NOTHING).
    """
    names = _names(model, what)
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, p in model.named_parameters():
        if name in names and p.is_floating_point() and id(p) not in seen and p.numel():
            seen.add(id(p))
            chosen[name] = p
    label = what if isinstance(what, str) else ", ".join(what)
    if not chosen:
        raise RecoveryError("E-REC-NOTHING", f"what={label!r} selects no parameter of this model", _advice(label))
    return Selection(label, chosen, sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers() if b.is_floating_point()))


def _names(model: nn.Module, what: str | Sequence[str]) -> set[str]:
    if not isinstance(what, str):
        return {n for n, _ in model.named_parameters() if any(fnmatchcase(n, glob) for glob in what)}
    if what not in WHAT:
        raise OptionError("E-OPT-WHAT", f"there is nothing called {what!r} to train", nearest(what, WHAT))
    if what == "all":
        return {n for n, _ in model.named_parameters()}
    if what == "perp":
        return factor_names(model) & _adapter_names(model) | set(small_names(model))
    return factor_names(model) if what == "factors" else _adapter_names(model)


def factor_names(model: nn.Module) -> set[str]:
    """Names of the parameters that compressed modules (and adapters) declare."""
    found = set()
    for prefix, module in model.named_modules():
        for leaf in getattr(type(module), "recovery_factors", ()):
            if isinstance(getattr(module, leaf, None), nn.Parameter):
                found.add(f"{prefix}.{leaf}" if prefix else leaf)
    return found


def _adapter_names(model: nn.Module) -> set[str]:
    own = [prefix for prefix, module in model.named_modules() if getattr(type(module), "recovery_adapter", False)]
    return {n for n in factor_names(model) if any(n.startswith(f"{prefix}.") for prefix in own)}


def small_names(model: nn.Module) -> Iterator[str]:
    """Norm weights and biases: parameters of one dimension that belong to no compressed module's factors."""
    factors = factor_names(model)
    return (n for n, p in model.named_parameters() if p.dim() == 1 and n not in factors)


def pairs(model: nn.Module) -> list[Pair]:
    """The low-rank weights of compressed modules, in the order of the model; a shared module once."""
    found = []
    for name, module in model.named_modules():
        names = getattr(module, "recovery_pair", None)
        if names is None:
            continue
        a, b = (getattr(module, leaf) for leaf in names)
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] < b.shape[0]:
            raise RecoveryError("E-REC-PAIR", f"{name}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)} have no product", "report this bug")
        found.append(Pair(name, module, a, b))
    return found


def _advice(label: str) -> str:
    if label == "factors":
        return 'compress the model with a low-rank, Monarch or sparse recipe first, or use what="perp"'
    return "see model.named_parameters() for the names; integer codes cannot be trained"


def frozen_except(model: nn.Module, chosen: Iterable[Tensor]) -> None:
    """Let exactly `chosen` require grad."""
    wanted = {id(p) for p in chosen}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)
