"""torchao: int8 weight-only, int4 weight-only, and int8 with dynamic int8 activations, eager as their modules run."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from torch import Tensor

from effllm.autotune.bench.candidate import Candidate
from effllm.autotune.peers.base import Peer, label
from effllm.autotune.peers.modules import Modules, linear

_GROUPS = (32, 64, 128)  # of its int4 kernels


def _quantization() -> Any:
    # it warns about CUDA libraries that a CPU build has no use for
    logging.getLogger("torchao").setLevel(logging.ERROR)
    return importlib.import_module("torchao.quantization")


class Torchao(Peer):
    """What the adapters share."""

    package, install = "torchao", "pip install --no-deps torchao"


class Int8(Torchao):
    """Int8WeightOnlyConfig: one scale per output."""

    name = "torchao-int8"

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize with torchao's own rounding."""
        del group
        layer, q = linear(weight), _quantization()
        q.quantize_(layer, q.Int8WeightOnlyConfig())
        made = Modules(layer, weight.numel() + 2 * weight.shape[0], cache, lambda layer: layer.weight.dequantize())
        label(made, self, 8, "bf16")
        return made


class Int8Dynamic(Torchao):
    """Int8DynamicActivationInt8WeightConfig: activations quantized per token inside the call."""

    name = "torchao-int8-dyn"

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize with torchao's own rounding."""
        del group
        layer, q = linear(weight), _quantization()
        q.quantize_(layer, q.Int8DynamicActivationInt8WeightConfig())
        made = Modules(layer, weight.numel() + 2 * weight.shape[0], cache, lambda layer: layer.weight.dequantize())
        label(made, self, 8, "int8")
        made.floor = 0.03  # int8 activations
        return made


class Int4(Torchao):
    """int4 weight-only: aten's int4 product on the CPU (a prototype in torchao), tinygemm on CUDA."""

    name = "torchao-int4"

    def refuses(self, n: int, k: int, group: int) -> str:
        """Its groups must divide K."""
        if group not in _GROUPS:
            return f"groups are {', '.join(map(str, _GROUPS))}, not {group}"
        return f"K = {k} is no multiple of {group}" if k % group or n % 16 else ""

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize with torchao's own rounding. The packed weight cannot be read back, so the check is against the dense one."""
        layer, q = linear(weight), _quantization()
        if weight.device.type == "cuda":
            config = q.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
        else:
            workflow = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
            config = workflow.PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
        q.quantize_(layer, config)
        made = Modules(layer, weight.numel() // 2 + 4 * weight.numel() // group, cache)
        label(made, self, 4, "bf16")
        made.quality = 0.2
        return made


PEERS: tuple[Peer, ...] = (Int8(), Int4(), Int8Dynamic())
