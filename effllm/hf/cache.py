"""Compressed caches for `generate` and for a model's forward: one class for every method.

    cache = CompressedCache(model, "kivi(bits=4)", capacity=4096)
    model.generate(**inputs, past_key_values=cache)

Layers that attend to a sliding window, or that hold something else than keys and values, stay as transformers makes them; `decisions`
says which and why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from effllm.errors import CacheError
from effllm.hf.cache_layer import CompressedLayer
from effllm.report import Decision
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.caches.layer import Layer

_KIND = "effllm-kv"



def _sizes(config: Any) -> tuple[int, int]:
    """Key heads and channels of a head; zeros where the config does not tell, or keys are not what is cached."""
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    size: Any = getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads if heads else 0)
    return (0, 0) if getattr(config, "kv_lora_rank", None) else (heads, size)


class CompressedCache(Cache):
    """`model` is a causal LM or its config, `fmt` a format or its text, `capacity` in tokens (None: the cache grows and is not compiled).

    `tables[i]` are the constant tensors of layer i for formats that have any. Raises CacheError.
    """

    def __init__(self, model: Any, fmt: CacheFormat | str = "kivi", capacity: int | None = None, tables: dict[int, list[Tensor]] | None = None) -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        Layer(self.format, capacity)  # refuses capacities that are none
        config = getattr(model, "config", model).get_text_config(decoder=True)
        heads, size = _sizes(config)
        if heads and size:
            self.format.check(heads, size)
            if tables is None:
                self.format.tables(heads, size, torch.device("cpu"))  # refuses where the format needs given ones
        plain: Cache = DynamicCache(config=config) if capacity is None else StaticCache(config=config, max_cache_len=capacity)
        self.decisions: list[Decision] = []
        layers: list[Any] = []
        for i, layer in enumerate(plain.layers):
            if type(layer) in (DynamicLayer, StaticLayer):
                layers.append(CompressedLayer(self.format, capacity, None if tables is None else tables.get(i)))
                self.decisions.append(Decision(f"cache.{i}", f"layers.{i}", "applied", "compressed", self.format.spec))
            else:
                layers.append(layer)
                sliding = getattr(layer, "is_sliding", False)
                why = "attends to a sliding window, which is short: stays dense" if sliding else f"is a {type(layer).__name__}: stays as it is"
                self.decisions.append(Decision(f"cache.{i}", f"layers.{i}", "kept", "sliding" if sliding else "other-cache", why))
        super().__init__(layers=layers)
        if not self.compressed:
            raise CacheError("E-KVC-MODEL", "no layer of the model keeps whole keys and values", "such models have nothing to compress")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to a layer and return what its attention is to see. Raises CacheError (E-KVC-SHAPE) for a model with other layers, E-KVC-FULL."""
        step = "use one cache for one model"
        if layer_idx >= len(self.layers):
            raise CacheError("E-KVC-SHAPE", f"the cache has {len(self.layers)} layers, and the model has a layer {layer_idx}", step)
        out: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        first, own = self.layers[0], self.layers[layer_idx]
        if not torch.compiler.is_compiling() and isinstance(first, CompressedLayer) and isinstance(own, CompressedLayer) and first is not own:
            held = [int(layer.lens[0]) for layer in (first, own)]
            if held[0] != held[1]:
                raise CacheError("E-KVC-SHAPE", f"layer 0 holds {held[0]} tokens and layer {layer_idx} {held[1]}: another model wrote to the cache", step)
        return out

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the compressed layers."""
        return sum(layer.nbytes for layer in self.compressed)

    def prepare(self, model: Any, batch: int = 1, attention_mask: Tensor | None = None) -> CompressedCache:
        """Allocate all layers, which a compiled prompt needs, and take over the padding of a left-padded batch (B, S)."""
        config = model.config.get_text_config(decoder=True)
        heads, size = _sizes(config)
        device = next(t.device for t in (*model.parameters(), *model.buffers()))
        batch = batch if attention_mask is None else attention_mask.shape[0]
        self.early_initialization(batch, heads, size, model.dtype, device)
        if attention_mask is not None:
            self.set_padding(attention_mask)
        return self

    def set_padding(self, attention_mask: Tensor) -> None:
        """Keep left padding (0 in the mask (B, S)) out of the ranges of packed pages. Call it after `prepare`, before the prompt."""
        for layer in self.compressed:
            layer.set_start(attention_mask.long().argmax(-1))

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file. Raises CacheError (E-KVC-SAVE) before its first use or with other kinds of layers in it."""
        if len(self.compressed) != len(self.layers) or not all(layer.ready for layer in self.compressed):
            what = "the cache is empty or has layers that are not compressed"
            raise CacheError("E-KVC-SAVE", what, "save it after the prompt, for models without such layers")
        tensors = {f"{i}.{name}": t.contiguous() for i, layer in enumerate(self.compressed) for name, t in layer.tensors().items()}
        about = {"kind": _KIND, "layers": [layer.about() for layer in self.compressed]}
        save_file(tensors, str(path), {"about": json.dumps(about)})

    def load(self, path: str | Path) -> CompressedCache:
        """Take over a saved cache of the same model and format; a cache with a capacity keeps it, one without takes the file's.

        Raises CacheError (E-KVC-FILE, E-KVC-METHOD, E-KVC-SHAPE, E-KVC-FULL).
        """
        try:
            with safe_open(str(path), framework="pt") as f:
                about = json.loads((f.metadata() or {}).get("about", "{}"))
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, ValueError) as error:
            raise CacheError("E-KVC-FILE", f"cannot read {path}: {error}", "give a file that CompressedCache.save wrote") from error
        if about.get("kind") != _KIND:
            raise CacheError("E-KVC-FILE", f"{path} is no saved cache", "give a file that CompressedCache.save wrote")
        if len(about["layers"]) != len(self.layers):
            raise CacheError("E-KVC-SHAPE", f"the file has {len(about['layers'])} layers, the model {len(self.layers)}", "use one cache for one model")
        for i, layer in enumerate(self.compressed):
            layer.load(about["layers"][i], {n.split(".", 1)[1]: t for n, t in tensors.items() if n.split(".", 1)[0] == str(i)})
        return self

    def snapshot(self) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """A copy of all state, for `restore`: several requests can start from one prompt."""
        return [(layer.about(), {n: t.clone() for n, t in layer.tensors().items()}) for layer in self.compressed]

    @torch.no_grad()
    def restore(self, state: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
        """Go back to a snapshot, in place where the sizes are the same."""
        for layer, (about, tensors) in zip(self.compressed, state, strict=True):
            held = layer.tensors() if layer.ready else {}
            same = {n: t.shape for n, t in held.items()} == {n: t.shape for n, t in tensors.items()}
            if same and layer.about() == about:  # an evicting layer counts outside of its tensors
                for name, t in tensors.items():
                    held[name].copy_(t)
            else:
                layer.load(about, tensors)
