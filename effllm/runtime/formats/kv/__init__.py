"""Formats of compressed keys and values: pure functions, one file per format. Tensors are (..., tokens, channels)."""
