"""Hugging Face models out of GGUF files of the llama architecture: config, tensor names, row order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from effllm.errors import EffllmError
from effllm.hf.gguf_tokenizer import build_tokenizer
from effllm.runtime.formats.base import Packed
from effllm.runtime.gguf import GGUF, dense, open_gguf, read
from effllm.runtime.packed import PackedEmbedding, PackedLinear, PackedWeight
from effllm.runtime.weights import BipolarWeight

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; EffllmError for a tensor that llama does not have."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in TOP:
        return f"{TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK:
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{parts[3]}"
    raise EffllmError("E-GGF-TENSOR", f"tensor {name!r} has no place in a llama model", "only plain llama models can be read")


def rope_order(name: str, rows: int, config: LlamaConfig) -> Tensor | None:
    """Row indices that undo llama.cpp's reordering of q and k for interleaved rope; None for tensors that were not reordered."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    parts = name.split(".")
    if len(parts) != 4 or parts[2] not in heads:
        return None
    n = heads[parts[2]]
    return torch.arange(rows).view(n, rows // n // 2, 2).swapaxes(1, 2).reshape(rows)


def read_config(file: GGUF, dtype: torch.dtype) -> LlamaConfig:
    """The transformers config that the metadata of a llama GGUF file describes."""
    f = file.fields
    if f.get("general.architecture") != "llama":
        raise EffllmError("E-GGF-ARCH", f"architecture {f.get('general.architecture')!r} is not supported", "give a GGUF file of the llama architecture")
    heads = f["llama.attention.head_count"]
    special = {k: f.get(f"tokenizer.ggml.{k}") for k in ("bos_token_id", "eos_token_id", "padding_token_id")}
    return LlamaConfig(
        vocab_size=len(f["tokenizer.ggml.tokens"]),
        hidden_size=f["llama.embedding_length"],
        intermediate_size=f["llama.feed_forward_length"],
        num_hidden_layers=f["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=f.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=f["llama.context_length"],
        # stored as fp32: six digits give back the decimal that was meant (1e-05)
        rms_norm_eps=float(f"{f['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(f.get("llama.rope.freq_base", 1e4))},
        tie_word_embeddings=all(r.name != "output.weight" for r in file.records),
        bos_token_id=special["bos_token_id"],
        eos_token_id=special["eos_token_id"],
        pad_token_id=special["padding_token_id"],
        dtype=dtype,
    )


def empty_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The model on the meta device, except the rotary frequencies, which no file holds."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def load_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A llama GGUF file as a dense (LlamaForCausalLM in eval mode, tokenizer). Raises EffllmError (E-GGF-*)."""
    file = open_gguf(path)
    config = read_config(file, dtype)
    state = {}
    for record in file.records:
        w = dense(record)
        order = rope_order(record.name, w.shape[0], config)
        state[hf_name(record.name)] = (w if order is None else w[order]).to(dtype)
    return _fill(empty_llama(config), state, path), build_tokenizer(file.fields)


def load_gguf_packed(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, *, act: str = "a16", device: str = "cpu", kernel: str | None = None
) -> tuple[Any, Any]:
    """A llama GGUF file as a (LlamaForCausalLM, tokenizer) that computes with the file's own codes: nothing is quantized again.

    Q4_0, Q4_1 and Q8_0 tensors become packed modules; a tied head shares the embedding's. Other tensors are dense in `dtype`,
    the dtype of the activations; `act` is "a16" or "a8", `kernel` a provider name. The embedding gathers in 16 bits either way.
    Raises EffllmError (E-GGF-*).
    """
    file = open_gguf(path)
    config = read_config(file, dtype)
    model = empty_llama(config)
    state = {}
    for record in file.records:
        w = read(record)
        order = rope_order(record.name, w.shape[0], config)
        target = hf_name(record.name)
        if isinstance(w, Packed):
            own = (w if order is None else _take_rows(w, order)).to(device)
            _install(model, target.removesuffix(".weight"), BipolarWeight(own, act=act, dtype=dtype, kernel=kernel))
        else:
            state[target] = (w if order is None else w[order]).to(device, dtype)
    return _fill(model, state, path).to(device), build_tokenizer(file.fields)


def _take_rows(packed: Packed, order: Tensor) -> Packed:
    """The same weight with its rows in another order; codes and scales move, none changes."""
    moved = {k: t.index_select(1 if k == "planes" else 0, order) for k, t in packed.tensors.items()}
    return Packed(packed.format, packed.version, packed.shape, moved, dict(packed.attrs))


def _install(model: Any, name: str, weight: PackedWeight) -> None:
    old = model.get_submodule(name)
    if tuple(old.weight.shape) != weight.shape:
        raise EffllmError("E-GGF-SHAPE", f"{name} is {weight.shape} in the file and {tuple(old.weight.shape)} by its metadata", "the file is damaged")
    if isinstance(old, torch.nn.Embedding):
        model.set_submodule(name, PackedEmbedding(weight, old.padding_idx))
        if model.config.tie_word_embeddings:
            model.set_submodule("lm_head", PackedLinear(weight))
    else:
        model.set_submodule(name, PackedLinear(weight))


def _fill(model: Any, state: dict[str, Tensor], path: str | Path) -> Any:
    """Put the dense tensors in place; whatever is neither dense nor packed is missing from the file."""
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _, extra = model.load_state_dict(state, strict=False, assign=True)
    missing = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if missing or extra:
        raise EffllmError("E-GGF-TENSOR", f"{path}: missing tensors {missing}, unexpected {extra}", "give a complete GGUF file")
    if isinstance(model.lm_head, torch.nn.Linear):
        model.tie_weights()
    return model.eval()
