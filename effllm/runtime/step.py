"""Runs a step program: one call of the C++ kernel for a whole graph of few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import KernelError
from effllm.lowering.step_code import Code

programs: weakref.WeakSet[StepProgram] = weakref.WeakSet()  # those that are alive, for profiles


class StepProgram(nn.Module):
    """The program as a callable on its tensors; returns its outputs. Threads may share it."""

    def __init__(self, code: Code, kernel: Callable[..., Any], fresh: Collection[int] = ()) -> None:
        """`fresh` are positions of tensors that are new with every call, such as what is computed in front of the program."""
        super().__init__()
        self.code, self.kernel, self.fresh = code, kernel, frozenset(fresh)
        self.profile: Tensor | None = None  # while set: nanoseconds of each instruction, summed over threads and calls, and those of the calls
        self._last: list[int] | None = None  # addresses of what is not fresh, in the last call
        programs.add(self)

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of the program's inputs; those that it changes are changed in place. Raises KernelError (E-KRN-STEP)."""
        outputs = self._outputs()
        found = [t.data_ptr() for t in tensors]
        if self._last != [a for i, a in enumerate(found) if i not in self.fresh]:
            self.check(tensors)
            self._last = [a for i, a in enumerate(found) if i not in self.fresh]
        self._run(torch.tensor([*found, *[t.data_ptr() for t in outputs]], dtype=torch.int64))
        return outputs

    def bind(self, tensors: Sequence[Tensor]) -> Bound:
        """The program on these tensors, which stay alive and where they are; those of `fresh` come anew with each call."""
        self.check(tensors)
        return Bound(self, tensors)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise KernelError where tensors have not the sizes that the program was made for."""
        for i, (tensor, elements) in enumerate(zip(tensors, self.code.elements, strict=True)):
            if tensor.numel() != elements:
                cause = f"operand {i} of a step program has {tensor.numel()} elements, not {elements}"
                raise KernelError("E-KRN-STEP", cause, 'compile without "steady" guards, or with options={"step": "off"}')

    def _outputs(self) -> tuple[Tensor, ...]:
        return tuple([torch.empty(shape, dtype=dtype) for shape, dtype in self.code.outputs])

    def _run(self, addresses: Tensor) -> None:
        code = self.code
        self.kernel(code.words, code.numbers, addresses, torch.empty(code.workspace, dtype=torch.uint8), torch.get_num_threads(), self.profile)


class Bound:
    """A program on fixed tensors. Reading hundreds of tensor objects that the weights of the last step have driven out of the caches takes a
    quarter of a small model's step; here their addresses were read once. Not for several threads."""

    def __init__(self, program: StepProgram, tensors: Sequence[Tensor]) -> None:
        self._program, self._tensors = program, list(tensors)
        self._fresh = sorted(program.fresh)
        self._addresses = torch.tensor([t.data_ptr() for t in tensors] + [0] * len(program.code.outputs), dtype=torch.int64)
        self._view = self._addresses.numpy()

    def __call__(self, fresh: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs; `fresh` in the order of the program's inputs."""
        outputs = self._program._outputs()
        for i, tensor in zip(self._fresh, fresh, strict=True):
            self._view[i] = tensor.data_ptr()
        for i, tensor in enumerate(outputs, start=len(self._tensors)):
            self._view[i] = tensor.data_ptr()
        self._program._run(self._addresses)
        return outputs
