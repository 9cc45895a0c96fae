"""The registry of peers imports no library; every adapter that can run here gives a product that verifies."""

from __future__ import annotations

import subprocess
import sys

import pytest

from effllm.autotune import peers
from effllm.autotune.bench.run import random_activations, random_weight
from effllm.autotune.bench.verify import verify
from effllm.autotune.shapes import Site
from effllm.errors import OptionError


def test_listing_imports_no_library() -> None:
    code = (
        "import sys; from effllm.autotune import peers; found = [peers.get(n) for n in peers.NAMES];"
        "assert [p.name for p in found] == list(peers.NAMES); [p.missing(d) for p in found for d in ('cpu', 'cuda')];"
        "bad = {'torchao', 'bitsandbytes', 'gemlite', 'llama_cpp', 'triton'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_stays_with_none_and_with_names() -> None:
    assert [p.name for p in peers.chosen(["none"])] == ["torch-bf16", "torch-fp32"]
    assert [p.name for p in peers.chosen(["torchao-int8"])] == ["torch-bf16", "torch-fp32", "torchao-int8"]
    assert [p.name for p in peers.chosen(["all"])] == list(peers.NAMES)
    with pytest.raises(OptionError, match="did you mean 'torchao-int8'"):
        peers.get("torchao-int")


@pytest.mark.parametrize("name", peers.NAMES)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_product_is_right(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.get(name)
    reason = peer.missing("cpu") or peer.refuses(96, 128, 32)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr("effllm.autotune.bench.candidate.COLD", 0)
    weight = random_weight(Site("tiny", ("q",), 96, 128), "cpu")
    candidate = peer.build(weight, 32, 20_000)
    x = random_activations(rows, 128, "cpu")
    candidate.load(x)
    assert candidate.copies >= 2 and candidate.version != "unknown"
    result = verify(candidate, x, weight)
    assert not result.refused, result
    for _ in range(2 * candidate.copies):  # every copy, and around
        candidate.run()
    assert candidate.nbytes * 8 / weight.numel() == pytest.approx(candidate.bits, abs=1.1)
