"""Rows of kv_quality.py that need more than a text: calibrated tables, permuted weights, attention that reports to the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from effllm.hf import texts
from effllm.hf.cache import CompressedCache
from effllm.hf.demo import load_demo
from effllm.hf.kv_calibrate import States, collect, pca_tables, sort_tables, weighted_tables
from effllm.hf.kv_evict import EvictingCache, observing
from effllm.hf.kv_sort import sort_weights
from effllm.runtime.caches.ems import Ems

CALIBRATION = 8  # windows of 512 tokens of even articles


class Observing:
    """A model whose attention reports its queries to evicting caches."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **kw: Any) -> Any:
        """The model's forward."""
        with observing(self.model):
            return self.model(**kw)


def methods(wheel: str | None, basis: str | None, method: Any) -> dict[str, Any]:
    """Rows by name; statistics are gathered at the first use."""

    @lru_cache(maxsize=1)
    def states() -> list[States]:
        model, tokenizer = load_demo(torch.bfloat16)
        return collect(model, texts.windows(tokenizer, texts.calibration_text(wheel).text, 512, CALIBRATION))

    @cache
    def orders(way: str, block: int) -> dict[int, list[Tensor]]:
        return sort_tables(states(), way, values=True, block=block)

    @cache
    def bases(name: str) -> dict[int, list[Tensor]]:
        return read_basis(basis, name) if basis is not None else {"pca": pca_tables, "weighted": weighted_tables}[name](states())

    @lru_cache(maxsize=1)
    def permuted() -> Any:
        model, tokenizer = load_demo()
        model = copy.deepcopy(model).float()
        sort_weights(model, texts.windows(tokenizer, texts.calibration_text(wheel).text, 64, 1))
        return model

    def tabled(spec: str, tables: Callable[[], dict[int, list[Tensor]]]) -> Any:
        return method(spec, lambda model, capacity: (model, CompressedCache(model, spec, tables=tables())))

    def pair(spec: str) -> Any:
        return method(spec, lambda model, capacity: (permuted(), CompressedCache(model, spec)))

    def evicting(settings: Ems) -> Any:
        return method(settings.spec, lambda model, capacity: (Observing(model), EvictingCache(model, settings)))

    rows = {f"bfp-4{tag}-{way}": tabled(f"bfp(bits=4,vbits=4,block={block})", lambda way=way, block=block: orders(way, block))
            for tag, block in (("", 32), ("-g16", 16)) for way in ("post", "layout")}  # fmt: skip
    rows["bfp-4-pair"] = pair("bfp(bits=4,vbits=4)")
    rows["bfp-4-g16-pair"] = pair("bfp(bits=4,vbits=4,block=16)")
    for name in ("pca", "weighted") if basis is None else ("pca", "weighted", "trained"):
        rows[f"matryoshka-50-{name}"] = tabled("matryoshka(k=0.5,v=0.5)", lambda name=name: bases(name))
        rows[f"matryoshka-75-{name}"] = tabled("matryoshka(k=0.75,v=0.75)", lambda name=name: bases(name))
    rows |= {f"ems-{b}": evicting(Ems(budget=b)) for b in (256, 512, 1024)}
    rows["ems-256-evict"] = evicting(Ems(budget=256, merge=0))
    return rows


def read_basis(path: str, name: str) -> dict[int, list[Tensor]]:
    """Tables that benchmarks/kv_basis.py wrote."""
    out: dict[int, list[Tensor]] = {}
    for key, t in sorted(load_file(path).items()):
        kind, layer, _ = key.split(".")
        if kind == name:
            out.setdefault(int(layer), []).append(t)
    return out


def evicting_sizes(spec: str, heads: int, dim: int) -> dict[str, float]:
    """Bytes of one layer of an evicting cache as a token of 4096 tokens sees them: keys, values, five numbers a slot."""
    given = dict(part.split("=") for part in spec[4:-1].split(","))
    slots = int(given["budget"]) + int(given["slack"])
    size = slots * heads * (4 * dim + 8 + 4 * 4) / 4096
    return {"bytes": size, "formula": size, "share": size / (4 * heads * dim), "total_share_4k": size / (4 * heads * dim)}
