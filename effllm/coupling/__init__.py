"""The graph of coupled dimensions: which (parameter, axis) pairs of a model have to be permuted together, and by what kind of permutation.

Not a pass: it looks at a whole model rather than at one compiled graph, it rewrites parameters rather than nodes, and passes, solvers and caches
alike ask it. It stands on torch.export's graph and networkx, and knows nothing of recipes, formats or kernels.
"""

from effllm.coupling.dimension import Dimension, Loop, Member, Structure, inverse
from effllm.coupling.graph import CoupledGraph, Slot
from effllm.coupling.nm import Improved, improve_nm
from effllm.coupling.order import channel_energy, channel_order, nm_order
from effllm.coupling.permute import permute

__all__ = [
    "CoupledGraph", "Dimension", "Improved", "Loop", "Member", "Slot", "Structure", "channel_energy", "channel_order", "improve_nm", "inverse", "nm_order",
    "permute",
]  # fmt: skip
