"""Our ops as candidates of the kernel benchmark: the provider and configuration that the op itself would use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import use
from effllm.autotune.bench.candidate import Rotating, copies
from effllm.autotune.shapes import Site
from effllm.errors import OptionError, nearest
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar

GRID = "symmetric"


class Kernel(Rotating):
    """A bipolar linear with random codes, scales over a wide range, and bf16 outputs."""

    kind = "effllm"

    def __init__(self, op: str, site: Site, bits: int, group: int, device: str, cache: int) -> None:
        from effllm import __version__

        act = "a8" if op.endswith("a8") else "a16"
        self.problem = Problem(op, site.n, site.k, bits, group, False, act, 1, torch.bfloat16, device)
        self.provider, _ = providers.select(self.problem)
        first = operands(site, bits, group, self.provider.layout, device)
        nbytes = sum(t.numel() * t.element_size() for t in first.values())
        super().__init__([first] + [{k: t.clone() for k, t in first.items()} for _ in range(copies(nbytes, cache) - 1)], nbytes)
        self.name, self.version, self.op, self.bits = f"effllm w{bits}{act}", __version__, op, bits
        self.act = "int8" if act == "a8" else "bf16"
        self.floor = OPS[op].tolerance[torch.bfloat16]
        self.zero = bipolar.zero_point(bits, GRID)
        self.scales: Tensor | None = None
        self.choice = use.Choice(None, "fixed", "")

    def load(self, x: Tensor) -> None:
        """Take the activations; those of an int8 op are quantized here, since Inductor fuses that into the op before."""
        self.x, self.scales = x, None
        if self.act == "int8":
            from effllm.lowering.bipolar_linear import quantize_activation

            self.x, self.scales = quantize_activation(x)
        self.problem = self.problem.at(x.shape[0])
        self.choice = use.choose(self.provider, self.problem)
        tuned = self.provider.tuning is not None
        self.more: dict[str, Any] = {"problem": self.problem, "config": self.choice.config} if tuned else {}

    def call(self, weight: dict[str, Tensor], x: Tensor) -> Tensor:
        """The provider, without the dispatcher of the composite op, which a compiled graph does not pass through either."""
        p = self.problem
        tail = (weight["codes"], weight["scale"], None, None, p.n, p.bits, p.group, self.zero)
        y: Tensor = self.provider.call(x, *tail, **self.more) if self.scales is None else self.provider.call(x, self.scales, *tail, p.dtype, **self.more)
        return y

    def stored(self, index: Tensor) -> Tensor:
        """The value of the codes, decoded by the layout and not by the kernel."""
        p, t = self.problem, self.weights[0]
        u, s, low = layouts.get(self.provider.layout).rows(t["codes"], t["scale"], None, index, n=p.n, bits=p.bits, group=p.group)
        return bipolar.dequantize(u, s, low, self.zero, p.group)[:, : p.k].double()

    def activations(self, x: Tensor) -> Tensor:
        """What an int8 op gets is its input: quantizing is another op, with its own test."""
        return x.double() if self.scales is None else self.x.double() * self.scales.double()

    def figures(self) -> dict[str, Any]:
        """Provider, configuration and how it was found, predicted and least possible time in µs."""
        found: dict[str, Any] = {"provider": self.provider.name, "config": self.choice.config, "how": self.choice.how}
        if self.provider.tuning is not None and self.choice.config is not None:
            predicted = self.provider.tuning.predict(self.problem, self.choice.config)
            found |= {"predicted_us": predicted.seconds * 1e6, "bound_us": predicted.bound * 1e6}
        return found


def operands(site: Site, bits: int, group: int, layout: str, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Random codes and scales in a layout, made without packing: every bit pattern is a code. Scales span 2^-4 to 2^4 around one."""
    shapes = layouts.get(layout).fake_shapes((site.n, site.k), bits, group)
    g = torch.Generator(device=device).manual_seed(seed)
    shape, dtype = shapes["codes"]
    low, high = (0, 256) if dtype == torch.uint8 else (-(2**31), 2**31)
    codes = torch.randint(low, high, shape, generator=g, dtype=dtype or torch.int32, device=device)
    size = shapes["scale"][0]
    powers = torch.randint(-4, 5, size, generator=g, device=device).float()
    scale = (torch.rand(size, generator=g, device=device) + 0.5) * torch.exp2(powers) / 2**bits
    return {"codes": codes, "scale": scale.half()}


Maker = Callable[[Site, int, int, str, int], Kernel]  # (site, bits, group, device, cache bytes)


def _maker(op: str) -> Maker:
    return lambda site, bits, group, device, cache: Kernel(op, site, bits, group, device, cache)


# a further op joins the benchmark by one entry here
REGISTRY: dict[str, Maker] = {op: _maker(op) for op in ("bipolar_linear", "bipolar_linear_a8")}


def check(ops: list[str]) -> None:
    """Raise OptionError (E-OPT-OP) for an op that has no benchmark."""
    for op in ops:
        if op not in REGISTRY:
            raise OptionError("E-OPT-OP", f"no kernel benchmark of an op {op!r}", nearest(op, REGISTRY))
