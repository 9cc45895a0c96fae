"""Quantized factors: 8 bits cost next to nothing, and errors of B are made up for in A."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar, lowrank
from effllm.solvers.gptq import gptq
from effllm.solvers.lowrank.afm import afm
from effllm.solvers.lowrank.factors import Factors
from effllm.solvers.lowrank.pivots import pivoted
from effllm.solvers.lowrank.quantize import _second, quantize, store
from effllm.solvers.lowrank.sparse import lost
from effllm.solvers.lowrank.whitened import whitened
from effllm.solvers.moments import Moments, of_inputs


def problem() -> tuple[Tensor, Moments]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 96, generator=gen) @ (torch.randn(96, 96, generator=gen) * torch.logspace(0, -1.5, 96)[:, None])
    return torch.randn(64, 96, generator=gen), of_inputs(x)


def forms(w: Tensor, m: Moments) -> dict[str, Factors]:
    plain = whitened(w, 32, m)
    return {"plain": plain, "pivoted": pivoted(plain), "channels": lost(w, 24, 8, m), "shift": afm(w, 32, m)}


def off(w: Tensor, z: Tensor, m: Moments) -> float:
    e = w.double() - z.double()
    return float(((e @ m.hessian.double()) * e).sum())


@pytest.mark.parametrize("form", ["plain", "pivoted", "channels", "shift"])
def test_eight_bits_cost_nothing_visible(form: str) -> None:
    w, m = problem()
    f = forms(w, m)[form]
    exact = off(w, f.dense(), m)
    assert off(w, lowrank.unpack(store(f)), m) < 1.01 * exact
    packed = quantize(f, Bipolar(bits=8, group=32, offset="none"), m)
    assert packed.nbytes < 0.56 * store(f).nbytes + 300
    assert off(w, lowrank.unpack(packed), m) < 1.02 * exact
    assert ("shift" in packed.tensors) == (form == "shift") and ("pivots" in packed.tensors) == (form == "pivoted")


@pytest.mark.parametrize("form", ["plain", "pivoted", "channels"])
def test_statistics_help_and_bits_are_monotone(form: str) -> None:
    w, m = problem()
    f = forms(w, m)[form]
    noise = {}
    for bits in (3, 4, 6, 8):
        params = Bipolar(bits=bits, group=32, offset="none")
        with_h, without = (off(f.dense(), lowrank.unpack(quantize(f, params, given)), m) for given in (m, None))
        assert with_h < 0.8 * without
        noise[bits] = with_h
    assert noise[3] > noise[4] > noise[6] > noise[8]


def test_second_factor_makes_up_for_the_first() -> None:
    """Against A quantized on the same statistics without being fitted to the stored B."""
    w, m = problem()
    f = whitened(w, 32, m)
    coarse, fine = Bipolar(bits=3, group=32, offset="none"), Bipolar(bits=8, group=32, offset="none")
    b = bipolar.unpack(gptq(f.b.float(), coarse, m.hessian)).double()
    unfitted = bipolar.unpack(gptq(f.a.float(), fine, (b @ m.hessian.double() @ b.t()).float())).double()
    fitted = bipolar.unpack(_second(f, b, fine, m.hessian.double(), 1e-3)).double()
    assert off(f.dense(), fitted @ b, m) < 0.98 * off(f.dense(), unfitted @ b, m)


def test_store_keeps_the_digits_of_its_type() -> None:
    w, m = problem()
    for f in forms(w, m).values():
        value = f.dense()
        assert float((lowrank.unpack(store(f, torch.float32), torch.float64) - value).abs().max()) < 1e-5 * float(value.abs().max())
