"""gemlite: Triton kernels for packed weights on a GPU, groups along K, fp16 activations."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Candidate, Rotating, copies
from effllm.autotune.peers.base import Peer, label

GROUP = 128  # used where the asked group is per channel


class Packed(Rotating):
    """GemLiteLinear modules that share their numbers, each with tensors of its own."""

    floor = 2e-3  # fp16 outputs

    def __init__(self, weight: Tensor, bits: int, group: int, cache: int) -> None:
        self.bits, self.group = bits, group or GROUP
        n, k = weight.shape
        w = weight.float().view(n, k // self.group, self.group)
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8).half().float()
        zero = (-low / scale).round()
        self.codes = ((w / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8).view(n, k)
        self.scale, self.zero = scale.view(-1, 1), zero.view(-1, 1)
        nbytes = n * k * bits // 8 + 4 * n * k // self.group
        super().__init__([self._layer(n, k) for _ in range(copies(nbytes, cache))], nbytes)

    def _layer(self, n: int, k: int) -> object:
        core = importlib.import_module("gemlite.core")
        half = core.DType.FP16
        layer = core.GemLiteLinear(W_nbits=self.bits, group_size=self.group, in_features=k, out_features=n, input_dtype=half, output_dtype=half)
        layer.pack(self.codes, self.scale.half(), self.zero.half(), None)
        return layer

    def load(self, x: Tensor) -> None:
        """Take the activations in fp16."""
        self.x = x.half()

    def call(self, weight: object, x: Tensor) -> Tensor:
        """The module's forward: it picks GEMV, split-K or GEMM by the rows, and tunes at its first calls."""
        y: Tensor = weight(x)  # type: ignore[operator]
        return y

    def stored(self, index: Tensor) -> Tensor:
        """(code - zero) * scale."""
        n, k = self.codes.shape
        groups = k // self.group
        u = self.codes[index].double().view(len(index), groups, self.group)
        scale, zero = (t.view(n, groups)[index].double().unsqueeze(-1) for t in (self.scale, self.zero))
        return ((u - zero) * scale).view(len(index), k)


class Gemlite(Peer):
    """gemlite at one width."""

    package, install, devices = "gemlite", "pip install gemlite", ("cuda",)

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"gemlite-w{bits}a16", bits

    def refuses(self, n: int, k: int, group: int) -> str:
        """Groups must divide K."""
        return f"K = {k} is no multiple of {group or GROUP}" if k % (group or GROUP) else ""

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Round to the nearest code between each group's smallest and largest value."""
        made = Packed(weight, self.bits, group, cache)
        label(made, self, self.bits, "bf16")
        made.act = "fp16"
        return made


PEERS: tuple[Peer, ...] = (Gemlite(8), Gemlite(4))
