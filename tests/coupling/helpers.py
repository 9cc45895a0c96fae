"""What the tests of coupled dimensions share: tiny families with their inputs, exact fp64 logits, short names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.overrides import TorchFunctionMode

from effllm.coupling import CoupledGraph, Dimension
from tests.hf.families import VOCAB, tiny

_SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WHISPER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112, "num_mel_bins": 10, "max_source_positions": 8, "max_target_positions": 32, "decoder_start_token_id": 1, "init_std": 0.2,
}  # fmt: skip
MORE: dict[str, Callable[[], Any]] = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_SMALL, hidden_size=64, ffn_dim=112, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64)
    ),
    "bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_SMALL, **_WHISPER)),
}
MOE = ("mixtral", "qwen2_moe")  # grouped matrix products run in fp32 at most


def build(family: str) -> tuple[Any, dict[str, Any]]:
    """A tiny fp64 model whose biases and norms are not all zeros and ones, and inputs for it."""
    torch.manual_seed(0)
    dtype = torch.float32 if family in MOE else torch.float64
    model = MORE[family]().to(dtype).eval() if family in MORE else tiny(family, dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(3, VOCAB, (2, 9))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if family == "bert":
        del inputs["use_cache"]
    elif family == "t5":
        inputs["decoder_input_ids"] = ids.flip(1)
    elif family == "whisper":
        inputs = {"input_features": torch.randn(2, 10, 16).to(dtype), "decoder_input_ids": ids, "use_cache": False}
    return model, inputs


class Exact(TorchFunctionMode):
    """Casts to fp32 inside of norms and rotary tables become casts to fp64, so that logits of a permuted model differ by fp64 rounding only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*(wide(a) for a in args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The model's logits, in fp64 throughout where its weights are."""
    with torch.no_grad():
        if next(model.parameters()).dtype == torch.float32:
            return model(**inputs).logits
        with Exact():
            return model(**inputs).logits


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def moving(dimension: Dimension, generator: torch.Generator) -> Tensor:
    """A legal permutation that is not the identity in any block."""
    p = dimension.random(generator)
    same = (p == torch.arange(dimension.size)).all(-1, keepdim=True)
    return torch.where(same, p.roll(1, -1), p)


def short(name: str) -> str:
    """A parameter's name without numbers of layers, the part that repeats in all of them, and `.weight`."""
    name = re.sub(r"\.weight$", "", re.sub(r"(^|\.)\d+(?=\.)", "", name))
    heads = r"model\.layers|gpt_neox\.layers|transformer\.h|model\.decoder\.layers|bert\.encoder\.layer|model|transformer|gpt_neox|bert"
    return re.sub(rf"^({heads})\.", "", name)


def table(graph: CoupledGraph) -> list[str]:
    """One line per kind of dimension: how many of them, size, structure or pin, number of members, and which parameters' axes."""
    rows = []
    for d in graph.dimensions:
        names = sorted({f"{short(m.parameter)}[{m.axis}]" for m in d.members})
        state = "pinned" if d.pinned else str(d.structure)
        rows.append(f"{d.size} {state}, {len(d.members)}: {' '.join(names)}")
    return sorted(f"{count} x {row}" for row, count in Counter(rows).items())
