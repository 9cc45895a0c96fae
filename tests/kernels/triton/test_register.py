"""The provider: registration without a GPU, verdicts with reasons, tracing with a symbolic number of rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from effllm.kernels import triton as kernels
from effllm.lowering import bipolar_linear as ops
from effllm.lowering.op import OPS, Problem
from effllm.runtime.layouts import words


def problem(**kw: object) -> Problem:
    base = {"op": "bipolar_linear", "n": 4096, "k": 4096, "bits": 4, "group": 32, "affine": False, "dtype": torch.bfloat16, "device": "cuda"}
    return Problem(**(base | kw))  # type: ignore[arg-type]


def test_importing_asks_for_no_device() -> None:
    program = "import torch; torch.cuda.init = torch.cuda.get_device_properties = None; import effllm.kernels.triton as t; t.register(); t.register()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_registers_for_both_ops() -> None:
    kernels.register()
    for op in ("bipolar_linear", "bipolar_linear_a8"):
        provider = OPS[op].providers["triton"]
        assert (provider.device, provider.layout, provider.rank) == ("cuda", "words", 10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 9}, "9 bits"),
        ({"group": 48}, "groups of 48"),
        ({"dtype": torch.float64}, "float64"),
        ({"scale_dtype": torch.bfloat16}, "bfloat16"),
        ({"n": 2**24, "k": 2**14}, "2^31 words"),
    ],
)
def test_refusals_say_why(change: dict[str, object], reason: str) -> None:
    assert kernels.supports(problem())
    verdict = kernels.supports(problem(**change))
    assert not verdict and reason in verdict.reason


def buffers(n: int, k: int, bits: int, group: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = words.fake_shapes((n, k), bits, group)
    return torch.zeros(shapes["codes"][0], dtype=torch.int32, device=device), torch.zeros(shapes["scale"][0], dtype=torch.float16, device=device)


def test_fakes_give_shape_and_dtype() -> None:
    kernels.register()
    with FakeTensorMode():
        codes, scale = buffers(48, 64, 4, 32, "cuda")
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="cuda")
        y = torch.ops.effllm.bipolar_linear(x, codes, scale, None, None, 48, 4, 32, 7.5, "triton")
        assert (tuple(y.shape), y.dtype, y.device.type) == ((2, 3, 48), torch.bfloat16, "cuda")
        xq, xs = torch.ops.effllm.quantize_activation(x)
        y = torch.ops.effllm.bipolar_linear_a8(xq, xs, codes, scale, None, None, 48, 4, 32, 7.5, torch.float16, "triton")
        assert (tuple(y.shape), y.dtype) == ((2, 3, 48), torch.float16)


def test_traces_to_one_node_with_symbolic_rows() -> None:
    kernels.register()
    codes, scale = buffers(48, 64, 4, 32, "cpu")

    def f(x: torch.Tensor) -> torch.Tensor:
        return ops._linear(x, codes, scale, None, None, 48, 4, 32, 7.5, "triton") + 1

    graph = make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.zeros(5, 64))
    nodes = [n for n in graph.graph.nodes if n.target is torch.ops.effllm_triton.linear.default]
    assert len(nodes) == 1
    assert not isinstance(nodes[0].meta["val"].shape[0], int), "the dispatch on M guards the number of rows"
