"""Imports every cache format, which registers it."""

from __future__ import annotations

from effllm.runtime.caches import bfp, dense, gear, kivi, matryoshka, mustafar

__all__ = ["bfp", "dense", "gear", "kivi", "matryoshka", "mustafar"]
