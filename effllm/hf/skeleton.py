"""A transformers model without its weights: the class and the shapes that a directory's config describes, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from effllm.errors import CheckpointError


class _WeightsOnMeta(TorchFunctionMode):
    """While a model is built, uninitialized tensors (its weights) go to meta; computed ones (rotary tables) stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def empty_model(directory: str | Path, *, tables: bool = False) -> PreTrainedModel:
    """The model that `config.json` in `directory` names, every parameter and buffer on the meta device; no memory is used.

    With `tables` only uninitialized weights are on meta: what a constructor computes (rotary tables, ones, zeros) is real.

    Raises CheckpointError (E-CKP-MODEL) when the config cannot be read or its class is not part of transformers.
    """
    folder = Path(directory)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("E-CKP-MODEL", f"the config in {folder} cannot be read: {error}", "give a directory with a Hugging Face config") from error
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise CheckpointError("E-CKP-MODEL", f"the config in {folder} names the class {names}, which transformers does not have", "pass the model yourself")
    with _WeightsOnMeta() if tables else torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
