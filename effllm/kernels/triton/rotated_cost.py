"""Cost of attention over turned keys: the model of kv_cost.py with dense keys and values, and how many programs share a key head."""

from __future__ import annotations

import functools

import torch

from effllm.autotune import machines
from effllm.autotune.cost import Prediction
from effllm.kernels.triton import kv_cost

_ISSUE = 4.0  # instructions an element of keys and values, one turn a tile, beyond the scores; read from the machine code for cuda:90


def predict(keys: int, batch: int, groups: int, dim: int, rows: int, dtype: torch.dtype, split: int, device: str) -> Prediction:
    """The model's figures for `keys` stored keys of `groups` key heads, `rows` columns of queries."""
    near = {"near": 0, "packed": 2 * dim * dtype.itemsize, "issue": _ISSUE + kv_cost.SCORE * rows / dim, "act": dtype.itemsize}
    sizes = {"lanes": batch * groups, "dim": dim, "rows": rows, "tokens": max(1, keys), "split": split}
    return kv_cost.model().evaluate({**near, **sizes, **machines.gpu(device)})


@functools.lru_cache(maxsize=1024)
def splits(keys: int, batch: int, groups: int, dim: int, rows: int, dtype: torch.dtype, device: str) -> int:
    """The number of programs that the model finds cheapest."""
    most = max(1, -(-keys // 64))
    return min((s for s in kv_cost.SPLITS if s <= most), key=lambda s: predict(keys, batch, groups, dim, rows, dtype, s, device).seconds)
