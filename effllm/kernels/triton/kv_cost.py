"""Cost of attention over a compressed cache on a GPU, and how many programs share a key head's tokens.

    T = max(bytes / (bandwidth * u) * idle, instructions / issue * idle, tiles a program / stages * latency) * tail + 2 calls

    u     = min(1, bytes in flight per multiprocessor / (bandwidth * latency / multiprocessors))      Little's law
    idle  = multiprocessors / programs where there are fewer programs;  tail = ceil(waves) / waves

Instructions an element of keys and values are read from the machine code for cuda:90 (tests/kernels/triton/test_kv_attend.py compares): below 4 bits
they bound, not the memory. A dense kernel of the vendor is taken to reach 85 % of the bandwidth.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch

from effllm.autotune import gpus, kv_cost, machines
from effllm.autotune.cost import ACT, BANDWIDTH, CALL, Model, Prediction
from effllm.kernels.triton.cost import CLOCK, LATENCY, SMS
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.caches.bfp import Bfp
from effllm.runtime.caches.gear import Gear
from effllm.runtime.caches.kivi import Kivi
from effllm.runtime.caches.matryoshka import Matryoshka
from effllm.runtime.caches.mustafar import Mustafar

SPLITS = (1, 2, 4, 8, 16, 32, 64)
DENSE = 0.85  # of the bandwidth
_ISSUE = {"kivi": 3.4, "gear": 5.6, "mustafar": 11.1, "bfp": 5.2, "matryoshka": 4.6}  # instructions an element; matryoshka: a stored one
SCORE = 25.0  # a score: mask, exponential, sums
_LEVELS = {16: 0.0, 8: 12.7, 4: 18.2}  # more an element where Mustafar's values are levels of so many bits
_OUTLIER = 2.2  # a compare, a select and an addition, for each entry that a channel or a token has
_TILE, _STAGES, _RESIDENT = 64, 2, 3  # tokens; loads ahead; programs of 128 threads and about 150 registers a multiprocessor holds

TOKENS, LANES, D, ROWS, SPLIT = sympy.symbols("tokens lanes dim rows split", positive=True)
PACKED, NEAR, ISSUE = sympy.symbols("packed near issue", nonnegative=True)  # bytes a token and key head; dense tokens; instructions an element


@functools.cache
def model() -> Model:
    """Attention over `tokens` packed and `near` dense tokens of `lanes` key heads."""
    programs = LANES * (SPLIT + 1)
    shares = 2 * programs * D * ROWS * 4
    nbytes = LANES * (TOKENS * PACKED + NEAR * 2 * D * ACT) + shares
    flops = 4 * LANES * ROWS * D * (TOKENS + NEAR)
    instructions = LANES * 2 * D * (TOKENS * ISSUE + 2 * NEAR)
    here = sympy.Min(_RESIDENT, sympy.ceiling(programs / SMS))
    used = sympy.Min(1, here * _STAGES * _TILE * PACKED / (BANDWIDTH * LATENCY / SMS))
    waves = programs / (SMS * _RESIDENT)
    idle = sympy.Max(1, SMS / programs)
    chain = sympy.ceiling(TOKENS / _TILE / SPLIT) / _STAGES * LATENCY
    busy = sympy.Max(nbytes / (BANDWIDTH * used) * idle, instructions / (128 * SMS * CLOCK) * idle, chain, sympy.ceiling(NEAR / _TILE) * LATENCY)
    return Model(nbytes, flops, instructions, busy * sympy.ceiling(waves) / sympy.Max(1, waves) + 2 * CALL, (nbytes - shares) / BANDWIDTH)


def issue(fmt: CacheFormat, dim: int, rows: int) -> float:
    """Instructions an element of keys and values, scores included."""
    count = _ISSUE[fmt.name]
    if isinstance(fmt, Gear):
        count += _OUTLIER * sum(fmt.counts(dim))
    elif isinstance(fmt, Kivi):
        count += {2: 0.4, 4: 0.0, 8: 1.6}[fmt.bits]
    elif isinstance(fmt, Mustafar):
        count += _LEVELS[fmt.bits]
    elif isinstance(fmt, Bfp) and fmt.bits > 4:
        count -= 1.2
    elif isinstance(fmt, Matryoshka):
        count *= max(map(max, fmt.ranks(1, dim))) / dim
    return count + SCORE * rows / dim


@dataclass(frozen=True)
class Shape:
    """One attention: batch, key heads, channels, columns of queries, tokens packed and near, and the dtype of the model."""

    batch: int
    groups: int
    dim: int
    rows: int
    tokens: int
    near: int
    dtype: torch.dtype

    def values(self, fmt: CacheFormat, split: int) -> dict[str, float]:
        """The symbols of `model` but for the machine."""
        about = {"lanes": self.batch * self.groups, "dim": self.dim, "rows": self.rows, "tokens": self.tokens, "near": self.near, "split": split}
        packed = fmt.bytes_per_token(self.groups, self.dim, self.dtype) / self.groups
        return about | {"packed": packed, "issue": issue(fmt, self.dim, self.rows), "act": self.dtype.itemsize}


def predict(fmt: CacheFormat, shape: Shape, split: int, machine: Mapping[str, float]) -> Prediction:
    """The model's figures."""
    return model().evaluate({**shape.values(fmt, split), **machine})


