"""Op of attention in prompts: many queries over grouped key heads, with a mask that is read tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.lowering.bipolar_linear import provider
from effllm.lowering.op import YES, Op, Provider, define


def prompt_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v for q (B, H, Q, D), k (B, Hk, S, D), v (B, Hk, S, Dv), H a multiple of Hk; the result is (B, Q, H, Dv).

    mask (1 or B, 1 or H, 1 or Q, S) is bool or additive; causal: query i sees the keys up to i. Not both.
    """
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).contiguous()


def _attention(q, k, v, mask, causal, scale, kernel):  # type: ignore[no-untyped-def]
    return provider("prompt_attention", kernel).call(q, k, v, mask, causal, scale)


PROMPT_ATTENTION: Op = define(
    "prompt_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, str kernel) -> Tensor",
    prompt_attention_reference,
    _attention,
    tolerance={torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
PROMPT_ATTENTION.register(Provider("reference", "prompt_attention", "any", "dense", lambda p: YES, prompt_attention_reference, rank=-1))
