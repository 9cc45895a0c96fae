"""Whether skipping channels pays: the predicted time of an op of activation sparsity beside that of the dense linear it replaces.

The dense linear is PyTorch's own for floating-point weights, and the bipolar linear of the same bits and group for codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from effllm.autotune import dense
from effllm.errors import KernelError
from effllm.lowering import providers
from effllm.lowering.op import Problem, Provider

MOST_ROWS = 4  # that the kernels take together


@dataclass(frozen=True)
class Gain:
    """Predicted seconds of a call, sparse and dense, with the kernel that would run; `reason` where there is none."""

    sparse: float
    dense: float
    kernel: str
    reason: str

    @property
    def speedup(self) -> float:
        """Dense time over sparse time; 0 where no kernel runs the op."""
        return self.dense / self.sparse if self.kernel else 0.0


def predicted(provider: Provider, problem: Problem) -> float:
    """Seconds of a provider with the configuration that its model chooses; infinite where it has no model."""
    return provider.tuning.predict(problem, provider.tuning.first(problem)).seconds if provider.tuning else float("inf")


def gain(problem: Problem) -> Gain:
    """The prediction for a problem made by `lowering.sparse_linear.problem`, at its `density` and rows (dynamic rows count as one)."""
    baseline = _dense(problem)
    try:
        provider, reason = providers.select(problem)
    except KernelError as error:
        return Gain(float("inf"), baseline, "", error.cause)
    if provider.tuning is None:
        return Gain(float("inf"), baseline, "", reason)
    return Gain(predicted(provider, problem), baseline, provider.name, "")


def limit(problem: Problem, least: float = 1.0) -> int:
    """Rows up to which thresholds are predicted to be at least `least` times as fast as the dense linear: 0 for none, at most 4.

    Rows read the union of their channels, so the answer falls with the density.
    """
    found = 0
    for m in range(1, MOST_ROWS + 1):
        if gain(problem.at(m)).speedup < least:
            break
        found = m
    return found


def _dense(problem: Problem) -> float:
    if not problem.bits:
        return dense.seconds(problem)
    plain = replace(problem, op="bipolar_linear", detail=())
    provider, _ = providers.select(plain)
    found = predicted(provider, plain)
    return found if found < float("inf") else dense.seconds(problem)
