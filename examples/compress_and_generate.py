"""Pack a model to 4 bits, save it, load it in a new model, and generate.

    python examples/compress_and_generate.py [MODEL]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import effllm
from effllm.hf.models import chat_ids, resolve


def main(name: str = "demo", tokens: int = 24) -> str:
    """Returns what the loaded 4-bit model says."""
    model, tokenizer = resolve(name)
    report = effllm.compress(model, "w4")
    print(f"{report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        effllm.save(model, Path(folder) / "packed")
        loaded = effllm.load(Path(folder) / "packed")
    ids = chat_ids(tokenizer, "Why is the sky blue?")
    (out,) = effllm.generate(loaded, ids, max_new_tokens=tokens)
    text = str(tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True))
    print(text)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:2])
