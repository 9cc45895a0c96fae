"""Op of decoding attention: a few queries over a long cache of grouped key heads."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.lowering.bipolar_linear import provider
from effllm.lowering.op import YES, Op, Provider, define


def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v for q (B, H, Q, D), k and v (B, Hk, S, D), H a multiple of Hk; mask bool or additive."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _attention(q, k, v, mask, scale, kernel):  # type: ignore[no-untyped-def]
    return provider("decode_attention", kernel).call(q, k, v, mask, scale)


ATTENTION: Op = define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str kernel) -> Tensor",
    decode_attention_reference,
    _attention,
    tolerance={torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
ATTENTION.register(Provider("reference", "decode_attention", "any", "dense", lambda p: YES, decode_attention_reference, rank=-1))
