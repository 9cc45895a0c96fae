"""bitsandbytes: int8 with int8 activations (LLM.int8 without outliers) and NF4, eager as their modules run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Candidate
from effllm.autotune.peers.base import Peer, label
from effllm.autotune.peers.modules import Modules

BLOCK = 64  # values that share an NF4 scale: the library's default


class Bitsandbytes(Peer):
    """What the adapters share."""

    package, install = "bitsandbytes", "pip install --no-deps bitsandbytes"


class Int8(Bitsandbytes):
    """Linear8bitLt with threshold 0: one scale per output, one per token."""

    name = "bitsandbytes-int8"

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize with the library's own rounding."""
        del group
        nn = importlib.import_module("bitsandbytes").nn
        n, k = weight.shape
        layer = nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
        layer.weight = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to(weight.device).eval()
        with torch.no_grad():
            layer(torch.zeros(1, k, dtype=torch.float16, device=weight.device))  # the first call moves its state into place
        made = Modules(layer, n * k + 4 * n, cache, _int8_values, dtype=torch.float16)  # it casts others, with a warning
        label(made, self, 8, "int8")
        made.floor = 0.03  # int8 activations
        return made


def _int8_values(layer: Any) -> Tensor:
    codes = layer.weight.CB if layer.weight.CB is not None else layer.state.CB
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return (codes if codes is not None else layer.weight.data).double() * scale.double().unsqueeze(-1) / 127


class Nf4(Bitsandbytes):
    """Linear4bit, NF4 in blocks of 64 with plain scales."""

    name = "bitsandbytes-nf4"

    def refuses(self, n: int, k: int, group: int) -> str:
        """Blocks must divide K."""
        return f"K = {k} is no multiple of its block, {BLOCK}" if k % BLOCK else ""

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize with the library's own rounding."""
        del group
        bnb = importlib.import_module("bitsandbytes")
        n, k = weight.shape
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=False, device="meta")
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=False)
        layer = layer.to(weight.device).eval()

        # now: with AVX-512 the first forward packs the codes anew, and the library's dequantizer no longer reads them
        values: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).view(n, k)
        made = Modules(layer, n * k // 2 + 4 * n * k // BLOCK, cache, lambda layer: values)
        label(made, self, 4, "bf16")
        return made


PEERS: tuple[Peer, ...] = (Int8(), Nf4())
