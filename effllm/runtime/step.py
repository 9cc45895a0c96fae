"""Runs a step program: one call of the C++ kernel for a whole graph of few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import KernelError
from effllm.lowering.step_code import Code

programs: weakref.WeakSet[StepProgram] = weakref.WeakSet()  # those that are alive, for profiles


class StepProgram(nn.Module):
    """The program as a callable on its tensors; returns its outputs. Threads may share it."""

    def __init__(self, code: Code, kernel: Callable[..., Any]) -> None:
        super().__init__()
        self.code, self.kernel = code, kernel
        self.profile: Tensor | None = None  # while set: nanoseconds of each instruction, summed over threads and calls, and those of the calls
        self._last: tuple[list[int], Tensor] = ([], torch.empty(0, dtype=torch.int64))
        programs.add(self)

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of the program's inputs; those that it changes are changed in place. Raises KernelError (E-KRN-STEP)."""
        code = self.code
        outputs = tuple([torch.empty(shape, dtype=dtype) for shape, dtype in code.outputs])
        at, addresses = self._last  # one read: another thread may put its own there meanwhile
        found = [t.data_ptr() for t in tensors]
        if found != at:
            addresses = self._checked(tensors, found)
            self._last = (found, addresses)
        if outputs:
            addresses = torch.cat((addresses, torch.tensor([t.data_ptr() for t in outputs])))
        self.kernel(code.words, code.numbers, addresses, torch.empty(code.workspace, dtype=torch.uint8), torch.get_num_threads(), self.profile)
        return outputs

    def _checked(self, tensors: tuple[Tensor, ...], found: list[int]) -> Tensor:
        """The addresses of tensors that come for the first time, if they have the sizes that the program was made for."""
        for i, (tensor, elements) in enumerate(zip(tensors, self.code.elements, strict=True)):
            if tensor.numel() != elements:
                cause = f"operand {i} of a step program has {tensor.numel()} elements, not {elements}"
                raise KernelError("E-KRN-STEP", cause, 'compile without "steady" guards, or with options={"step": "off"}')
        return torch.tensor(found, dtype=torch.int64)
