"""The node that takes the place of a dense linear or embedding, for a packed weight of any format."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from effllm import compat
from effllm.passes.base import call
from effllm.passes.sites import Site
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights import kind_of
from effllm.runtime.weights.structured import StructuredWeight


def insert(graph: fx.Graph, site: Site, packed: Packed, w: Mapping[str, fx.Node], dtype: torch.dtype, act: str, kernel: str) -> fx.Node:
    """Insert the op on the packed tensors `w`; `packed` is the weight on the meta device."""
    kind = kind_of(packed.format)
    if issubclass(kind, StructuredWeight):
        found = kind.call(packed)
        return call(graph, getattr(torch.ops.effllm, found.op).default, found.arguments(site.x, w, site.bias, kernel), site.node)
    return _bipolar(graph, site, packed, w, dtype, act, kernel)


def _bipolar(graph: fx.Graph, site: Site, packed: Packed, w: Mapping[str, fx.Node], dtype: torch.dtype, act: str, kernel: str) -> fx.Node:
    """Linear with 16-bit or int8 activations, or the embedding gather."""
    node, x, bias, (n, k), a = site.node, site.x, site.bias, packed.shape, packed.attrs
    three = (w["codes"], w["scale"], w.get("minimum"))
    zero = bipolar.zero_point(a["bits"], a["grid"], a["source_bits"])
    if site.kind == "embedding":
        return call(graph, torch.ops.effllm.bipolar_embedding.default, (x, *three, n, k, a["bits"], a["group"], zero, dtype, kernel), node)
    tail = (n, a["bits"], a["group"], zero)
    if act == "a8":
        pair = call(graph, torch.ops.effllm.quantize_activation.default, (x,), node)
        xq, xs = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        for i, part in enumerate((xq, xs)):
            compat.set_example_value(part, compat.example_value(pair)[i])
        return call(graph, torch.ops.effllm.bipolar_linear_a8.default, (xq, xs, *three, bias, *tail, dtype, kernel), node)
    return call(graph, torch.ops.effllm.bipolar_linear.default, (x, *three, bias, *tail, kernel), node)
