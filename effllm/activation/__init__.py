"""Activation sparsity over a whole model: record activations, choose thresholds, put them in."""

from __future__ import annotations
