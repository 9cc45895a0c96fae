"""Closed-form recovery before the steps: the left factor of every low-rank weight, fitted to the teacher block by block.

Behind blocks that are fitted already a weight A B reads x, not what the teacher reads. Its right factor stays, z = B x, and the left one
takes up what least squares explain of the residual rho (N,) of its output:

    dA = (sum rho z^T) (sum z z^T + lambda B B^T)^-1        lambda = damp * sum ||x||^2 / K

rho is the teacher's output minus the model's; for a linear whose output is added to the stream through the blocks (attention's and the
MLP's last), it is the difference of the streams behind it, so that each of these makes up for what was lost before it too. Forward
passes alone are needed. Least squares also explain noise: give some tens of tokens a rank.

Source: the closed-form update of SVD-LLM (arXiv 2403.07378) behind a compressed prefix; the stream's difference as its target is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effllm.errors import RecoveryError
from effllm.recovery.select import Pair, pairs
from effllm.recovery.stream import Stream, replaced, stages, stream
from effllm.runtime import dense
from effllm.solvers import blocks
from effllm.solvers.blocks import Batch
from effllm.solvers.statistics import Stop

DAMP = 1e-3
Progress = Callable[[int, int, str], None]
_ADVICE = "give the dense model that was compressed, or leave the closed-form update out: refit=0"


class Sums:
    """Of one weight, over tokens: rho z^T (N, r), z z^T (r, r), ||x||^2, ||rho||^2; fp32."""

    def __init__(self, pair: Pair) -> None:
        self.pair, n, r = pair, pair.a.shape[0], pair.rank
        self.cross, self.gram = (pair.b.new_zeros(m, r, dtype=torch.float32) for m in (n, r))
        self.inputs = self.residual = 0.0

    def add(self, x: Tensor, rho: Tensor) -> None:
        """Inputs (tokens, K) and residuals (tokens, N)."""
        x, rho = x.flatten(0, -2).float(), rho.flatten(0, -2).float()
        z = F.linear(x, self.pair.b.detach().float())
        self.cross.addmm_(rho.t(), z)
        self.gram.addmm_(z.t(), z)
        self.inputs += float(x.square().sum())
        self.residual += float(rho.square().sum())

    def solve(self, damp: float) -> tuple[Tensor, float]:
        """dA (N, r) fp64 and the share of ||rho||^2 that it explains. RecoveryError (E-REC-REFIT) where the sums are not finite or singular."""
        b, cross = self.pair.b.detach().double(), self.cross.double()
        gram = self.gram.double()
        damped = gram + damp * self.inputs / b.shape[1] * (b @ b.t())
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) != 0 or not (torch.isfinite(factor).all() and torch.isfinite(cross).all()):
            cause = f"{self.pair.name}: the sums over the recovery data are singular or not finite"
            raise RecoveryError("E-REC-REFIT", cause, "give more text, damp more, or leave the closed-form update out: refit=0")
        found = torch.cholesky_solve(cross.t(), factor).t()
        explained = 2 * (found * cross).sum() - ((found @ gram) * found).sum()
        return found, float(explained) / max(self.residual, 1e-300)


@torch.no_grad()
def refit(
    model: nn.Module, teacher: nn.Module, items: Sequence[Batch], chosen: Iterable[Pair] | None = None, *, damp: float = DAMP, progress: Progress | None = None
) -> dict[str, float]:
    """Fit low-rank weights of `model`, in place, to `teacher` on model inputs; returns by name the share of ||rho||^2 explained.

    chosen: the weights to fit, by default all that are plain products. Those outside of the model's lists of blocks, and those that not
    every token passes just once (experts), are left alone. Raises RecoveryError (E-REC-TEACHER, E-REC-REFIT).
    """
    wanted = {id(p.module): p for p in (pairs(model) if chosen is None else chosen)}
    linears = [n for n, m in teacher.named_modules() if dense.kind_of(m) == "linear"]
    explained: dict[str, float] = {}
    for prefix, members in blocks.lists(teacher, linears).items():
        own = _members(model, prefix, len(members))
        if not any(id(m) in wanted for m in own.modules()):
            continue
        mine, theirs = stream(model, own, items), stream(teacher, members, items)
        if mine is None or theirs is None:
            raise RecoveryError("E-REC-REFIT", f"the blocks of {prefix} are not called once each on the last one's output", "leave it out: refit=0")
        for i in range(len(members)):
            name = f"{prefix}.{i}"
            inside = [n.removeprefix(f"{name}.") for n in linears if n.startswith(f"{name}.")]
            pair = _Side(own[i], inside, mine, i), _Side(members[i], inside, theirs, i)
            explained |= _Block(*pair, wanted).fit(damp)
            if progress is not None:
                progress(i + 1, len(members), f"closed form, {name}")
    return explained


def _members(model: nn.Module, prefix: str, count: int) -> nn.ModuleList:
    found = dict(model.named_modules()).get(prefix)
    if not isinstance(found, nn.ModuleList) or len(found) != count:
        raise RecoveryError("E-REC-TEACHER", f"the model has no list {prefix} of {count} blocks as the teacher has", _ADVICE)
    return found


class _Side:
    """A block of the model or of the teacher, its linears by their names inside, and its stream."""

    def __init__(self, block: nn.Module, names: list[str], stream: Stream, index: int) -> None:
        modules = dict(block.named_modules())
        if missing := [n for n in names if n not in modules]:
            raise RecoveryError("E-REC-TEACHER", f"block {index} of the model has no {missing[0]}", _ADVICE)
        self.block, self.linears, self.stream, self.index = block, {n: modules[n] for n in names}, stream, index
        self.kept: list[dict[str, Tensor]] = [{} for _ in stream.states]  # outputs, by item, of linears that do not change any more

    def run(self, item: int, answer: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]) -> Tensor | None:
        """The block's output with linears answered for."""
        with replaced(self.linears, answer):
            return self.stream.run(self.block, self.index, item)


