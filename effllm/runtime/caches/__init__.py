"""Compressed key-value caches: formats that pack pages of tokens, and the layer that appends, reads and attends.

A format is data and maths (base.py, dense.py, kivi.py, ...); `layer.Layer` owns the tensors of one attention layer and calls the ops
of lowering/kv_cache.py. docs/add-a-cache.md is the guide.
"""
