"""When a compressed cache pays: predicted seconds of one layer's decode attention, and the context from which it beats dense.

    dense(T)      = T * max(bytes / bandwidth, products / rate) + call
    compressed(T) = the same for the dense window, then for the packed tokens with their own bytes and rate, + call + start

`products` are multiply-adds a token: 2 * query heads * head size. A thread's rate is a number of multiply-adds an instruction, taken from
16k tokens of 32 query heads over 8 key heads of 128 (benchmarks/kv_attention.py). The dense kernel was near its machine's bandwidth there, so on one
with more of it the figure for `dense` is low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from effllm.autotune import machines

# multiply-adds; AVX-512, two threads of a Zen 4; "mustafar-coded" keeps levels of 8 or 4 bits
_PER_INSTRUCTION = {"dense": 6.5, "kivi": 6.4, "gear": 3.9, "mustafar": 6.9, "mustafar-coded": 3.0, "bfp": 2.1}
_START = 5e-6  # s: splitting, the merge of the splits, digits of the query


@dataclass(frozen=True)
class Site:
    """One attention as a graph has it: the format's text, tokens that the cache holds, sizes, and the dtype of the model."""

    spec: str
    tokens: int
    batch: int
    groups: int
    heads: int
    dim: int
    queries: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Prediction:
    """Seconds of one attention at `tokens`, and the context (tokens) from which the compressed one is faster; None if never."""

    dense: float
    compressed: float
    crossover: int | None


PREDICTORS: dict[str, Callable[[Site], Prediction]] = {}  # device type -> the model of its kernels, which they register


def predict(format: str, tokens: int, window: int, heads: int, dim: int, dense_bytes: float, packed_bytes: float, rows: int = 1) -> Prediction:
    """One layer on this CPU: `heads` query heads of `dim` channels, `rows` queries each, bytes a token and `window` dense tokens at most."""
    m = machines.cpu()
    products = 2.0 * heads * dim * rows

    def slope(nbytes: float, kind: str) -> float:
        rate = _PER_INSTRUCTION.get(kind, _PER_INSTRUCTION["dense"]) * m["issue"] * m["cores"]
        return max(nbytes / m["bandwidth"], products / rate)

    plain, packed = slope(dense_bytes, "dense"), slope(packed_bytes, format)
    near = min(tokens, window)
    gain = plain - packed
    crossover = math.ceil(window + _START / gain) if gain > 0 else None
    return Prediction(tokens * plain + m["call"], near * plain + (tokens - near) * packed + m["call"] + _START, crossover)
