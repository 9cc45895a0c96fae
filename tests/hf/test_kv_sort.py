"""Sorting weights at compile time leaves the model as it is and puts channels of like size together."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effllm.hf.kv_calibrate import collect
from effllm.hf.kv_sort import sort_weights


def test_outputs_stay_and_channels_are_sorted() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3::16] *= 20  # an outlier pair in every head
            layer.self_attn.v_proj.weight[5::16] *= 20
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(1))
    before = model(ids).logits
    lines = sort_weights(model, ids)
    assert len(lines) == 3 and "rotary" in lines[0]
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    for s in collect(model, [ids]):
        energy = [torch.diagonal(c.second, dim1=-2, dim2=-1) for c in (s.keys, s.values)]
        assert (energy[0][:, :8].argmax(-1) == 0).all()  # the pair of the outlier is the first now
        assert (energy[1].argmax(-1) == 0).all()
    for layer in model.model.layers:
        read = layer.self_attn.o_proj.weight.square().sum(0).reshape(2, 2, 16).sum(1)  # both query heads of a key head
        size = layer.self_attn.v_proj.weight.square().sum(1).reshape(2, 16) / read
        assert (size.diff(dim=-1) <= 1e-5).all()
