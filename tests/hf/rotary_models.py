"""Tiny models with every kind of rotary positions that the recogniser is to tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.hf.families import VOCAB

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def llama(head_dim: int = 16, longest: int = 512, layers: int = 1, implementation: str = "sdpa", **rope: Any) -> Callable[[], Any]:
    more = {"head_dim": head_dim, "max_position_embeddings": longest, "num_hidden_layers": layers, "attn_implementation": implementation}
    return lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_BASE | more, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | rope))


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
_LONG = {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64}
_SHORT, _FAR = [1.0 + 0.1 * i for i in range(8)], [1.0 + 0.9 * i for i in range(8)]

# ruff: noqa: E501 - a table
# name -> (model, scaling, layout, channels, factor, limit)
PROVED: dict[str, tuple[Callable[[], Any], str, str, int, float, int | None]] = {
    "llama": (llama(), "default", "half", 16, 1.0, None),
    "eager attention": (llama(implementation="eager"), "default", "half", 16, 1.0, None),
    "linear": (llama(rope_type="linear", factor=4.0), "linear", "half", 16, 1.0, None),
    "llama3": (llama(64, **_LLAMA3), "llama3", "half", 64, 1.0, None),
    "yarn": (llama(64, 4096, rope_type="yarn", factor=4.0, original_max_position_embeddings=1024), "yarn", "half", 64, 1.1386294361, None),
    "dynamic": (llama(longest=64, rope_type="dynamic", factor=4.0), "dynamic", "half", 16, 1.0, None),
    "longrope": (llama(short_factor=_SHORT, long_factor=_FAR, **_LONG), "longrope", "half", 16, 1.2247448714, None),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_BASE)), "default", "half", 16, 1.0, None),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_BASE | {"head_dim": 32})), "default", "half", 32, 1.0, None),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**_BASE, sliding_window=None)), "default", "half", 16, 1.0, None),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_BASE | {"head_dim": 32})), "default", "half", 32, 1.0, None),
    "phi": (lambda: hf.PhiForCausalLM(hf.PhiConfig(**_BASE, partial_rotary_factor=0.5)), "default", "half", 8, 1.0, None),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_BASE)), "default", "half", 16, 1.0, None),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{k: v for k, v in _BASE.items() if k != "num_key_value_heads"})), "default", "half", 4, 1.0, None),
    "gptj": (lambda: hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=4, n_positions=100, rotary_dim=8)), "default", "interleaved", 8, 1.0, 100),
    "cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**_BASE)), "default", "interleaved", 16, 1.0, None),
    "glm": (lambda: hf.GlmForCausalLM(hf.GlmConfig(**_BASE | {"head_dim": 32}, partial_rotary_factor=0.5)), "default", "interleaved", 16, 1.0, None),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)), "default", "half", 16, 1.0, None),
}  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of PROVED, the same weights every time."""
    torch.manual_seed(0)
    return PROVED[name][0]().to(dtype).eval()


def exact(model: Any) -> Any:
    """Let a model of constant frequencies compute cosines in fp64, so that nothing but the method is measured."""
    for m in model.modules():
        if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling"):

            def forward(x: torch.Tensor, position_ids: torch.Tensor, m: Any = m) -> tuple[torch.Tensor, torch.Tensor]:
                angles = position_ids[..., None].double() * m.inv_freq.double()
                both = torch.cat((angles, angles), -1)
                return (both.cos() * m.attention_scaling).to(x.dtype), (both.sin() * m.attention_scaling).to(x.dtype)

            m.forward = forward
    return model
