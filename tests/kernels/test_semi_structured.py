"""The provider over torch's CUTLASS product: when it is chosen and why not, its layout, and its arithmetic with the product played by dense torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.sparse import _semi_structured_conversions as theirs

from effllm.autotune import nm_inputs
from effllm.errors import KernelError
from effllm.kernels import semi_structured
from effllm.lowering import nm_linear as ops
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem
from effllm.runtime import layouts
from effllm.runtime.layouts import nm_plain
from effllm.runtime.weights.nm import NMWeight

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
providers.load("cpu")
semi_structured.register()


def problem(n: int = 4096, k: int = 4096, keep: int = 2, of: int = 4, **kw: object) -> Problem:
    base = {"m": 4096, "dtype": BF16, "device": "cuda", "values": BF16}
    return ops.problem("nm_linear", n, k, keep, of, **(base | kw))  # type: ignore[arg-type]


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "capability", lambda: (8, 0))
    monkeypatch.setattr(semi_structured.machines, "gpu", lambda device: {"mma16": 312e12, "bandwidth": 1.555e12})


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem(keep=4, of=8), "2:4, not 4:8"), (problem(values=None, bits=8, group=64), "8 bits"), (problem(values=F32), "float32"),
        (problem(dtype=F16), "both must be"), (problem(n=4100), "tiles of 32 x 64"), (problem(k=4128), "tiles of 32 x 64"),
        (problem(m=None), "not known"), (problem(m=200), "pay from 201"), (problem(m=1), "1 rows"),
    ],
)  # fmt: skip
def test_refusals_say_why(asked: Problem, reason: str) -> None:
    verdict = semi_structured.supports(asked)
    assert not verdict and reason in verdict.reason


@pytest.mark.usefixtures("ampere")
def test_takes_prompts_on_ampere() -> None:
    for asked in (problem(), problem(m=201), problem(dtype=F16, values=F16)):
        assert semi_structured.supports(asked), asked
    assert semi_structured.supports(replace(problem(block=64), op="armor_linear"))


@pytest.mark.parametrize("found", [(0, 0), (7, 5), (9, 0), (10, 0)])
def test_other_processors_are_refused_by_number(found: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "capability", lambda: found)
    assert f"this GPU has {found[0]}.{found[1]}" in semi_structured.supports(problem()).reason


def test_selection_prefers_it_for_prompts_and_triton_for_the_rest(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    providers.load("cuda")
    assert providers.select(problem())[0].name == "semi-structured"
    for asked in (problem(m=1), problem(m=None)):
        provider, why = providers.select(asked)
        assert provider.name == "triton" and "semi-structured: " in why
    provider, why = providers.select(problem(keep=4, of=8))
    assert provider.name == "reference" and "sparse tensor cores take 2:4" in why
    monkeypatch.setattr(semi_structured, "capability", lambda: (9, 0))
    assert providers.select(problem())[0].name == "triton"


def test_this_machine_says_what_it_has() -> None:
    major, _ = semi_structured.capability()
    assert (major > 0) == (torch.cuda.is_available() and torch.version.hip is None)
    assert semi_structured.least_rows() > 1


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("m", [1, 8, 17])
def test_arithmetic_with_a_dense_stand_in(m: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in decodes metadata by torch's own code and insists on what CUTLASS needs of its operands."""

    def stand_in(sparse: Tensor, meta: Tensor, dense: Tensor) -> Tensor:
        assert dense.stride(0) == 1 and dense.shape[1] % 8 == 0 and meta.dtype == torch.int16 and sparse.is_contiguous()
        return (theirs.sparse_semi_structured_to_dense_cutlass(sparse, meta).float() @ dense.float()).to(dense.dtype)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", stand_in)
    op = "armor_linear" if block else "nm_linear"
    about = ops.problem(op, 64, 128, 2, 4, m=m, dtype=dtype, values=dtype, block=block)
    packed = nm_inputs.weight(about)
    x, bias = torch.randn(2, m, 128).to(dtype), torch.randn(64)
    y = OPS[op].providers["semi-structured"].call(*nm_inputs.arguments(packed, op, "nm_semi", x, bias), problem=about)
    expected = OPS[op].reference(*nm_inputs.arguments(packed, op, "nm_plain", x, bias))
    true = OPS[op].reference(*nm_inputs.arguments(packed, op, "nm_plain", x.double(), bias.double()))
    error, plain = (float((t.double() - true).norm() / true.norm()) for t in (y, expected))
    assert y.shape == expected.shape and y.dtype == dtype and error <= 2 * plain + OPS[op].tolerance[dtype]


def test_the_layout_reads_back() -> None:
    about = ops.problem("nm_linear", 96, 192, 2, 4, values=BF16)
    packed = nm_inputs.weight(about)
    arranged = NMWeight.arrange(packed, "nm_semi")
    assert torch.equal(arranged["values"], nm_plain.repack(packed)["values"]) and arranged["index"].shape == (96, 12)
    back = NMWeight.restore(packed.to("meta"), arranged, "nm_semi")
    assert all(torch.equal(t, packed.tensors[key]) for key, t in back.tensors.items())
    with pytest.raises(KernelError, match="E-KRN-LAYOUT"):
        layouts.get("nm_semi").codes(arranged["values"], arranged["values"], None)
