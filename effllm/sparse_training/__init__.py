"""Pieces for training sparse models, each usable alone: mask schedules, straight-through linears, an optimizer and losses."""

from effllm.sparse_training.adams import AdamS, RowScaled
from effllm.sparse_training.linear import SR_STE, masked_linear, masked_weight
from effllm.sparse_training.losses import distilled, squarehead
from effllm.sparse_training.schedules import decay, geometric, pattern_at, stepwise

__all__ = ["SR_STE", "AdamS", "RowScaled", "decay", "distilled", "geometric", "masked_linear", "masked_weight", "pattern_at", "squarehead", "stepwise"]
