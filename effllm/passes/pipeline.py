"""The passes of the backend, in no particular order: the manager computes it."""

from __future__ import annotations

from effllm.passes.base import Pass
from effllm.passes.compressed_attention import CompressedAttention
from effllm.passes.attention import Attention
from effllm.passes.fuse_glu import FuseGlu
from effllm.passes.fuse_norm import FuseNorm
from effllm.passes.fuse_rope import FuseRope
from effllm.passes.merge_linear import MergeLinear
from effllm.passes.merge_lowrank import MergeLowRank
from effllm.passes.outline_layers import OutlineLayers
from effllm.passes.packed_linear import PackLinear
from effllm.passes.query_rotation import QueryRotation
from effllm.passes.share_activation import ShareActivation
from effllm.passes.sparse_gate import SparseGate
from effllm.passes.step_program import StepPrograms


def default() -> list[Pass]:
    """A fresh list of every pass."""
    weights: list[Pass] = [PackLinear(), ShareActivation(), MergeLinear(), MergeLowRank(), SparseGate()]
    attention: list[Pass] = [QueryRotation(), CompressedAttention(), Attention()]
    fused: list[Pass] = [FuseNorm(), FuseGlu(), FuseRope()]
    return [*weights, *attention, *fused, StepPrograms(), OutlineLayers()]
