"""The tokenizer that a GGUF file describes, for byte-level BPE vocabularies.

transformers' own conversion ignores `tokenizer.ggml.pre`: for SmolLM it drops the step that splits digits one by one, and so
cuts runs of spaces before digits differently from the tokenizer that the model was trained with.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from effllm.errors import EffllmError

CONTROL = 3  # tokenizer.ggml.token_type of special tokens
DIGITS_FIRST = {"smollm": True, "gpt-2": False}


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A fast tokenizer from GGUF metadata; EffllmError (E-GGF-TOKENIZER) for kinds whose splitting rules are not known here."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in DIGITS_FIRST:
        raise EffllmError("E-GGF-TOKENIZER", f"tokenizer {kind!r} with pre-tokenizer {pre!r}", f"known are 'gpt2' with one of {sorted(DIGITS_FIRST)}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    t = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS_FIRST[pre] else []
    t.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    special = [s for s, k in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if k == CONTROL]
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])

    def named(key: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast
