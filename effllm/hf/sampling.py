"""How the next token is chosen: greedy, or by temperature, top-k, top-p, with a repetition penalty; one random stream per sequence.

The order is that of transformers: penalty, temperature, top-k, top-p, draw. A sequence's draws depend on its own seed and nothing
beside it, and are those of transformers' `generate` on the sequence alone after `torch.manual_seed(seed)`, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token; `repetition_penalty` 1 is none (arXiv:1909.05858)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises OptionError (E-OPT-SAMPLING)."""
        wrong = [
            f"{name} = {value} ({rule})"
            for name, value, rule, ok in (
                ("temperature", self.temperature, "0 or more", self.temperature >= 0),
                ("top_k", self.top_k, "0 or more", self.top_k >= 0 and self.top_k == int(self.top_k)),
                ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
                ("repetition_penalty", self.repetition_penalty, "above 0", self.repetition_penalty > 0),
            )
            if not (ok and value < float("inf"))
        ]
        if not self.temperature and (self.top_k or self.top_p < 1):
            wrong.append("top_k and top_p without a temperature, which is greedy")
        if wrong:
            raise OptionError("E-OPT-SAMPLING", "; ".join(wrong), "see effllm.hf.sampling.Sampling")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen, whatever came before."""
        return not self.temperature and self.repetition_penalty == 1

    def penalize(self, logits: Tensor, seen: Tensor) -> Tensor:
        """fp32 logits (V,), with those of the ids in `seen` divided (or multiplied, below zero) by the penalty."""
        scores = logits.to(torch.float32, copy=True)
        if self.repetition_penalty != 1:
            old = scores[seen]
            scores[seen] = torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
        return scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities (V,) of penalized scores, after temperature, top-k and top-p."""
        scores = scores / self.temperature
        if self.top_k:
            worst = scores.topk(min(self.top_k, len(scores)))[0][-1]
            scores = scores.masked_fill(scores < worst, -torch.inf)  # ties with the k-th stay
        if self.top_p < 1:
            ordered, index = scores.sort()
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            drop[-1] = False  # the likeliest always stays
            scores = scores.masked_fill(torch.zeros_like(drop).scatter(0, index, drop), -torch.inf)
        return scores.softmax(-1)

    def choose_all(self, logits: Tensor, seen: Callable[[int], Tensor], streams: Sequence[torch.Generator | None]) -> list[int]:
        """The next token of each row of logits (N, V); `seen(i)` gives the ids so far of row i, asked for only where they matter."""
        if self.greedy:
            return likeliest(logits)
        nothing = torch.empty(0, dtype=torch.int64)
        return [self.choose(row, nothing if self.repetition_penalty == 1 else seen(i), streams[i]) for i, row in enumerate(logits)]

    def choose(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None) -> int:
        """The next token of one sequence: logits (V,) on any device, the ids so far (prompt included), its random stream."""
        scores = self.penalize(logits, seen.to(logits.device))
        if not self.temperature:
            return int(scores.argmax())
        return int(torch.multinomial(self.probabilities(scores).cpu(), 1, generator=generator))


def likeliest(logits: Tensor) -> list[int]:
    """The index of the largest of each row (N, V), the first of equals."""
    if logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16) and len(logits) <= 16:
        bits = logits.detach().view(torch.int16).numpy()  # numbers above zero are in the order of their bits
        at = bits.argmax(-1)
        if all(row[i] > 0 for row, i in zip(bits, at, strict=True)):
            return [int(i) for i in at]
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and len(logits) <= 16:
        return [int(i) for i in logits.detach().numpy().argmax(-1)]  # torch would wake other threads for a short row
    found: list[int] = logits.argmax(-1).tolist()
    return found


def generators(sampling: Sampling, seed: int | Sequence[int], count: int) -> list[torch.Generator | None]:
    """A random stream per sequence: from its own seed, or from seed + its index. None for each where nothing is drawn."""
    if not sampling.temperature:
        return [None] * count
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise OptionError("E-OPT-SAMPLING", f"{len(seeds)} seeds for {count} prompts", "give one number, or one seed per prompt")
    return [torch.Generator().manual_seed(s) for s in seeds]