class _Block:
    """One block of the model and its twin of the teacher."""

    def __init__(self, mine: _Side, theirs: _Side, wanted: Mapping[int, Pair]) -> None:
        self.mine, self.theirs = mine, theirs
        state = mine.stream.states[0]
        self.stages = stages(mine.linears, lambda: mine.stream.run(mine.block, mine.index, 0), state.numel() // state.shape[-1])
        self.at = {n: k for k, stage in enumerate(self.stages) for n in stage}
        found = {n: wanted.get(id(m)) or wanted.get(id(getattr(m, "weight", None))) for n, m in mine.linears.items()}
        self.pairs = {n: p for n, p in found.items() if p is not None and n in self.at}

    def fit(self, damp: float) -> dict[str, float]:
        """Fit the stages in the order in which they run; both streams are behind the block afterwards."""
        explained: dict[str, float] = {}
        items = range(len(self.mine.stream.states))
        after = [self._output(self.theirs, i, len(self.stages)) for i in items]
        for k, stage in enumerate(self.stages):
            sums = {n: Sums(self.pairs[n]) for n in stage if n in self.pairs}
            if not sums:
                continue
            adds = len(stage) == 1 and self._adds(stage[0])
            for i in items:
                self._collect(i, k, sums, adds=adds)
            for name, found in sums.items():
                change, explained[found.pair.name] = found.solve(damp)
                left = self.pairs[name].left
                left.copy_(left.double() + change)
        self.mine.stream.states = [self._output(self.mine, i, len(self.stages)) for i in items]
        self.theirs.stream.states = after
        return explained

    def _answer(self, side: _Side, item: int, last: int, seen: dict[str, tuple[Tensor, Tensor]] | None = None, stop: frozenset[str] = frozenset()) -> Any:
        """Linears behind stage `last` answer zero, those before it what they did the first time."""
        kept = side.kept[item]

        def answer(name: str, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            k = self.at.get(name)
            if k is None:
                return own(x)
            if k > last:
                return x.new_zeros(*x.shape[:-1], dense.matrix(self.theirs.linears[name]).shape[0])
            if name in kept:
                return kept[name]
            y = own(x)
            if k < last or side is self.theirs:
                kept[name] = y
            elif seen is not None:
                seen[name] = x, y
                if stop and stop <= seen.keys():
                    raise Stop
            return y

        return answer

    def _output(self, side: _Side, item: int, last: int) -> Tensor:
        found = side.run(item, self._answer(side, item, last))
        assert found is not None
        return found

    def _collect(self, item: int, k: int, sums: Mapping[str, Sums], *, adds: bool) -> None:
        """Add an item to the sums of a stage."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        out = self.mine.run(item, self._answer(self.mine, item, k, seen, frozenset() if adds else frozenset(sums)))
        for name, found in sums.items():
            x, y = seen.get(name, (None, None))
            theirs, mine = (self._output(self.theirs, item, k), out) if adds else (self.theirs.kept[item].get(name), y)
            if x is None or theirs is None or mine is None or theirs.shape != mine.shape:
                cause = f"{found.pair.name} sees other tokens of item {item} than the teacher's linear, or none"
                raise RecoveryError("E-REC-REFIT", cause, "leave the closed-form update out: refit=0")
            found.add(x, theirs.float() - mine.float())

    def _adds(self, name: str) -> bool:
        """Whether the teacher's linear adds its output to the stream: without what comes after it, the block passes on any change."""
        given: dict[str, Tensor] = {}

        def answer(other: str, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return given["y"] if other == name else self._answer(self.theirs, 0, self.at[name])(other, own, x)

        like = self.theirs.kept[0][name]
        given["y"] = torch.zeros_like(like)
        without = self.theirs.run(0, answer)
        if without is None or without.shape != like.shape:
            return False
        # as large as the stream, of which bf16 rounds off what is much smaller
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device)
        given["y"] = (noise * without.float().square().mean().sqrt()).to(like.dtype)
        with_it = self.theirs.run(0, answer)
        assert with_it is not None
        wanted = given["y"].float()
        return float((with_it.float() - without.float() - wanted).norm()) <= 0.05 * float(wanted.norm())
