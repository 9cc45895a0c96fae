"""Imports every cache format, which registers it."""

from __future__ import annotations

from effllm.runtime.caches import dense, kivi

__all__ = ["dense", "kivi"]
