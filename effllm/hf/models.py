"""What the command line calls MODEL: the word `demo`, a Hugging Face directory, or an effllm checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from effllm.errors import OptionError
from effllm.runtime.header import NAME, read_header

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def is_checkpoint(path: Path) -> bool:
    """Whether a directory was written by `effllm.save`."""
    return (path / NAME).is_file()


def is_packed(model: str) -> bool:
    """Whether the command line's MODEL is an effllm checkpoint directory."""
    return model != "demo" and is_checkpoint(Path(model))


def resolve(model: str, dtype: torch.dtype = torch.bfloat16, bits: int | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None). Never touches the network.

    `dtype` is for dense models. `bits` reads a checkpoint's weights at that precision where they have more. Raises OptionError
    (E-OPT-MODEL where there is no such model, E-OPT-BITS, E-OPT-TOKENIZER) and CheckpointError.
    """
    if bits is not None and not is_packed(model):
        raise OptionError("E-OPT-BITS", f"--bits lowers a checkpoint, and {model!r} is none", f"use --recipe w{bits}")
    if model == "demo":
        from effllm.hf.demo import load_demo

        return load_demo(dtype)
    path = Path(model)
    if not path.is_dir():
        raise OptionError("E-OPT-MODEL", f"{model!r} is no directory", "give a Hugging Face directory, an effllm checkpoint directory, or the word demo")
    if is_checkpoint(path):
        from effllm.runtime.checkpoint import load

        if bits is not None and all(w["attrs"]["bits"] <= bits for w in read_header(path)["weights"].values()):
            raise OptionError("E-OPT-BITS", f"no weight of {model!r} has more than {bits} bits", "leave --bits out, or ask for fewer")
        return load(path, bits=bits), tokenizer_of(path)
    if not (path / "config.json").is_file():
        raise OptionError("E-OPT-MODEL", f"{model!r} has no config.json", "give a directory written by save_pretrained or by effllm compress")
    from transformers import AutoModelForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OptionError("E-OPT-MODEL", f"transformers cannot load {model!r}: {error}", "give a causal language model that transformers knows") from error
    return loaded.eval(), tokenizer_of(path)


def tokenizer_of(path: Path) -> Any:
    """The directory's tokenizer, None where it has none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:  # what a damaged or partial set of files raises
        step = "save the tokenizer into the directory again with tokenizer.save_pretrained"
        raise OptionError("E-OPT-TOKENIZER", f"the tokenizer in {path} cannot be read: {str(error).splitlines()[0]}", step) from error


def need_tokenizer(tokenizer: Any, model: str) -> Any:
    """The tokenizer, or OptionError where the model came without one."""
    if tokenizer is None:
        raise OptionError("E-OPT-TOKENIZER", f"{model!r} has no tokenizer, and text is to be read", "save the tokenizer into the same directory")
    return tokenizer


def chat_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids (1, S) of one user message, through the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    else:
        text = prompt
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)], dtype=torch.long)
