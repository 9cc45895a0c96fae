"""Training the bases of a Matryoshka cache by distillation (arXiv 2410.14731): the model is frozen, only rotations are learned.

What is learned is what decoding does: a prompt is read exactly, its keys and values are projected, and the tokens that follow have to be
predicted as the dense model does. Every step draws ranks anew, for every layer, head and side, so that columns order themselves by use. A
rotation is the Cayley map of a free matrix, so bases stay orthogonal whatever the optimizer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from effllm.errors import CacheError
from effllm.runtime.caches.matryoshka import pack_tables
from effllm.solvers.kv.basis import truncate
from effllm.solvers.kv.cayley import parameters, rotation


class _Held(CacheLayerMixin):  # type: ignore[misc]
    """A prompt as stored, and whatever comes behind it exact."""

    is_compileable = False
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        """The prompt with the new tokens behind it, which are not kept."""
        return torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Prompt and new tokens."""
        return self.keys.shape[2] + (query_length if isinstance(query_length, int) else int(query_length.shape[0])), 0

    def get_seq_length(self) -> int:
        """Tokens of the prompt."""
        return int(self.keys.shape[2])

    def get_max_length(self) -> int:
        """Without limit."""
        return -1

    get_max_cache_shape = get_max_length


class Bases(nn.Module):
    """Learned rotations that start at given tables: `tables()` gives them back in the cache's form."""

    def __init__(self, tables: dict[int, list[Tensor]]) -> None:
        super().__init__()
        self.layers = sorted(tables)
        self.free = nn.ParameterList()
        self.means: list[Tensor] = []
        self.signs: list[Tensor] = []
        for layer in self.layers:
            for side in (0, 1):
                x, signs = parameters(tables[layer][2 * side])
                self.free.append(nn.Parameter(x.float()))
                self.signs.append(signs.float())
                self.means.append(tables[layer][2 * side + 1].float())

    def rotations(self) -> Tensor:
        """(layers, 2, heads, D, D), differentiable."""
        return rotation(torch.stack(list(self.free)).unflatten(0, (-1, 2)))

    @torch.no_grad()
    def tables(self) -> dict[int, list[Tensor]]:
        """Tables for `CompressedCache`; columns have the signs of the bases that training began with."""
        u = torch.stack(list(self.free)).double().unflatten(0, (-1, 2))
        u = rotation(u).float()
        out = {}
        for n, layer in enumerate(self.layers):
            sides = [(u[n, side] * self.signs[2 * n + side], self.means[2 * n + side]) for side in (0, 1)]
            out[layer] = pack_tables(*sides[0], *sides[1])
        return out


@dataclass(frozen=True)
class BasisTraining:
    """`kl` is the share of the distillation term in the loss, the rest is the text's own likelihood. Ranks are drawn from multiples of `interval` in
    [low, high] shares of a head. `prompt` tokens of a window are projected, but for the last `window`, the rest is predicted. `remember` keeps what
    the dense model said of every window, keys and values of the prompt and logits of the rest, so that it reads each only once."""

    steps: int = 200
    rate: float = 3e-3
    warmup: int = 10
    kl: float = 0.25
    interval: int = 8
    low: float = 0.25
    high: float = 1.0
    prompt: int = 512
    window: int = 64
    seed: int = 0
    remember: bool = True


def train_basis(
    model: Any, windows: Sequence[Tensor], tables: dict[int, list[Tensor]], how: BasisTraining | None = None, report: Callable[[int, float], None] | None = None
) -> dict[int, list[Tensor]]:
    """Better tables than the given ones (those of `pca_tables`, as a rule), trained on token ids (S,) with S > prompt.

    `report(step, loss)` is called after every step. Raises CacheError (E-KVC-CALIBRATION) for windows that are too short, or a loss that is no number.
    """
    how = how or BasisTraining()
    if not windows or min(w.shape[-1] for w in windows) < how.prompt + 2:
        raise CacheError("E-KVC-CALIBRATION", f"training windows need more than {how.prompt + 1} tokens", "give longer windows or a shorter prompt")
    bases = Bases(tables)
    optimizer = torch.optim.Adam(bases.parameters(), how.rate)
    g = torch.Generator().manual_seed(how.seed)
    needed = [p for p in model.parameters() if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)
    known: dict[int, _Dense] = {}
    try:
        for step in range(how.steps):
            for group in optimizer.param_groups:
                ramp = min(1.0, (step + 1) / how.warmup)
                group["lr"] = how.rate * ramp * 0.5 * (1 + math.cos(math.pi * step / how.steps))
            n = step % len(windows)
            dense = known.pop(n, None) or _read(model, windows[n].reshape(1, -1), bases.layers, how.prompt)
            loss = _loss(model, windows[n].reshape(1, -1), dense, bases, how, g)
            if how.remember:
                known[n] = dense
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise CacheError("E-KVC-CALIBRATION", f"the loss is {loss.item()} at step {step}", "lower the rate, and look at the text and the model")
            if report is not None:
                report(step, loss.item())
    finally:
        for p in needed:
            p.requires_grad_(True)
    return bases.tables()


_Dense = tuple[list[tuple[Tensor, Tensor]], Tensor]  # keys and values of the prompt per layer; logits of what follows


@torch.no_grad()
def _read(model: Any, ids: Tensor, layers: list[int], prompt: int) -> _Dense:
    dense: Any = DynamicCache(config=model.config)
    wanted = model(input_ids=ids, past_key_values=dense, use_cache=True, logits_to_keep=ids.shape[1] - prompt).logits[0, :-1]
    return [(dense.layers[i].keys[:, :, :prompt].clone(), dense.layers[i].values[:, :, :prompt].clone()) for i in layers], wanted.bfloat16()


def _loss(model: Any, ids: Tensor, dense: _Dense, bases: Bases, how: BasisTraining, g: torch.Generator) -> Tensor:
    u = bases.rotations()
    dim = u.shape[-1]
    grid = torch.arange(max(1, round(how.low * dim / how.interval)), int(how.high * dim / how.interval) + 1) * how.interval
    ranks = grid[torch.randint(len(grid), u.shape[:3], generator=g)]
    layers: list[Any] = []
    for n, exact in enumerate(dense[0]):
        stored = []
        for side, x in enumerate(exact):
            old, new = x.split((how.prompt - how.window, how.window), 2)
            basis = u[n, side] * bases.signs[2 * n + side]
            stored.append(torch.cat((truncate(old.float(), basis, bases.means[2 * n + side], ranks[n, side]).to(x.dtype), new), 2))
        layers.append(_Held(*stored))
    positions = torch.arange(how.prompt, ids.shape[1])[None]
    out = model(input_ids=ids[:, how.prompt :], position_ids=positions, past_key_values=Cache(layers=layers), use_cache=True).logits[0, :-1].float()
    target = ids[0, how.prompt + 1 :]
    loss = (1 - how.kl) * nn.functional.cross_entropy(out, target)
    if how.kl:
        loss = loss + how.kl * nn.functional.kl_div(out.log_softmax(-1), dense[1].float().log_softmax(-1), reduction="batchmean", log_target=True)
    return loss
