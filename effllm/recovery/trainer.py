"""The loop of a recovery: micro-batches into fp32 gradients, regularisers, a step, and the way back when numbers go bad."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import RecoveryError
from effllm.recovery import ordered as ordering
from effllm.recovery import truncation as trp
from effllm.recovery.data import Data, targets_of
from effllm.recovery.forward import Body
from effllm.recovery.loss import Losses, Weights, head_gradient, squarehead
from effllm.recovery.optimizer import Masters, rate
from effllm.recovery.ordered import Ordered
from effllm.recovery.pivoted import quantized
from effllm.recovery.select import Pair, Selection, pairs
from effllm.recovery.targets import Answer, Ask
from effllm.recovery.truncation import Truncation
from effllm.runtime import dense

_KEEP = 20  # steps between two copies of values known to be good


class Regularisers:
    """What the low-rank trainer does beside the losses: TRP, ordered dropout, noise on the weights."""

    def __init__(
        self, model: nn.Module, selection: Selection, truncation: Truncation | None, ordered: Ordered | None, perturbation: float, seed: int
    ) -> None:
        self.truncation, self.ordered, self.perturbation = truncation, ordered, perturbation
        self.generator = torch.Generator().manual_seed(seed)
        self.names = {id(p): n for n, p in selection.parameters.items()}
        self.pairs: list[Pair] = [p for p in pairs(model) if id(p.a) in self.names and id(p.b) in self.names]
        # TRP in its first form: dense weights
        self.matrices: dict[str, nn.Parameter] = {}
        if truncation is not None and not self.pairs:
            weights = {id(m.weight) for n, m in model.named_modules() if n.count(".") > 0 and dense.kind_of(m) == "linear"}
            self.matrices = {n: p for n, p in selection.parameters.items() if id(p) in weights}
        if (ordered is not None and not self.pairs) or (truncation is not None and not self.pairs and not self.matrices):
            option = "ordered" if ordered is not None else "truncation"
            held = quantized(model)
            if held:
                cause = f"{option} works on floating-point factors, and those of {held[0]} are integer codes, as are all others of this model"
                raise RecoveryError("E-REC-PAIR", cause, "recover first with bits=16, then compress the result with bits")
            raise RecoveryError("E-REC-PAIR", f"{option} works on low-rank weights, and no such weight is trained", "compress with a low-rank recipe first")

    def around(self, stack: ExitStack, parameters: dict[str, nn.Parameter]) -> None:
        """Change the weights for one micro-batch; `stack` puts them back."""
        if self.perturbation:
            stack.callback(self._shake(parameters))
        if self.ordered is not None:
            stack.enter_context(ordering.dropped(self.pairs, self.ordered, self.generator))

    @torch.no_grad()
    def _shake(self, parameters: dict[str, nn.Parameter]) -> Callable[[], None]:
        kept = {n: p.detach().clone() for n, p in parameters.items()}
        for p in parameters.values():
            size = p.detach().float().square().mean().sqrt() * self.perturbation
            p.add_((torch.randn(p.shape, generator=self.generator).to(p.device) * size).to(p.dtype))

        def back() -> None:
            with torch.no_grad():
                for n, p in parameters.items():
                    p.copy_(kept[n])

        return back

    @torch.no_grad()
    def gradients(self, masters: Masters) -> None:
        """Add the nuclear norm's and the group lasso's gradients."""
        if self.truncation is not None and self.truncation.nuclear:
            for pair in self.pairs:
                self._add(pair, masters, self.truncation.nuclear, *trp.nuclear_gradient(*self._values(pair, masters)))
            for name in self.matrices:
                masters.add_gradient(name, self.truncation.nuclear * trp.nuclear_gradient_dense(masters.value(name)))
        if self.ordered is not None and self.ordered.lasso:
            for pair in self.pairs:
                a, b = self._values(pair, masters)
                self._add(pair, masters, self.ordered.lasso, ordering.lasso_gradient(a), ordering.lasso_gradient(b.t()).t())

    @torch.no_grad()
    def after(self, masters: Masters, step: int) -> None:
        """Truncate every `period` steps."""
        if self.truncation is not None and (step + 1) % self.truncation.period == 0:
            self._truncate(masters)

    def _truncate(self, masters: Masters) -> dict[str, int]:
        assert self.truncation is not None
        ranks = {}
        for pair in self.pairs:
            a, b, ranks[pair.name] = trp.truncate(*self._values(pair, masters), self.truncation.energy)
            masters.replace(self.names[id(pair.a)], torch.cat([a, masters.value(self.names[id(pair.a)])[:, pair.rank :]], 1))
            masters.replace(self.names[id(pair.b)], b)
        for name in self.matrices:
            w, ranks[name] = trp.truncate_dense(masters.value(name), self.truncation.energy)
            masters.replace(name, w)
        return ranks

    @torch.no_grad()
    def finish(self, masters: Masters) -> dict[str, int]:
        """The last truncation and the cut of ranks that ordered dropout emptied; returns the ranks left by module."""
        ranks = self._truncate(masters) if self.truncation is not None else {}
        if self.ordered is not None:
            for pair in self.pairs:
                left = ordering.rank_left(pair.left, pair.b, self.ordered.cut)
                ranks[pair.name] = min(left, ranks.get(pair.name, left))
        for pair in self.pairs:
            rank = ranks.get(pair.name, pair.rank)
            if rank < pair.rank:
                pair.left[:, rank:] = 0
                pair.b[rank:] = 0
                shrink = getattr(pair.module, "shrink", None)
                if shrink is not None:
                    shrink(rank)
        return ranks

    def _values(self, pair: Pair, masters: Masters) -> tuple[Tensor, Tensor]:
        return masters.value(self.names[id(pair.a)])[:, : pair.rank], masters.value(self.names[id(pair.b)])

    def _add(self, pair: Pair, masters: Masters, weight: float, a: Tensor, b: Tensor) -> None:
        """Add `weight` times the gradients a (N, r) and b (r, K)."""
        behind = pair.a.shape[1] - pair.rank
        masters.add_gradient(self.names[id(pair.a)], weight * (torch.nn.functional.pad(a, (0, behind)) if behind else a))
        masters.add_gradient(self.names[id(pair.b)], weight * b)


class Trainer:
    """Runs steps; the history and the checkpoints are the caller's."""

    def __init__(
        self, body: Body, ask: Ask, items: Data, masters: Masters, weights: Weights, regularisers: Regularisers, precision: str, seed: int, accumulate: int
    ) -> None:
        self.body, self.ask, self.items, self.masters, self.weights, self.regularisers = body, ask, items, masters, weights, regularisers
        self.autocast, self.seed, self.accumulate = precision == "bf16", seed, accumulate

    def run(
        self,
        history: list[dict[str, Any]],
        first: int,
        steps: int,
        lr: float,
        warmup: int,
        progress: Callable[[int, int, str], None] | None,
        every: int,
        keep: Callable[[int], None],
    ) -> int:
        """Steps first..steps - 1; returns the number of tokens read. Raises RecoveryError (E-REC-NAN) with the last good values in the model."""
        tokens, good, at = 0, self._copy(), first
        for step in range(first, steps):
            began = time.perf_counter()
            losses, rows = self._gradient(step)
            self.regularisers.gradients(self.masters)
            norm = self.masters.norm()
            if not (math.isfinite(losses.total) and math.isfinite(norm)):
                self._put(good)
                what = "gradient" if math.isfinite(losses.total) else "loss"
                cause = f"step {step}: the {what} is not finite; the model is back at its values of step {at}"
                raise RecoveryError("E-REC-NAN", cause, f"use a smaller lr than {lr}, a longer warmup, or precision='fp32'")
            if step - at >= _KEEP:
                good, at = self._copy(), step
            now = lr * rate(step, steps, warmup)
            self.masters.step(now, norm)
            self.regularisers.after(self.masters, step)
            tokens += rows
            history.append({"step": step, "total": losses.total, "kl": losses.kl, "lm": losses.lm, "features": losses.features, "norm": norm, "lr": now})
            if progress is not None:
                progress(step + 1, steps, f"loss {losses.total:.3f}, {rows / (time.perf_counter() - began):.0f} tokens/s")
            if (step + 1) % every == 0 or step + 1 == steps:
                keep(step + 1)
        return tokens

    def _gradient(self, step: int) -> tuple[Losses, int]:
        """Losses of a step, averaged over its micro-batches, and the tokens read; the gradients are in the masters afterwards."""
        found, rows = [], 0
        for i in range(self.accumulate):
            with ExitStack() as stack:
                self.regularisers.around(stack, self.masters.parameters)
                losses, count = self._micro(self.items.micro(step * self.accumulate + i, self.seed))
            self.masters.collect(1 / self.accumulate)
            found.append(losses)
            rows += count

        def mean(name: str) -> float | None:
            values = [getattr(x, name) for x in found]
            return None if values[0] is None else sum(values) / len(values)

        return Losses(mean("total") or 0.0, mean("kl"), mean("lm"), mean("features")), rows

    def _micro(self, indices: list[int]) -> tuple[Losses, int]:
        batch, weights = self.items.join(indices), self.weights
        answer: Answer | None = self.ask(indices) if weights.kl or weights.features else None
        # no graph reaches the hidden states where the head alone is trained
        with torch.enable_grad(), self._cast():
            hidden, seen = self.body(batch)
        flat = hidden.flatten(0, -2)
        following, mask = (t.to(flat.device) for t in targets_of(batch, len(flat)))
        teacher = None
        if answer is not None and weights.kl:
            teacher = _rows_of(answer, flat)
        with torch.enable_grad(), self._cast():
            gradient, losses = head_gradient(flat, self._student, teacher, following, mask, weights)
        roots, grads = ([flat], [gradient]) if flat.requires_grad else ([], [])
        if weights.features and answer is not None and seen:
            loss = self._matched(seen, answer, mask)
            losses.features = float(loss.detach())
            losses.total += weights.features * losses.features
            if loss.requires_grad:
                roots, grads = [*roots, weights.features * loss], [*grads, torch.ones_like(loss)]
        if roots:
            torch.autograd.backward(roots, grads)
        return losses, len(flat)

    def _student(self, hidden: Tensor) -> Tensor:
        return self.body.logits(hidden)

    def _matched(self, seen: list[Tensor], answer: Answer, mask: Tensor) -> Tensor:
        total = torch.zeros((), device=mask.device)
        for name, mine, theirs in zip(self.body.features, seen, answer.features, strict=True):
            if mine.shape != theirs.shape:
                cause = f"{name} gives {tuple(theirs.shape)} in the teacher and {tuple(mine.shape)} in the model"
                raise RecoveryError("E-REC-TEACHER", cause, "give the dense model that was compressed, or leave the features out: features=0")
            tokens = mine.flatten(0, -2).shape[0]
            # blocks of another length (an encoder's) have no mask of their own here
            total = total + squarehead(mine, theirs.to(mine.device), mask if len(mask) == tokens else mask.new_ones(tokens))
        return total / len(seen)

    def _cast(self) -> Any:
        device = next(iter(self.masters.parameters.values())).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.autocast)

    def _copy(self) -> dict[str, Tensor]:
        return {n: x.detach().clone() for n, x in self.masters.x.items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.masters.x[name].copy_(value)
        self.masters.write()


def _rows_of(answer: Answer, flat: Tensor) -> Callable[[slice], Tensor]:
    def logits(at: slice) -> Tensor:
        return answer.logits(answer.hidden[at]).to(flat.device)

    return logits
