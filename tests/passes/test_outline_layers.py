"""Isomorphic layers become calls of one subgraph, and nothing but compile time changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm import backend, compat
from effllm.errors import OptionError

pytestmark = pytest.mark.skipif(not compat.can_outline(), reason="this torch cannot compile such subgraphs")


class Layer(nn.Module):
    """A residual block that writes to a buffer, as a cache does."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, hidden), nn.Linear(hidden, 32, bias=False)
        self.register_buffer("seen", torch.zeros(4, 32))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.seen.index_copy_(0, at, x)
        return x + self.down(torch.relu(self.up(x))) + self.seen.mean(0)


class Stack(nn.Module):
    def __init__(self, *hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(h) for h in hidden)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, at)
        return x


def compiled(model: nn.Module, layers: str = "auto", inner: str = "eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="effllm", fullgraph=True, options={"recipe": "w8", "layers": layers, "inner": inner, **options})


def run(model: Stack, **how: Any) -> tuple[list[Tensor], list[Tensor], tuple[str, str]]:
    """Outputs of three steps, the buffers after them, and what was decided about the layers."""
    for layer in model.layers:
        layer.seen.zero_()
    f, outs = compiled(model, **how), []
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in range(3):
            outs.append(f(torch.randn(1, 32, generator=g), torch.tensor([i])).clone())
    (decision,) = (d for p in backend.last_report().passes if p.name == "outline_layers" for d in p.decisions)
    return outs, [layer.seen.clone() for layer in model.layers], (decision.code, decision.reason)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_same_results_and_same_writes(inner: str) -> None:
    torch.manual_seed(0)
    model = Stack(48, 48, 48, 48)
    once, seen, said = run(model, inner=inner)
    apart, seen_apart, said_apart = run(model, layers="inline", inner=inner)
    assert said == ("outlined", "4 of 4 layers compiled as 1") and said_apart == ("inline", "asked for")
    for a, b in zip([*once, *seen], [*apart, *seen_apart], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(s.abs().sum() > 0 for s in seen)  # the writes arrived


def test_layers_of_two_kinds_become_two_subgraphs_and_a_lone_one_stays() -> None:
    torch.manual_seed(0)
    model = Stack(48, 64, 48, 64, 48, 64, 80)
    outs, _, said = run(model)
    apart, _, _ = run(model, layers="inline")
    assert said == ("outlined", "6 of 7 layers compiled as 2")
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(outs, apart, strict=True))


def test_too_few_of_a_kind_stay_in_line() -> None:
    code, reason = run(Stack(48, 64, 80))[2]
    assert code == "not-repeated" and "3 layers of 3 kinds" in reason


def test_changed_weights_are_seen() -> None:
    """Outlined layers get their packed weights at call time like any other."""
    torch.manual_seed(0)
    model, x, at = Stack(48, 48, 48), torch.randn(1, 32), torch.tensor([0])
    f = compiled(model)
    with torch.no_grad():
        before = f(x, at).clone()
        model.layers[1].down.weight.mul_(3)
        after = f(x, at)
        assert not torch.allclose(before, after)
        assert torch.allclose(after, compiled(model)(x, at), rtol=1e-5, atol=1e-6)


def test_dynamic_rows() -> None:
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Plain()
    once, apart = (torch.compile(model, backend="effllm", dynamic=True, options={"layers": k, "inner": "eager"}) for k in ("once", "inline"))
    with torch.no_grad():
        for rows in (2, 5, 9):
            x = torch.randn(rows, 32)
            a = once(x)
            torch._dynamo.reset()
            assert torch.allclose(a, apart(x), rtol=1e-5, atol=1e-6)


def test_gradients_keep_layers_in_line() -> None:
    model = Stack(48, 48, 48)
    with pytest.warns(UserWarning, match="gradients"):
        compiled(model)(torch.randn(1, 32), torch.tensor([0]))
    decisions = [d for p in backend.last_report().passes if p.name == "outline_layers" for d in p.decisions]
    assert [d.reason for d in decisions] == ["gradients are recorded"]


def test_the_cpp_wrapper_takes_no_subgraphs() -> None:
    with pytest.raises(OptionError, match="cpp_wrapper"):
        backend.Options.parse({"layers": "once", "inductor": {"cpp_wrapper": True}}, None)
    with pytest.raises(OptionError, match="layers"):
        backend.Options.parse({"layers": "twice"}, None)


def test_a_language_model_decodes_the_same() -> None:
    from effllm.hf.static import StaticRunner
    from tests.hf.tiny import tiny_llama

    model = tiny_llama(torch.float32, layers=4)
    effllm.compress(model, "w4a8")
    ids, tokens = torch.randint(3, 60, (1, 9)), []
    for layers in ("once", "inline"):
        torch._dynamo.reset()
        runner = StaticRunner(
            model, lambda step, k=layers: torch.compile(step, backend="effllm", fullgraph=True, options={"layers": k, "inner": "eager"}),
            length=32, prefill_length=16, compile_prefill=False,
        )  # fmt: skip
        tokens.append(runner.decode(runner.start(ids), 9, 12)[0])
    assert tokens[0] == tokens[1]
