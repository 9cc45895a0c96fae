"""Sequential calibration: statistics of one block at a time, on inputs that already went through the packed blocks before it.

For each list of blocks (decoder layers, encoder layers): run the model once to learn how the blocks are called, then per block and
per input tensor inside it (query/key/value, output, gate/up, down): collect H, solve, install. Only one block's statistics and one
hidden state per window are alive at a time. What is in no such list is done last, in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError, EffllmError
from effllm.methods import Bipolar
from effllm.runtime.dense import matrix
from effllm.runtime.formats.base import Packed
from effllm.solvers import blocks, solve
from effllm.solvers.blocks import Call, Chain
from effllm.solvers.statistics import Statistics, Stop

Covered = dict[str, tuple[nn.Module, Bipolar]]
Around = Callable[[str], AbstractContextManager[Any]]
_STAGES = 8  # more distinct inputs in a block (experts) than this are collected in one pass


@torch.no_grad()
def calibrated(
    model: nn.Module,
    calibration: Any,
    covered: Covered,
    install: Callable[[str, Packed], None],
    progress: Callable[[int, int, str], None] | None = None,
    *,
    chains: Mapping[str, Chain] | None = None,
    around: Around = nullcontext,
) -> dict[str, str]:
    """Solve every Linear of `covered` (module name -> module, parameters) and hand it to `install(name, packed)` at once.

    calibration: token ids (windows, length), or an iterable of model inputs (a tensor, or a dict of keyword arguments).
    chains: what blocks are called with, by the name of their list, where that is known already.
    around: called with the name of a block before it runs, and with "" before the model runs as a whole; the dense values of these
    weights need to be there only inside the context that it returns.
    Returns per module how it was solved: "sequential", "one-pass" or "unseen" (data-free: no calibration input reached it).
    Raises CalibrationError: E-CAL-SHORT, E-CAL-FORM; E-CAL-UNSEEN where a module with solver="gptq" saw no input.
    """
    inputs = blocks.batches(calibration)
    job = _Job(covered, install, progress, around)
    with _evaluating(model):
        for prefix, members in blocks.lists(model, covered).items():
            found = chains[prefix] if chains is not None and prefix in chains else blocks.chain(model, members, inputs)
            if found is not None:
                job.stream(prefix, members, found)
        left = {n: m for n, (m, _) in covered.items() if n not in job.how}
        if left:
            with around(""):
                with Statistics(left) as statistics:
                    for batch in inputs:
                        statistics.begin()
                        blocks.run(model, batch)
                job.finish(list(left), statistics, "one-pass")
    return job.how


class _Job:
    def __init__(
        self, covered: Covered, install: Callable[[str, Packed], None], progress: Callable[[int, int, str], None] | None, around: Around
    ) -> None:
        self.covered, self.install, self.progress, self.around = covered, install, progress, around
        self.how: dict[str, str] = {}

    def stream(self, prefix: str, members: nn.ModuleList, found: Chain) -> None:
        """Blocks one after another; the hidden states of all windows move along."""
        states: list[Tensor | None] = [None] * len(found.calls[0])
        for i, calls in enumerate(found.calls):
            for call, state in zip(calls, states, strict=True):
                if state is not None:
                    call.put(found.place, state)
            with self.around(f"{prefix}.{i}"):
                self._block(f"{prefix}.{i}.", members[i], calls)
                if i + 1 < len(found.calls):
                    states = [blocks.hidden(_call(members[i], call)) for call in calls]
            found.calls[i] = []

    def _block(self, prefix: str, block: nn.Module, calls: list[Call]) -> None:
        own = {n: m for n, (m, _) in self.covered.items() if n.startswith(prefix)}
        for stage in _stages(block, own, calls[0]):
            with Statistics({n: own[n] for n in stage}, until_seen=True) as statistics:
                for call in calls:
                    statistics.begin()
                    _call(block, call)
            self.finish(stage, statistics, "sequential")

    def finish(self, names: list[str], statistics: Statistics, how: str) -> None:
        """Solve and install modules whose statistics are complete."""
        for name in names:
            module, params = self.covered[name]
            hessian = statistics.hessian(name)
            if hessian is None and params.solver == "gptq":
                raise CalibrationError("E-CAL-UNSEEN", f"no calibration input reached {name}", "give more calibration data, or solver=auto")
            try:
                packed = solve(matrix(module), params, hessian)
            except EffllmError as error:
                raise type(error)(error.code, f"{name}: {error.cause}", error.next_step) from None
            self.install(name, packed)
            self.how[name] = how if hessian is not None else "unseen"
            if self.progress is not None:
                self.progress(len(self.how), len(self.covered), name)


def _stages(block: nn.Module, own: dict[str, nn.Module], call: Call) -> Iterator[list[str]]:
    """The block's modules by shared input, in order of execution."""
    with Statistics(own) as probe:
        _call(block, call)
    stages = probe.stages()
    unseen = [n for n in own if n not in probe.leader]
    if unseen or len(stages) > _STAGES:
        yield list(own)
    else:
        yield from stages


def _call(block: nn.Module, call: Call) -> Any:
    try:
        return block(*call.args, **call.kwargs)
    except Stop:
        return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while. Modules may be swapped meanwhile: flags come back to the old modules and, by name, to new ones."""
    old = [(name, module, module.training) for name, module in model.named_modules()]
    model.eval()
    try:
        yield
    finally:
        now = dict(model.named_modules())
        for name, module, training in old:
            module.training = training
            if name in now:
                now[name].training = training
