"""Every configuration of the CPU linear kernels computes the right result, is what the store may hold, and has a finite price."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from effllm.autotune import inputs, measure
from effllm.errors import KernelError
from effllm.kernels.cpu import build
from effllm.kernels.cpu.choose import CpuTuning, arguments
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider

ISAS = [isa for isa in build.ISAS if not build.missing(isa)]


def provider(op: str, isa: str) -> Provider:
    providers.load("cpu")
    found = OPS[op].providers[f"cpu-{isa}"]
    try:
        assert found.prepare is not None
        found.prepare()
    except KernelError as error:
        pytest.skip(error.cause)
    return found


def problems(bits: int) -> Iterator[Problem]:
    """Odd and even rows around the sizes of a pass, columns that do not fill a block, outputs that do not fill a tile."""
    kinds = (("a8", torch.float32, 32, True), ("a16", torch.bfloat16, 64, False), ("a16", torch.float32, 16, True), ("a8", torch.bfloat16, 0, False))
    for act, dtype, group, affine in kinds:
        op = "bipolar_linear_a8" if act == "a8" else "bipolar_linear"
        for m in (1, 3, 8, 13, 53):
            yield Problem(op, 77, 208 if group in (0, 16) else 224 if group == 32 else 256, bits, group, affine, act, m, dtype)


@pytest.mark.parametrize("isa", [i.name for i in ISAS])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_configuration_is_right(isa: str, bits: int) -> None:
    tuning, seen = CpuTuning(isa), set()
    for problem in problems(bits):
        found = provider(problem.op, isa)
        made = inputs.make(problem, found.layout, copies=1)
        expected = made.expected()
        for config in tuning.configs(problem):
            if config["threads"] != 1:
                outcome = measure.verify(found, problem, config, made, expected)
                assert outcome.status == "ok", (problem, config, outcome.reason)
                seen.add(json.dumps({k: v for k, v in config.items() if k != "threads"}))
    assert len(seen) >= {"avx512": 13, "avx2": 2}.get(isa, 3)  # on AVX2 most have one path


def test_many_tokens_of_long_rows_take_several_chunks() -> None:
    """K and M so large that the activations of a chunk are fewer than the rows, for each size of chunk."""
    isa = ISAS[0].name
    problem = Problem("bipolar_linear_a8", 40, 8192, 6, 128, True, "a8", 150, torch.float32)
    configs = [c for c in CpuTuning(isa).configs(problem) if c["path"] == "unpack" and c["threads"] == 0]
    assert {c["chunk"] for c in configs} == {256, 512}
    found = provider(problem.op, isa)
    made = inputs.make(problem, found.layout, copies=1)
    expected = made.expected()
    for config in configs:
        assert measure.verify(found, problem, config, made, expected).status == "ok", config


@pytest.mark.parametrize(("isa", "dtype"), [("avx512", torch.bfloat16), ("avx2", torch.float32)])
@pytest.mark.parametrize("k", [1024, 96, 33, 4096])  # rows a power of two apart and odd ones are copied; of the last, not all tokens stay in cache
@pytest.mark.parametrize(("n", "bits", "affine"), [(40, 3, True), (16, 8, False), (65, 4, False)])
def test_expanded_weights_times_many_tokens(isa: str, dtype: torch.dtype, k: int, n: int, bits: int, affine: bool) -> None:
    problem = Problem("bipolar_linear", n, k, bits, 32, affine, "a16", 131, dtype)
    config = {"path": "expand", "threads": 2}
    if not CpuTuning(isa).legal(problem, config):
        pytest.skip("no bf16 products here")
    found = provider(problem.op, isa)
    made = inputs.make(problem, found.layout, copies=1)
    assert measure.verify(found, problem, config, made, made.expected()).status == "ok"


def test_avx2_expands_weights_for_prompts_of_fp32_alone() -> None:
    fp32 = Problem("bipolar_linear", 4096, 4096, 4, 32, False, "a16", 512, torch.float32)
    tuning = CpuTuning("avx2")
    assert tuning.first(fp32)["path"] == "expand"
    assert tuning.first(fp32.at(1))["path"] != "expand"
    assert 1 < arguments(fp32.at(None), None, "avx2")["expand_from"] <= 32
    bf16 = Problem("bipolar_linear", 4096, 4096, 4, 32, False, "a16", 512, torch.bfloat16)
    verdict = tuning.legal(bf16, {"path": "expand", "threads": 0})
    assert not verdict and "16-bit activations" in verdict.reason
    assert arguments(bf16.at(None), None, "avx2")["expand_from"] == 0


@pytest.mark.parametrize("isa", [i.name for i in build.ISAS])
def test_legal_is_what_configs_yields_and_prices_are_positive(isa: str) -> None:
    tuning = CpuTuning(isa)
    for problem in problems(4):
        for m in (1, 2, 5, 8, 100, 3000):
            configs = list(tuning.configs(problem.at(m)))
            assert len({json.dumps(c, sort_keys=True) for c in configs}) == len(configs) > 0
            for config in configs:
                assert tuning.legal(problem.at(m), config)
                assert 0 < tuning.predict(problem.at(m), config).bound <= tuning.predict(problem.at(m), config).seconds


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"path": "registers", "threads": 0}, "takes rows, the configuration has none of them"),  # of versions without the field
        ({"path": "unpack", "threads": 0, "rows": 4, "tiles": 2}, "takes rows, tiles, chunk, the configuration has rows, tiles"),
        ({"path": "unpack", "threads": 0, "rows": 5, "tiles": 2, "chunk": 256}, "has no pass of"),
        ({"path": "registers", "threads": 0, "rows": True}, "has no pass of"),
        ({"path": "expand", "threads": 0}, "int8 activations"),
        ({"path": "single", "threads": 0, "tiles": 1}, "one token"),
        ({"path": "registers", "threads": 999, "rows": 4}, "no configuration"),
        ({"path": "magic", "threads": 0}, "no configuration"),
    ],
)
def test_what_is_not_legal_says_why(config: dict[str, object], why: str) -> None:
    verdict = CpuTuning("avx512").legal(Problem("bipolar_linear_a8", 64, 64, 4, 32, True, "a8", 4), config)
    assert not verdict and why in verdict.reason


def test_rows_of_one_bucket_share_their_configurations() -> None:
    tuning, problem = CpuTuning("avx512"), Problem("bipolar_linear_a8", 64, 4096, 4, 32, True, "a8", 5)
    assert list(tuning.configs(problem)) == list(tuning.configs(problem.at(8)))


def test_arguments_name_every_field_once() -> None:
    problem = Problem("bipolar_linear_a8", 64, 64, 4, 32, True, "a8", 16)
    config = {"path": "unpack", "threads": 2, "rows": 6, "tiles": 2, "chunk": 256}
    assert arguments(problem, config, "avx512") == {"threads": 2, "rows": 6, "tiles": 2, "chunk": 256, "unpack_from": 1}
    assert set(arguments(problem.at(None), None, "avx512")) == {"threads", "unpack_from"}