def dense_seconds(shape: Shape, machine: Mapping[str, float]) -> float:
    """The same attention over dense keys and values by the vendor's kernel."""
    nbytes = shape.batch * shape.groups * (shape.tokens + shape.near) * 2 * shape.dim * shape.dtype.itemsize
    return nbytes / (DENSE * machine["bandwidth"]) + machine["call"]


def best(fmt: CacheFormat, shape: Shape, machine: Mapping[str, float]) -> int:
    """The number of splits that the model finds cheapest; no program is left without a tile."""
    most = max(1, -(-shape.tokens // _TILE))
    return min((s for s in SPLITS if s <= most), key=lambda s: predict(fmt, shape, s, machine).seconds)


def decision(site: kv_cost.Site, target: str = "") -> kv_cost.Prediction:
    """Seconds of dense and compressed attention of a graph's site, and the context from which the compressed one is faster for good.

    `target` names a class of gpus.CLASSES; the default is the GPU that is there.
    """
    fmt = parse(site.spec)
    machine = gpus.constants(gpus.by_class(target)) if target else machines.gpu("cuda")
    columns = max(8, 1 << (site.queries * site.heads // site.groups - 1).bit_length())

    def both(tokens: int) -> tuple[float, float]:
        shape = Shape(site.batch, site.groups, site.dim, columns, max(1, tokens - fmt.window - fmt.page), fmt.window + fmt.page, site.dtype)
        return dense_seconds(shape, machine), predict(fmt, shape, best(fmt, shape, machine), machine).seconds

    slower = [tokens for tokens in (1 << i for i in range(8, 21)) if both(tokens)[0] <= both(tokens)[1]]
    low, high = (slower[-1], 2 * slower[-1]) if slower else (0, 256)
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (low, middle) if both(middle)[0] > both(middle)[1] else (middle, high)
    dense, packed = both(site.tokens)
    return kv_cost.Prediction(dense, packed, high if high <= 1 << 20 else None)


@functools.lru_cache(maxsize=1024)
def splits(fmt: CacheFormat, pages: int, width: int, batch: int, groups: int, dim: int, rows: int, dtype: torch.dtype, device: str) -> int:
    """Programs that share a key head: fixed by what the cache can hold, so that a captured graph serves every length."""
    shape = Shape(batch, groups, dim, rows, max(1, pages * fmt.page), width, dtype)
    return best(fmt, shape, machines.gpu(device))
