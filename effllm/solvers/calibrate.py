"""Sequential calibration: statistics of one block at a time, on inputs that already went through the packed blocks before it.

For each list of blocks (decoder layers, encoder layers): run the model once to learn how the blocks are called, then per block and
per input tensor inside it (query/key/value, output, gate/up, down): collect the moments, solve, install. Only one block's statistics
and one hidden state per window are alive at a time. What is in no such list is done last, in one pass.

With `targets` a second stream goes along, through the blocks while they are still dense: a block first runs on the dense model's
hidden states, which records what each of its modules reads there, and then on the packed prefix's. That costs one more pass per
block, one more hidden state per window and one block's inputs, and gives solvers the dense output to aim at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError, EffllmError
from effllm.runtime.dense import matrix
from effllm.runtime.formats.base import Packed
from effllm.solvers import blocks, solve
from effllm.solvers.blocks import Call, Chain
from effllm.solvers.moments import Moments
from effllm.solvers.statistics import Inputs, Statistics, Stop

Covered = Mapping[str, tuple[nn.Module, Any]]  # the parameters (a methods.Method) are what `solver` takes
Solver = Callable[[Tensor, Any, Moments | None], Packed]
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
    targets: bool = False,
    solver: Solver = solve,
) -> dict[str, str]:
    """Solve every Linear of `covered` (module name -> module, parameters) and hand it to `install(name, packed)` at once.

    calibration: token ids (windows, length), or an iterable of model inputs (a tensor, or a dict of keyword arguments).
    chains: what blocks are called with, by the name of their list, where that is known already.
    around: called with the name of a block before it runs, and with "" before the model runs as a whole; the dense values of these
    weights need to be there only inside the context that it returns.
    targets: whether moments get `cross`, the dense model's inputs against those of the packed prefix (sequential modules only).
    solver: called with the weight (N, K), the module's parameters and its moments.
    Returns per module how it was solved: "sequential", "one-pass" or "unseen" (data-free: no calibration input reached it).
    Raises CalibrationError: E-CAL-SHORT, E-CAL-FORM, E-CAL-VOCAB; E-CAL-UNSEEN where a module with solver="gptq" saw no input.
    """
    inputs = blocks.batches(calibration)
    blocks.check_ids(model, inputs)
    job = _Job(covered, install, progress, around, targets, solver)
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
        self, covered: Covered, install: Callable[[str, Packed], None], progress: Callable[[int, int, str], None] | None, around: Around,
        targets: bool, solver: Solver,
    ) -> None:  # fmt: skip
        self.covered, self.install, self.progress, self.around = covered, install, progress, around
        self.targets, self.solver = targets, solver
        self.how: dict[str, str] = {}

    def stream(self, prefix: str, members: nn.ModuleList, found: Chain) -> None:
        """Blocks one after another; the hidden states of all windows move along."""
        states: list[Tensor | None] = [None] * len(found.calls[0])
        dense = list(states)  # the same in the dense model
        for i, calls in enumerate(found.calls):
            name, last = f"{prefix}.{i}", i + 1 == len(found.calls)
            with self.around(name):
                inputs: Inputs | None = None
                if self.targets:
                    _put(calls, found.place, dense)
                    inputs, dense = _run_dense(members[i], self._own(name), calls, found.place)
                _put(calls, found.place, states)
                self._block(members[i], self._own(name), calls, inputs)
                if not last:
                    states = [blocks.hidden(_call(members[i], call)) for call in calls]
            found.calls[i] = []

    def _own(self, block: str) -> dict[str, nn.Module]:
        return {n: m for n, (m, _) in self.covered.items() if n.startswith(f"{block}.")}

    def _block(self, block: nn.Module, own: dict[str, nn.Module], calls: list[Call], inputs: Inputs | None) -> None:
        for stage in _stages(block, own, calls[0]):
            with Statistics({n: own[n] for n in stage}, until_seen=True, dense=inputs) as statistics:
                for call in calls:
                    statistics.begin()
                    _call(block, call)
            self.finish(stage, statistics, "sequential")

    def finish(self, names: list[str], statistics: Statistics, how: str) -> None:
        """Solve and install modules whose statistics are complete."""
        for name in names:
            module, params = self.covered[name]
            moments = statistics.moments(name)
            if moments is None and params.requires_calibration:
                raise CalibrationError("E-CAL-UNSEEN", f"no calibration input reached {name}", "give more calibration data, or solver=auto")
            try:
                packed = self.solver(matrix(module), params, moments)
            except EffllmError as error:
                raise type(error)(error.code, f"{name}: {error.cause}", error.next_step) from None
            self.install(name, packed)
            self.how[name] = how if moments is not None else "unseen"
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


def _put(calls: list[Call], place: int | str, states: list[Tensor | None]) -> None:
    """Hand each call its hidden state; the first block's calls have theirs already."""
    for call, state in zip(calls, states, strict=True):
        if state is not None:
            call.put(place, state)


def _run_dense(block: nn.Module, own: dict[str, nn.Module], calls: list[Call], place: int | str) -> tuple[Inputs, list[Tensor | None]]:
    """What the modules of a block that is still dense read, and the hidden states that come out of it."""
    states: list[Tensor | None] = []
    with Inputs(own) as inputs:
        for call in calls:
            inputs.begin(call.rows(place))
            states.append(blocks.hidden(_call(block, call)))
    return inputs, states


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
