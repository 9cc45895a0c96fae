"""scoring.py: fp32 copies where 16 bits are slow, and only there."""

from __future__ import annotations

import pytest
import torch

import effllm
from effllm import compat
from effllm.autotune import machine
from effllm.hf.evaluate import score
from effllm.hf.scoring import for_scoring
from tests.hf.tiny import tiny_llama


@pytest.fixture
def pair():
    dense = tiny_llama()
    packed = tiny_llama()
    packed.load_state_dict(dense.state_dict())
    effllm.compress(packed, "w8")
    return dense, packed


def slow(monkeypatch, free=1 << 40):
    monkeypatch.setattr(compat, "slow_dtype", lambda dtype, device: "slow" if dtype is torch.bfloat16 else "")
    monkeypatch.setattr(machine, "available_memory", lambda: free)


def test_copies_hold_the_same_weights_and_leave_the_models_alone(pair, monkeypatch):
    dense, packed = pair
    before = {n: t.clone() for n, t in dense.state_dict().items()}
    slow(monkeypatch)
    found, why = for_scoring({"": dense, "base": dense, "w8": packed})
    assert why and found[""] is found["base"] is not dense
    assert found[""].dtype == found["w8"].dtype == torch.float32
    assert dense.dtype == packed.dtype == torch.bfloat16
    assert all(torch.equal(t, before[n]) for n, t in dense.state_dict().items())
    assert all(torch.equal(t, before[n].float()) for n, t in found[""].state_dict().items())
    windows = torch.randint(0, 64, (2, 80), generator=torch.Generator().manual_seed(3))
    own, wide = score({"": dense, "w8": packed}, dense, windows), score(found, found[""], windows)
    assert wide[""]["kl"] == 0 and wide["w8"]["kl"] > 0
    for name in own:
        assert wide[name]["perplexity"] == pytest.approx(own[name]["perplexity"], rel=0.02)
        assert wide[name]["perplexity"] != own[name]["perplexity"]  # bf16 and fp32 round differently: the copies were scored
    # the rounding of 16 bits is not counted as an error of the codes
    assert wide["w8"]["kl"] < own["w8"]["kl"]


def test_models_stay_where_nothing_is_slow_or_copies_do_not_fit(pair, monkeypatch):
    dense, packed = pair
    slow(monkeypatch, free=1000)
    assert for_scoring({"d": dense, "p": packed}) == ({"d": dense, "p": packed}, None)
    slow(monkeypatch)
    monkeypatch.setattr(compat, "slow_dtype", lambda dtype, device: "")
    assert for_scoring({"d": dense, "p": packed}) == ({"d": dense, "p": packed}, None)


def test_all_or_none(pair, monkeypatch):
    slow(monkeypatch)
    dense, packed = pair[0].float(), pair[1]
    found, why = for_scoring({"d": dense, "p": packed})
    assert why is None and found == {"d": dense, "p": packed}
