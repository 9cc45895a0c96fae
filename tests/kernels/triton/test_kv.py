"""Compressed caches in Triton: numbers and bytes in the interpreter, compilation for GPUs that are not here, fakes and refusals."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effllm.autotune.kv_cost import PREDICTORS, Site
from effllm.kernels import triton as kernels
from effllm.kernels.triton import aot, kv_attend_launch, kv_cost, kv_ops
from effllm.lowering import kv_cache, providers
from effllm.lowering.op import OPS
from effllm.runtime.caches.base import parse
from tests.kernels.triton import kv_compile, kv_graph
from tests.kernels.triton.kv_cases import APPEND, ATTEND, NAN, NOTHING, PROJECT

WORKER = "kv_cases.py"
# beyond twice the reference's error: a sum over at most 300 tokens in another order; in 16 bits half a rounding of the scales times the queries
FLOOR = {"float32": 5e-7, "float16": 5e-4, "bfloat16": 2e-3}


@pytest.mark.parametrize("case", ATTEND, ids=lambda c: "-".join(map(str, c)))
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: tuple[Any, ...]) -> None:
    got = results[f"attend {case}"]
    _, heads, repeat, dim, _, count, dtype, *_ = case
    assert got["shape"] == [2, heads * repeat, count, dim] and got["dtype"] == f"torch.{dtype}"
    assert got["error"] <= 2 * got["plain"] + FLOOR[dtype]  # NaN fails too


@pytest.mark.parametrize("spec", NOTHING)
def test_a_row_without_keys_is_zero_and_nan_stays_in_its_row(results: dict[str, dict[str, Any]], spec: str) -> None:
    got = results[f"nothing {spec}"]
    assert got["zero"] and got["finite"] and got["spread"] and got["others"]


@pytest.mark.parametrize("case", APPEND + PROJECT, ids=lambda c: "-".join(map(str, c)))
def test_bytes_are_those_of_the_reference_and_a_full_cache_refuses(results: dict[str, dict[str, Any]], case: tuple[str, int, str]) -> None:
    got = results[f"append {case}"]
    pages, others = got["same"][::3], [same for i, same in enumerate(got["same"]) if i % 3]
    assert len(pages) == 3 and len(others) == 6 and all(others)
    assert all(e <= 1 for e in got["errors"]) if case in PROJECT else all(pages)
    assert len(got["errors"]) == 2 * (case in PROJECT)
    limit = got["limit"]
    assert got["error"] == f"E-KVC-FULL the cache holds 140 of {limit} tokens and {limit - 139} more are to be appended" and got["kept"]


def test_what_is_not_finite_is_packed_as_the_reference_packs_it(results: dict[str, dict[str, Any]]) -> None:
    rows = [row for name, row in results.items() if name.startswith("nan_append")]
    assert len(rows) == 2 + len(NAN) and all(row["bad"] and row["equal"] == [True, True] for row in rows)


def test_graph_ops_are_what_they_say(results: dict[str, dict[str, Any]]) -> None:
    got = results[f"ops {NOTHING[0]}"]
    assert len(got) == 6 and all(value == "SUCCESS" for name, value in got.items() if name != "name")


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("spec", "dim", "repeat", "queries", "mask"), kv_compile.ATTEND)
def test_attention_compiles_without_spills(target: str, spec: str, dim: int, repeat: int, queries: int, mask: int) -> None:
    used, _ = kv_compile.attend(spec, dim, repeat, queries, mask, target)
    assert used.spills == 0 and used.registers <= 255 + 257 * target.startswith("hip")
    assert used.shared <= (64 if target.startswith("hip") else 164) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("spec", "dim"), kv_compile.FLUSH)
def test_packing_compiles_without_spills(target: str, spec: str, dim: int) -> None:
    for used in kv_compile.append(spec, dim, target):
        assert used.spills == 0 and used.shared <= 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_sizes_of_one_compile(target: str) -> None:
    # Triton makes an argument that equals 1 a constant: decoding appends one token, small models have one key head, short caches one page
    for spec in ("kivi(bits=4)", "mustafar(sparsity=0.7)"):
        assert all(used.spills == 0 for used in kv_compile.append(spec, 64, target, ones=("n", "B", "G", "P")))
    for spec in ("kivi(bits=4)", "mustafar(sparsity=0.7)", "bfp(bits=4)", "matryoshka(k=0.5,v=0.5)"):
        assert kv_compile.attend(spec, 64, 2, 1, 3, target, ones=("G", "P"))[0].spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", kv_compile.COUNTED)
def test_instructions_an_element_are_those_of_the_cost_model(spec: str) -> None:
    measured = kv_compile.instructions(spec, 128, 4, 1, 3)
    assert kv_cost.issue(parse(spec), 128, 8) == pytest.approx(measured, rel=0.15)


def problem(op: str, spec: str, dim: int = 128, heads: int = 32, n: int | None = 1, dtype: torch.dtype = torch.bfloat16, groups: int = 8) -> Any:
    ring = torch.empty(1, 2, groups, 128, dim, dtype=dtype)
    found = kv_cache.problem(op, spec, heads, ring, n)
    return type(found)(**(vars(found) | {"device": "cuda"}))


def test_every_format_has_attention_and_packing() -> None:
    kernels.register()
    for spec in ("kivi", "gear(bits=2)", "gear(bits=2,factors=8)", "mustafar(bits=4)", "bfp(bits=3,block=64)", "matryoshka"):
        assert kv_ops.supports_attend(problem("kv_attend", spec)), spec
        assert kv_ops.supports_append(problem("kv_append", spec)), spec
    assert (OPS["kv_attend"].providers["triton"].rank, OPS["kv_append"].providers["triton"].device) == (10, "cuda")


@pytest.mark.parametrize(
    ("op", "spec", "about", "reason"),
    [
        ("kv_attend", "dense", {}, "dense pages"),
        ("kv_attend", "kivi", {"n": 5}, "5 queries"),
        ("kv_attend", "kivi", {"n": None}, "dynamic"),
        ("kv_attend", "kivi", {"dim": 512}, "512 channels"),
        ("kv_attend", "kivi", {"dtype": torch.float64}, "float64"),
        ("kv_attend", "kivi", {"heads": 71, "groups": 1}, "71 heads"),
        ("kv_attend", "gear(outliers=0.5)", {}, "outliers"),
        ("kv_attend", "gear(rank=12)", {}, "rank 12"),
        ("kv_attend", "bfp(page=8,window=8)", {}, "pages of 8"),
        ("kv_attend", "bfp(block=16)", {"dim": 80}, "straddles"),
        ("kv_attend", "bfp(bits=8,vbits=8,block=48)", {"dim": 96}, "powers of two"),
        ("kv_append", "gear(rank=12)", {}, "rank 12"),
        ("kv_append", "dense", {}, "no packing kernel"),
        ("kv_append", "bfp", {"dim": 512}, "512 channels"),
        ("kv_append", "kivi", {"dtype": torch.float64}, "float64"),
        ("kv_append", "kivi(page=1024,group=1024)", {}, "groups of 1024"),
    ],
)
def test_refusals_say_why(op: str, spec: str, about: dict[str, Any], reason: str) -> None:
    verdict = {"kv_attend": kv_ops.supports_attend, "kv_append": kv_ops.supports_append}[op](problem(op, spec, **about))
    assert not verdict and reason in verdict.reason


def test_a_gpu_gets_the_kernels_and_the_reason_where_it_does_not() -> None:
    kernels.register()
    chosen, why = providers.select(problem("kv_append", "gear(bits=4,rank=12)"))
    assert chosen.name == "reference" and "rank 12" in why
    assert [providers.select(problem(op, "kivi"))[0].name for op in ("kv_append", "kv_attend")] == ["triton", "triton"]


def test_fakes_give_shape_and_dtype() -> None:
    kernels.register()
    with FakeTensorMode():
        pages, ring = torch.empty(1, 4, 640, dtype=torch.uint8, device="cuda"), torch.empty(1, 2, 2, 128, 64, dtype=torch.bfloat16, device="cuda")
        lens, start = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (2, 1))
        q, k = (torch.empty(1, h, 1, 64, dtype=torch.bfloat16, device="cuda") for h in (8, 2))
        y = torch.ops.effllm.kv_attend(q, pages, ring, lens, [], None, 0.125, "kivi(bits=4)", "triton")
        assert (y.shape, y.dtype, y.device.type) == (q.shape, q.dtype, "cuda")
        assert torch.ops.effllm.kv_append(pages, ring, lens, start, k, k, [], "kivi(bits=4)", "triton") is None


def test_splits_follow_the_machine_and_never_leave_a_program_without_a_tile() -> None:
    about = (64, 1, 8, 128, 8, torch.bfloat16, "cpu")
    fmt = parse("kivi(bits=4)")
    counts = [kv_cost.splits(fmt, pages, *about) for pages in (0, 1, 2, 32, 512)]
    assert counts[0] == counts[1] == 1 and counts[2] <= 2 and counts == sorted(counts) and counts[-1] >= 8
    many = kv_cost.splits(fmt, 512, 64, 64, 8, 128, 8, torch.bfloat16, "cpu")
    assert many < counts[-1]  # 512 key heads fill the GPU by themselves


def test_what_the_model_says_is_bounded_and_monotone() -> None:
    from effllm.autotune import gpus

    machine = gpus.constants(gpus.by_class("cuda:90"))
    for spec in ("kivi(bits=2)", "kivi(bits=4)", "gear(bits=4)", "mustafar(sparsity=0.7)", "bfp", "matryoshka"):
        times = []
        for tokens in (1024, 8192, 65536):
            shape = kv_cost.Shape(1, 8, 128, 8, tokens, 128, torch.bfloat16)
            found = kv_cost.predict(parse(spec), shape, kv_cost.best(parse(spec), shape, machine), machine)
            assert found.seconds > found.bound > 0
            times.append(found.seconds)
        assert times == sorted(times)


def test_a_site_is_told_from_which_context_it_pays() -> None:
    def site(spec: str, tokens: int = 32768) -> Site:
        return Site(spec, tokens, 1, 8, 32, 128, 1, torch.bfloat16)

    kernels.register()
    assert PREDICTORS["cuda"] is kv_cost.decision
    found = {spec: kv_cost.decision(site(spec), "cuda:90") for spec in ("kivi(bits=4)", "kivi(bits=8)", "gear(bits=4)")}
    assert found["gear(bits=4)"].crossover is None and found["gear(bits=4)"].compressed > found["gear(bits=4)"].dense
    first, second = found["kivi(bits=4)"].crossover, found["kivi(bits=8)"].crossover
    assert first is not None and second is not None and 256 < first <= second < 32768
    at = kv_cost.decision(site("kivi(bits=4)", first), "cuda:90")
    assert at.compressed < at.dense
    before = kv_cost.decision(site("kivi(bits=4)", first - 64), "cuda:90")
    assert before.compressed >= before.dense


def test_the_decision_of_a_graph_on_a_gpu_names_kernel_refusal_and_prediction() -> None:
    """The graph is captured on the CPU; what its nodes hold is then said to be on a GPU."""
    kernels.register()
    for spec, appended in (("kivi(bits=4,page=16,group=16,window=4)", "triton"), ("gear(bits=2,rank=2,page=16,group=16,window=4)", "triton"),
                           ("gear(bits=2,rank=9,page=16,group=16,window=4,outliers=0)", "reference")):  # fmt: skip
        append, read = kv_graph.decisions(spec, "cuda")
        assert append.kernel == appended and ("rank 9" in append.reason) == (appended == "reference")
        if appended == "reference":
            continue
        assert (read.action, read.kernel) == ("applied", "triton")
        assert "of the bytes of dense keys and values" in read.reason and "predicted to" in read.reason


def test_masks_of_one_row_are_read_once() -> None:
    for shape, kind in (((1, 1, 1, 9), 3), ((2, 1, 1, 9), 3), ((2, 4, 1, 9), 1), ((2, 1, 3, 9), 1)):
        mask = torch.ones(shape, dtype=torch.bool)
        assert kv_attend_launch.mask_arguments(mask, 2, 4, 3)[1] == kind
        assert kv_attend_launch.mask_arguments(mask.float(), 2, 4, 3)[1] == kind + 1
