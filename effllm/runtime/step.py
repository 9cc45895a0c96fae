"""Runs a step program: one call of the C++ kernel for a whole graph of few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import KernelError
from effllm.lowering.step_code import Code

programs: weakref.WeakSet[StepProgram] = weakref.WeakSet()  # those that are alive, for profiles


class StepProgram(nn.Module):
    """The program as a callable on its tensors; returns its outputs. Threads may share it."""

    def __init__(self, code: Code, namespace: str, fresh: Collection[int] = ()) -> None:
        """`namespace`: of the torch ops that run it; `fresh`: positions of tensors that are new with every call, such as what is computed in front."""
        super().__init__()
        self.code, self.namespace, self.fresh = code, namespace, frozenset(fresh)
        self.profile: Tensor | None = None  # while set: nanoseconds of each instruction, summed over threads and calls, and those of the calls
        self._last: list[int] | None = None  # addresses of what is not fresh, in the last call
        programs.add(self)

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of the program's inputs; those that it changes are changed in place. Raises KernelError (E-KRN-STEP)."""
        outputs = self.outputs()
        found = [t.data_ptr() for t in tensors]
        if self._last != [a for i, a in enumerate(found) if i not in self.fresh]:
            self.check(tensors)
            self._last = [a for i, a in enumerate(found) if i not in self.fresh]
        addresses = torch.tensor([*found, *[t.data_ptr() for t in outputs]], dtype=torch.int64)
        self.ops.step_program(self.code.words, self.code.numbers, addresses, self.workspace(), torch.get_num_threads(), self.profile)
        return outputs

    def bind(self, tensors: Sequence[Tensor], moves: Sequence[int]) -> Bound:
        """The program on these tensors, which stay alive and where they are, but those at `moves`, which come anew with each call."""
        self.check(tensors)
        return Bound(self, tensors, moves)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise KernelError where tensors have not the sizes that the program was made for."""
        for i, (tensor, elements) in enumerate(zip(tensors, self.code.elements, strict=True)):
            if tensor.numel() != elements:
                cause = f"operand {i} of a step program has {tensor.numel()} elements, not {elements}"
                raise KernelError("E-KRN-STEP", cause, 'compile without "steady" guards, or with options={"step": "off"}')

    @property
    def ops(self) -> Any:
        """The torch ops that run the program."""
        return getattr(torch.ops, self.namespace)

    def outputs(self) -> tuple[Tensor, ...]:
        """Room for what a call returns."""
        return tuple([torch.empty(shape, dtype=dtype) for shape, dtype in self.code.outputs])

    def workspace(self) -> Tensor:
        """Room for values in between."""
        return torch.empty(self.code.workspace, dtype=torch.uint8)


class Bound:
    """A program on fixed tensors, read once. To read hundreds of tensor objects, and the program, that the weights of the last step have driven out
    of the caches takes a quarter of a small model's step. Not for several threads."""

    def __init__(self, program: StepProgram, tensors: Sequence[Tensor], moves: Sequence[int]) -> None:
        self._program, self._tensors = program, list(tensors)
        self._moves = [*moves, *range(len(tensors), len(tensors) + len(program.code.outputs))]
        self._workspace = program.workspace()
        self._moved = torch.zeros(len(self._moves), dtype=torch.int64)
        self._view = self._moved.numpy()
        self._run: Any = program.ops.step_run.default
        self._threads = 0
        self._bound = 0
        self._release: weakref.finalize[Any, Any] | None = None

    def __call__(self, moved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs; `moved` in the order of `moves`."""
        if self._threads != torch.get_num_threads():
            self._bind()
        outputs = self._program.outputs()
        for i, tensor in enumerate((*moved, *outputs)):
            self._view[i] = tensor.data_ptr()
        self._run(self._bound, self._moved, self._program.profile)
        return outputs

    def _bind(self) -> None:
        """Tasks are cut by the number of threads."""
        if self._release is not None:
            self._release()
        code, ops, self._threads = self._program.code, self._program.ops, torch.get_num_threads()
        addresses = torch.tensor([*[t.data_ptr() for t in self._tensors], *[0] * len(code.outputs)], dtype=torch.int64)
        moves = torch.tensor(self._moves, dtype=torch.int64)
        self._bound = ops.step_bind(code.words, code.numbers, addresses, self._workspace, self._threads, moves)
        self._release = weakref.finalize(self, ops.step_release, self._bound)
        self._release.atexit = False
