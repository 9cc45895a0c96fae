"""N:M sparsity: from w (N, K) and moments of calibration to a masked or updated weight, or to ARMOR's factors. One file per algorithm."""

from effllm.solvers.nm.armor import Armor, armor
from effllm.solvers.nm.dsnot import dsnot
from effllm.solvers.nm.masks import Pruned, check_mask, magnitude, masked, nm_mask, nowag, ratio_mask, target, wanda
from effllm.solvers.nm.sparsegpt import Quantized, sparsegpt, sparsegpt_quantized, sparsegpt_ratio

__all__ = [
    "Armor",
    "Pruned",
    "Quantized",
    "armor",
    "check_mask",
    "dsnot",
    "magnitude",
    "masked",
    "nm_mask",
    "nowag",
    "ratio_mask",
    "sparsegpt",
    "sparsegpt_quantized",
    "sparsegpt_ratio",
    "target",
    "wanda",
]
