"""Tiny random-weight models of the families that effllm is tested on; nothing is downloaded.

Sizes are odd on purpose: a vocabulary of 83 fills no tile, 112 and 72 columns are no multiple of the group size 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB = 83
_TINY = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_GQA = _TINY | {"num_key_value_heads": 2}
_WIDE = _GQA | {"head_dim": 32}
_HALF = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def _moe(**more: Any) -> dict[str, Any]:
    return _GQA | {"num_experts_per_tok": 2} | more


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_WIDE)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA | {"intermediate_size": 100}, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_WIDE | _HALF, query_pre_attn_scalar=32)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_WIDE | _HALF, query_pre_attn_scalar=32)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GQA)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_GQA, partial_rotary_factor=0.5)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=72, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_TINY)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_TINY)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_moe(num_local_experts=4), sliding_window=None)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_moe(num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=80))
    ),
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A family's model: two layers, hidden 64 or 72, the same weights every time."""
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype).eval()


def shallow(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same with its first layer only: Dynamo takes half the time, for tests in which a second layer would only be compiled to the same."""
    model = tiny(family, dtype)
    inner = model.base_model
    del (inner.h if hasattr(inner, "h") else inner.layers)[1:]
    model.config.num_hidden_layers = 1
    return model
