"""A llama of a few thousand weights with a word-level tokenizer, for tests of everything around a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(61)]


def tiny_llama(dtype: torch.dtype = torch.bfloat16, tied: bool = True, layers: int = 2) -> Any:
    """Two layers unless asked, hidden 64, vocabulary 64, random weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_text(words: int = 1600) -> str:
    """A text of that many tokens."""
    picks = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(1))
    return " ".join(WORDS[int(i)] for i in picks)


def tiny_dir(path: Path) -> Path:
    """The model and the tokenizer as a Hugging Face directory."""
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
