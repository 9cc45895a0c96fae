"""Adapters on dense, possibly masked weights, merged back when training ends: MaskLoRA and ScaleLoRA of PERP (arXiv 2312.15230), and
the low-rank plus sparse update of DSEE (arXiv 2111.00160).

    mask:   W + s (M * (B A))          M = 1 where a weight is kept, so that merging keeps every zero
    scale:  W * (B A)                  B A starts as a matrix of ones
    dsee:   W + M * (s (B A) + S)      S has values on a fixed support only

with B (N, r), A (r, K), s = alpha / r. The mask is W != 0 unless given: a kept weight that is exactly zero counts as pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effllm.errors import OptionError, RecoveryError, nearest
from effllm.recovery.grebsmo import grebsmo, support
from effllm.runtime import dense

Kind = Literal["mask", "scale", "dsee"]
KINDS = ("mask", "scale", "dsee")


@dataclass(frozen=True)
class Adapter:
    """rank and alpha of the low-rank part (the papers: 16 and 32; DSEE rank 4); `sparse`: entries of DSEE's S per weight (128)."""

    kind: Kind = "mask"
    rank: int = 16
    alpha: float = 32.0
    sparse: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError("E-OPT-ADAPTER", f"there is no adapter {self.kind!r}", nearest(self.kind, KINDS))
        if self.rank < 1 or self.sparse < 1:
            raise OptionError("E-OPT-ADAPTER", f"an adapter of rank {self.rank} with {self.sparse} sparse entries", "give at least 1 of each")


class AdaptedLinear(nn.Module):
    """A Linear (or Conv1D) with an adapter; the dense module is kept as `base`, frozen, until `merge`."""

    recovery_factors: ClassVar[tuple[str, ...]] = ("up", "down", "values")
    recovery_adapter: ClassVar[bool] = True
    mask: Tensor | None
    at: Tensor

    def __init__(self, base: nn.Module, adapter: Adapter, mask: Tensor | None, generator: torch.Generator) -> None:
        super().__init__()
        w = dense.matrix(base)
        n, k = w.shape
        rank = min(adapter.rank, n, k)
        self.base, self.kind, self.scale = base, adapter.kind, adapter.alpha / rank
        mask = w.detach() != 0 if mask is None else mask.to(w.device) != 0
        if mask.shape != w.shape:
            raise OptionError("E-OPT-MASK", f"a mask of shape {tuple(mask.shape)} for a weight of shape {tuple(w.shape)}", "give it as (out, in)")
        self.register_buffer("mask", None if bool(mask.all()) else mask, persistent=False)
        self.values: nn.Parameter | None = None
        if adapter.kind == "scale":
            # columns that start alike stay alike: their sum is 1 and they differ
            noise = (torch.rand(rank, k, generator=generator) - 0.5) * rank**-0.5
            up, down = torch.full((n, rank), rank**-0.5), rank**-0.5 + noise - noise.mean(0)
        else:
            up = torch.zeros(n, rank)
            down = (torch.rand(rank, k, generator=generator) * 2 - 1) * k**-0.5  # as LoRA: kaiming with a = sqrt(5)
        if adapter.kind == "dsee":
            _, _, s = grebsmo(w, rank)
            at = support(s if self.mask is None else s * self.mask, min(adapter.sparse, int(mask.sum())))
            self.register_buffer("at", at, persistent=False)
            self.values = nn.Parameter(torch.zeros(len(at), device=w.device))
        # fp32 whatever the weight's type: the update is small beside the weight
        self.up, self.down = nn.Parameter(up.to(w.device)), nn.Parameter(down.to(w.device))

    def weight(self) -> Tensor:
        """The adapted weight (N, K) in the dense weight's dtype."""
        w = dense.matrix(self.base)
        product = self.up @ self.down
        if self.kind == "scale":
            return (w.float() * product).to(w.dtype)
        update = product * self.scale
        if self.values is not None:
            update = update.flatten().index_add(0, self.at, self.values).view_as(update)
        if self.mask is not None:
            update = update * self.mask
        return (w.float() + update).to(w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        return F.linear(x, self.weight(), self.base.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Write the adapted weight into the dense module and return that."""
        dense.matrix(self.base).copy_(self.weight())
        return self.base


def install(model: nn.Module, names: list[str], adapter: Adapter, masks: Mapping[str, Tensor] | None, seed: int) -> dict[str, AdaptedLinear]:
    """Put adapters in the place of the Linear and Conv1D modules with these names; a module in several places becomes one adapter."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, AdaptedLinear] = {}
    found: dict[str, AdaptedLinear] = {}
    for name in names:
        module = model.get_submodule(name)
        if id(module) not in made:
            made[id(module)] = AdaptedLinear(module, adapter, None if masks is None else masks.get(name), generator)
            made[id(module)].train(module.training)
            found[name] = made[id(module)]
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if id(child) in made and not isinstance(parent, AdaptedLinear):
                setattr(parent, leaf, made[id(child)])
    return found


def remove(model: nn.Module, *, merge: bool) -> None:
    """Take every adapter out again, merged into its dense weight or dropped."""
    if merge:
        for adapted in [m for m in model.modules() if isinstance(m, AdaptedLinear)]:
            adapted.merge()
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if isinstance(child, AdaptedLinear):
                setattr(parent, leaf, child.base)


def _plain(module: nn.Module) -> bool:
    """Whether the module does nothing but multiply by its weight."""
    return type(module) is nn.Linear or (dense.is_transposed(module) and "Conv1D" in type(module).__name__)


def sites(model: nn.Module, what: str, masks: Mapping[str, Tensor] | None, head: nn.Module | None) -> list[str]:
    """Names of the modules that get an adapter: "perp" those with pruned weights (or a given mask), "lora" and "dsee" every linear
    but the head. Weights that several modules share are left out: an adapter on one would untie them."""
    if masks is not None:
        linears = {n for n, m in model.named_modules() if dense.kind_of(m) == "linear"}
        unknown = sorted(set(masks) - linears)
        if unknown:
            raise OptionError("E-OPT-MASK", f"a mask for {unknown[0]!r}, which is no Linear", nearest(unknown[0], linears))
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(id(module))
    found = []
    for name, module in model.named_modules():
        if not name or dense.kind_of(module) != "linear" or module is head or not _plain(module) or len(owners[id(module.weight)]) > 1:
            continue
        if what != "perp" or (name in masks if masks is not None else bool((dense.matrix(module) == 0).float().mean() > 0.01)):
            found.append(name)
    if not found and what in ("lora", "dsee"):
        raise RecoveryError("E-REC-NOTHING", "the model has no dense Linear for an adapter", 'use what="factors" for a compressed model')
    return found
