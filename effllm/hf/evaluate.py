"""Quality of a model on text: perplexity, KL divergence to the dense model and top-1 agreement.

Each window is scored alone: a window of T tokens has T - 1 targets. Logits are compared in fp32, a few rows at a time, and
nothing of a window outlives it, so the peak is one window's logits of a model and the dense model's log probabilities in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CalibrationError

_ROWS = 128  # rows of logits held in fp32 at once; with a vocabulary of 50k that is 25 MB a tensor


@dataclass
class _Sums:
    """Running sums over targets, in nats."""

    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0


@torch.no_grad()
def perplexity(model: Any, windows: Iterable[Tensor]) -> float:
    """exp of the mean negative log likelihood per target over windows of token ids (T,)."""
    sums = _Sums()
    for ids in windows:
        _add(sums, _logits(model, ids), ids, None)
    return math.exp(_tokens(sums, sums.nll))


def compare(model: Any, dense: Any, windows: Iterable[Tensor]) -> dict[str, float]:
    """perplexity, kl (mean over targets of KL(dense || model), nats), top1_agreement and tokens (targets scored)."""
    return score({"model": model}, dense, windows)["model"]


@torch.no_grad()
def score(
    models: Mapping[str, Any], dense: Any, windows: Iterable[Tensor], tick: Callable[[], None] = lambda: None, kv: str | None = None, prompt: int = 0
) -> dict[str, dict[str, float]]:
    """`compare` for several models at once, so that the dense logits of a window are computed once.

    Without a dense model (None) there is nothing to compare to: kl and top1_agreement are left out. `tick` is called after
    each window. With `kv`, a cache format, each window's first `prompt` tokens are read into such a cache by every model but the dense one,
    and the tokens behind them are scored: those see the compressed prompt and each other exact.
    """
    sums = {name: _Sums() for name in models}
    for ids in windows:
        reference = None if dense is None else _logits(dense, ids)[prompt:]
        base = None if reference is None else [torch.log_softmax(rows.float(), -1) for rows in reference.split(_ROWS)]
        for name, model in models.items():
            own = reference if reference is not None and model is dense else _continued(model, ids, kv, prompt)
            _add(sums[name], own, ids.reshape(-1)[prompt:], base)
        tick()
    return {name: _figures(s, compared=dense is not None) for name, s in sums.items()}


def _figures(s: _Sums, *, compared: bool) -> dict[str, float]:
    alone = {"perplexity": math.exp(_tokens(s, s.nll)), "tokens": s.tokens}
    return alone | ({"kl": _tokens(s, s.kl), "top1_agreement": s.same / s.tokens} if compared else {})


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Logits (T - 1, vocabulary) that predict ids[1:], in the model's dtype."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    out: Tensor = model(input_ids=ids.reshape(1, -1).to(device), use_cache=False).logits
    return out[0, :-1]


def _continued(model: Any, ids: Tensor, kv: str | None, prompt: int) -> Tensor:
    """Logits that predict ids[prompt + 1:] behind a prompt in a compressed cache; without one those of the whole window."""
    if kv is None:
        return _logits(model, ids)[prompt:]
    from effllm.hf.cache import CompressedCache

    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    rows, cache = ids.reshape(1, -1).to(device), CompressedCache(model, kv)
    if prompt:
        model(input_ids=rows[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    out: Tensor = model(input_ids=rows[:, prompt:], past_key_values=cache, use_cache=True).logits
    return out[0, :-1]


def _add(sums: _Sums, logits: Tensor, ids: Tensor, dense: list[Tensor] | None) -> None:
    """Add a window; `dense` are the dense model's log probabilities, _ROWS targets each."""
    targets = ids.reshape(-1)[1:].to(logits.device)
    for part, i in enumerate(range(0, len(targets), _ROWS)):
        logp = torch.log_softmax(logits[i : i + _ROWS].float(), -1)
        here = targets[i : i + _ROWS]
        sums.nll -= float(logp.gather(1, here[:, None]).double().sum())
        if dense is not None:
            base = dense[part]
            sums.kl += float((base.exp() * (base - logp)).sum(-1).double().sum())
            sums.same += int((base.argmax(-1) == logp.argmax(-1)).sum())
    sums.tokens += len(targets)


def _tokens(sums: _Sums, total: float) -> float:
    if sums.tokens == 0:
        raise CalibrationError("E-CAL-SHORT", "there is no window to score", "give at least one window of two tokens")
    return total / sums.tokens
