"""The files beside the weights of a saved transformers model: config, generation config, tokenizer."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
)


def write(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write what belongs beside the weights; nothing for a model that is not from transformers and has no tokenizer."""
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if not isinstance(model, PreTrainedModel):
        return
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    origin = model.config.name_or_path
    source = Path(origin or "")
    if tokenizer is None and origin and source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
