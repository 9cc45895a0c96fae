"""Second moments of gradients against torch's own, and what they must not touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError
from effllm.solvers.lowrank.gradients import gradients
from tests.hf.tiny import tiny_llama

IDS = torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(0))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def plain(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum")


def test_squares_are_those_of_autograd() -> None:
    model = tiny_llama(torch.float32)
    found = gradients(model, IDS, linears(model), weights=True, sampled=False)
    wanted = {n: torch.zeros_like(m.weight) for n, m in linears(model).items()}
    for ids in IDS:
        grads = torch.autograd.grad(plain(model, ids), [m.weight for m in linears(model).values()])
        for (name, total), g in zip(wanted.items(), grads, strict=True):
            wanted[name] = total + g**2 / len(IDS)
    for name, total in wanted.items():
        torch.testing.assert_close(found[name].weight, total.detach(), rtol=1e-4, atol=1e-8)


def test_output_moments_with_and_without_weights_agree() -> None:
    model = tiny_llama(torch.float32)
    name = next(n for n in linears(model) if n.endswith("o_proj"))
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: out.register_hook(lambda g: seen.append(g[0])) and None)
    for ids in IDS:
        plain(model, ids).backward()
    handle.remove()
    model.zero_grad()
    rows = torch.cat(seen)
    for weights in (False, True):
        found = gradients(model, IDS, linears(model), weights=weights, sampled=False)
        assert set(found) == set(linears(model)) and (found[name].weight is not None) == weights
        torch.testing.assert_close(found[name].outputs, rows.t() @ rows / (IDS.numel() - len(IDS)), rtol=1e-4, atol=1e-9)


def test_model_is_left_as_it_was() -> None:
    model = tiny_llama(torch.float32)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    a, b = (gradients(model, IDS, linears(model), seed=4) for _ in range(2))
    assert [p.requires_grad for p in model.parameters()] == before and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(a[n].outputs, b[n].outputs) for n in a)


def test_broken_and_missing_data() -> None:
    model = tiny_llama(torch.float32)
    with pytest.raises(CalibrationError) as short:
        gradients(model, IDS[:, :1], linears(model))
    assert short.value.code == "E-CAL-SHORT"
    name, module = list(linears(model).items())[-1]
    handle = module.register_forward_hook(lambda m, args, out: out * float("nan"))
    with pytest.raises(CalibrationError) as nan:
        gradients(model, IDS, linears(model), sampled=False)
    handle.remove()
    assert nan.value.code == "E-CAL-GRAD" and ".".join(name.split(".")[:1]) in nan.value.cause
