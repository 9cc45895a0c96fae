"""TEAL and R-Sparse over a model: which share of its inputs each projection drops, and what of its weight becomes a low rank.

Shares are measured beforehand (see `across`), come from TEAL's greedy search per block, or are the same for all (allocation=uniform).
Blocks run one after another on the dense model's hidden states of the first `tokens` calibration tokens; projections are made sparse by
hooks for the while.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effllm.activation.calibration import Cut, Plan, Site, dense_weight
from effllm.activation.gates import cut
from effllm.activation.record import SINKS
from effllm.methods import Activation
from effllm.solvers import blocks
from effllm.solvers.activation import Histogram, rsparse, teal
from effllm.solvers.blocks import Batch, Call, Chain


class Sparse:
    """Makes linears of a block sparse while it is entered: threshold on |x| (times norm), what is dropped through u v."""

    def __init__(self, linears: Mapping[str, nn.Module], cuts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.linears, self.cuts = linears, cuts
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, tensors in self.cuts.items():
            module, rest = self.linears[name], list[Tensor]()
            self._handles.append(module.register_forward_pre_hook(self._before(tensors, rest)))
            if "u" in tensors:
                self._handles.append(module.register_forward_hook(self._after(tensors, rest)))

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @staticmethod
    def _before(tensors: Mapping[str, Tensor], rest: list[Tensor]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            size = x.abs().float() * tensors["norm"] if "norm" in tensors else x.abs().float()
            kept = torch.where(size <= tensors["threshold"], 0.0, x).to(x.dtype)
            if "u" in tensors:
                rest.append(x - kept)
            return (kept, *args[1:])

        return hook

    @staticmethod
    def _after(tensors: Mapping[str, Tensor], rest: list[Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            x = rest.pop()
            return y + (x @ tensors["v"].to(x.dtype).t()) @ tensors["u"].to(x.dtype).t()

        return hook


@torch.no_grad()
def solve(
    model: nn.Module, method: Activation, data: list[Batch], sites: Mapping[str, Site], inputs: Mapping[str, Histogram], weighted: Mapping[str, Histogram],
    targets: Mapping[str, float],
) -> Plan:  # fmt: skip
    """Cuts for every linear of the lists of layers; histograms of |x| and of |x| times the norm of its column by module.

    targets: the share of modules (one for all of a block) that do not get the method's sparsity.
    """
    plan = Plan(method)
    modules = dict(model.named_modules(remove_duplicate=False))
    greedy = method.allocation == "greedy" or (method.allocation == "measured" and not targets)  # where the output cannot be compared
    for prefix, members in blocks.lists(model, sites).items():
        chain = blocks.chain(model, members, blocks.first(data, method.tokens))
        for i, block in enumerate(members):
            own = {n: modules[n] for n in sites if n.startswith(f"{prefix}.{i}.")}
            if not own:
                continue
            calls = None if chain is None else chain.calls[i]
            target = targets.get(next(iter(own)), method.sparsity)
            shares = {n: targets.get(n, method.sparsity) for n in own}
            run = None if calls is None else _Block(block, own, calls)
            if run is not None and greedy and method.sparsity > 0:
                shares = run.greedy({n: math.prod(sites[n].shape) for n in own}, inputs, target, method)
            if method.name == "teal" or method.sparsity == 0:
                plan.inputs |= {n: cut(inputs[n], shares[n], n) for n in own}
            else:
                plan.inputs |= _rsparse(own, shares, inputs, weighted, sites, method, run, i)
            if chain is not None and run is not None:
                _advance(chain, i, run)
        if chain is None and greedy:
            plan.kept[prefix] = "its blocks form no chain: shares are uniform there"
    return plan


def uniform(method: Activation, sites: Mapping[str, Site], inputs: Mapping[str, Histogram]) -> Plan:
    """One share for every linear, and no low rank."""
    return Plan(method, {n: cut(inputs[n], method.sparsity, n) for n in sites})


def _advance(chain: Chain, i: int, run: _Block) -> None:
    if i + 1 < len(chain.calls):
        for call, state in zip(chain.calls[i + 1], run.dense, strict=True):
            call.put(chain.place, state)
    chain.calls[i] = []


class _Block:
    """One block on its dense inputs: its outputs, the inputs of its linears, and its error when some are sparse."""

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Module], calls: list[Call]) -> None:
        self.block, self.linears, self.calls = block, linears, calls
        self.seen: dict[str, list[Tensor]] = {n: [] for n in linears}
        handles = [m.register_forward_pre_hook(lambda _, a, n=n: self.seen[n].append(_late(a[0]).flatten(0, -2).float())) for n, m in linears.items()]
        self.dense = [self._call(c) for c in calls]
        for h in handles:
            h.remove()
        self.norm = _size(self.dense)

    def _call(self, call: Call) -> Tensor:
        state = blocks.hidden(self.block(*call.args, **call.kwargs))
        assert state is not None
        return state

    def error(self, cuts: Mapping[str, Mapping[str, Tensor]]) -> float:
        """How far the outputs move, relative to their size: norms over tokens, sinks left out, averaged over channels (TEAL's measure). A sum of squares
        would be that of the few channels in which hidden states are largest."""
        with Sparse(self.linears, cuts):
            moved = [self._call(c) - y for c, y in zip(self.calls, self.dense, strict=True)]
        return _size(moved) / max(self.norm, 1e-30)

    def greedy(self, sizes: dict[str, int], seen: Mapping[str, Histogram], target: float, method: Activation) -> dict[str, float]:
        """TEAL's shares."""
        def error(shares: Mapping[str, float]) -> float:
            return self.error({n: _tensors(seen[n], s, None) for n, s in shares.items() if s > 0})

        return teal.at(teal.greedy(sizes, error, target, method.step), target)


def _late(y: Tensor) -> Tensor:
    return y[..., math.ceil(SINKS * y.shape[-2]) :, :]


def _size(states: list[Tensor]) -> float:
    """Norm over tokens, mean over channels, of states (..., tokens, C)."""
    return float(sum(_late(y).double().square().flatten(0, -2).sum(0) for y in states).sqrt().mean())  # type: ignore[union-attr]


def _tensors(seen: Histogram, share: float, norm: Tensor | None) -> dict[str, Tensor]:
    found = {"threshold": torch.tensor([seen.quantile(share) if share > 0 else -1.0])}
    return found if norm is None else found | {"norm": norm}


def _rsparse(
    own: Mapping[str, nn.Module], shares: Mapping[str, float], inputs: Mapping[str, Histogram], weighted: Mapping[str, Histogram],
    sites: Mapping[str, Site], method: Activation, run: _Block | None, index: int,
) -> dict[str, Cut]:  # fmt: skip
    """The split of each linear's budget: all in columns at first, then by a search over the block's output."""
    options: dict[str, dict[float, dict[str, Tensor]]] = {}
    for name, module in own.items():
        w = dense_weight(module)
        assert w is not None
        x = None if run is None else torch.cat(run.seen[name])
        options[name] = _options(w.float(), shares[name], inputs[name], weighted[name], x)
    alphas = dict.fromkeys(own, 1.0)
    if run is not None and method.budget > 1:
        tried = [n for n in own if len(options[n]) > 1] or list(own)

        def objective(trial: Mapping[str, float]) -> float:
            return run.error({n: options[n].get(a, options[n][1.0]) for n, a in trial.items()})

        alphas, _ = rsparse.search(tried, alphas, objective, budget=method.budget, seed=method.seed + index)
        alphas = dict.fromkeys(own, 1.0) | alphas
    found = {}
    for name, alpha in alphas.items():
        tensors = options[name].get(alpha, options[name][1.0])
        t, n, k = float(tensors["threshold"]), *sites[name].shape
        realised = (weighted if "norm" in tensors else inputs)[name].share(t) if t >= 0 else 0.0
        rank = tensors["u"].shape[1] if "u" in tensors else 0
        found[name] = Cut(shares[name], realised, realised - rank * (n + k) / (n * k), tensors, alpha if rank else 1.0)
    return found


def _options(w: Tensor, share: float, seen: Histogram, weighted: Histogram, x: Tensor | None) -> dict[float, dict[str, Tensor]]:
    """Per alpha the tensors of a linear that reads (1 - share) of its weights: columns by |x| alone (1.0), or by |x| times their norm with factors for the
    inputs that are dropped, which fit them by their size."""
    n, k = w.shape
    out: dict[float, dict[str, Tensor]] = {1.0: _tensors(seen, share, None)}
    splits = {a: rsparse.split(n, k, share, a) for a in rsparse.ALPHAS if a < 1}
    splits = {a: s for a, s in splits.items() if s[1] > 0 and s[0] < 1}
    if not splits:
        return out
    norm = rsparse.norms(w)
    scale = None if x is None else _dropped_size(x, norm, weighted.quantile(share))
    top = max(rank for _, rank in splits.values())
    u, v = rsparse.factors(w, top, scale)
    for a, (drop, rank) in splits.items():
        out[a] = _tensors(weighted, drop, norm) | {"u": u[:, :rank].float(), "v": v[:rank].float()}
    return out


def _dropped_size(x: Tensor, norm: Tensor, t: float) -> Tensor:
    """Root mean square per channel (K,) of the inputs that are dropped, never zero."""
    rest = torch.where(x.abs() * norm <= t, x, 0.0).double().square().mean(0).sqrt()
    return rest.clamp_min(float(rest.max().clamp_min(1e-30)) * 1e-3)
