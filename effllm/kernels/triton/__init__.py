"""Triton kernels. Importing this package imports Triton; `effllm.lowering` does so only when a GPU site asks for it."""
