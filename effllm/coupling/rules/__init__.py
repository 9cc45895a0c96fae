"""How permuted operands show in the result, operator by operator. An operator without a rule pins everything it touches.

Every rule states one fact: if the operands' axes are permuted consistently, the result is the same permutation of the unpermuted result.
"""

from effllm.coupling.rules import contract, pointwise, reduce, shape
from effllm.coupling.rules.base import MOVES, RULES, Call, Result

__all__ = ["MOVES", "RULES", "Call", "Result", "contract", "pointwise", "reduce", "shape"]
