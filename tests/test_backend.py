"""The backend: graphs stay as they were, inputs stay static, options are checked, reports are true."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import effllm
from effllm import backend, compat
from effllm.errors import OptionError, PassError, RecipeError
from tests.models import One, Tied, relative


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_works_by_name_without_importing_effllm() -> None:
    import subprocess
    import sys

    code = (
        "import torch, sys; m = torch.nn.Linear(64, 64).eval()\n"
        "assert 'effllm' not in sys.modules\n"
        "c = torch.compile(m, backend='effllm', options={'inner': 'eager'})\n"
        "x = torch.randn(2, 64)\n"
        "with torch.no_grad(): d = (c(x) - m(x)).norm() / m(x).norm()\n"
        "assert 0 < d < 0.02, d"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", ["w8", "w4", "w4a8", "w3"])
def test_fullgraph_through_inductor(recipe: str) -> None:
    model, ids = Tied().eval(), torch.randint(0, 48, (1, 6))
    with torch.no_grad():
        want = model(ids)
        packed = torch.compile(model, backend="effllm", options={"recipe": recipe, "inner": "eager"})(ids)
        got = torch.compile(model, backend="effllm", fullgraph=True, options={"recipe": recipe})(ids)
    assert relative(got, packed) < 5e-3  # Inductor rounds like eager up to fused operations
    assert 0 < relative(got, want) < {"w8": 0.02, "w4": 0.2, "w4a8": 0.2, "w3": 0.4}[recipe]


class Attending(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.q, self.scale = nn.Linear(32, 32), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(1, -1, 2, 16).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, scale=self.scale)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_models_of_one_class_that_differ_by_a_number(inner: str) -> None:
    # from the second on Dynamo makes the number symbolic, which an op cannot take
    x = torch.randn(1, 6, 32)
    for scale in (0.25, 0.5, 1.5):
        model = Attending(scale).eval().requires_grad_(False)
        with torch.no_grad():
            got = torch.compile(model, backend="effllm", fullgraph=True, options={"inner": inner})(x)
            assert 0 < relative(got, model(x)) < 0.02, scale


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_number_that_changes_with_each_call_makes_one_more_graph(inner: str) -> None:
    # Dynamo makes it symbolic at the second value; a compiler that cannot take it asks for one graph a value, up to the limit, and then for none
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, number: float) -> torch.Tensor:
            return torch.softmax(self.linear(x) / number, -1)

    model, x, before = Scaled().eval().requires_grad_(False), torch.randn(3, 32), list(backend.reports)  # the newest 64
    call = torch.compile(model, backend="effllm", options={"inner": inner})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (0.5, 0.7, 1.1, 1.7):
            assert 0 < relative(call(x, number), model(x, number)) < 0.01, number
    assert sum(all(r is not b for b in before) for r in backend.reports) == 2


def test_incoming_graph_is_not_changed() -> None:
    seen: list[tuple[str, str]] = []

    def spy(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        before = str(gm.graph)
        call = backend.effllm(gm, inputs, options={"recipe": "w4", "inner": "eager"})
        seen.append((before, str(gm.graph)))
        return call

    with torch.no_grad():
        torch.compile(Tied(), backend=spy)(torch.randint(0, 48, (1, 4)))
    assert len(seen) == 1 and seen[0][0] == seen[0][1]


def test_packed_inputs_reach_the_inner_compiler_as_static(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx as module

    static: list[tuple[int, list[int]]] = []
    original = module.compile_fx_inner

    def spy(gm: torch.fx.GraphModule, inputs: list[object], **kwargs: object) -> object:
        static.append((len(inputs), sorted(kwargs.get("static_input_idxs", ()))))
        return original(gm, inputs, **kwargs)

    real = module.compile_fx
    monkeypatch.setattr(module, "compile_fx", lambda gm, inputs, **kw: real(gm, inputs, **({"inner_compile": spy} | kw)))
    with torch.no_grad():
        torch.compile(Tied(), backend="effllm", options={"recipe": "w4", "step": "off"})(torch.randint(0, 48, (1, 4)))
    (count, indices), = static
    assert len(indices) == count - 1  # all but the token ids


def test_dense_weight_is_no_input_of_the_compiled_graph() -> None:
    kept: list[backend.Rewritten] = []

    def spy(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        kept.append(backend.rewrite(gm, backend.Options.parse({"recipe": "w4"}, None)))
        return gm.forward

    with torch.no_grad():
        torch.compile(One(), backend=spy)(torch.randn(2, 64))
    shapes = [tuple(n.meta["example_value"].shape) for n in kept[0].gm.graph.nodes if n.op == "placeholder"]
    assert (64, 64) not in shapes and len(shapes) == 3  # x, codes, scale


@pytest.mark.parametrize("road", ["backend", "compressed"])
def test_decoding_stays_within_two_graphs(road: str) -> None:
    """64 steps after three prompt lengths: one dynamic graph for prompts, one for single tokens, no recompile."""
    model = Tied().eval()
    if road == "compressed":
        effllm.compress(model, "w4a8")
    counted: list[int] = []

    def counting(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        made = backend.effllm(gm, inputs, options={"recipe": "w4", "inner": "eager"})
        counted.append(1)  # not where Dynamo is asked to trace again, with a number as a constant
        return made

    call = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (5, 9, 17):
            ids = torch.randint(0, 48, (1, length))
            for _ in range(64):
                ids = torch.cat([ids, call(ids[:, -1:])[:, -1:].argmax(-1)], 1)
            assert relative(call(ids), model(ids)) < 0.2
    assert len(counted) == 2


def test_gradients_keep_the_dense_linear_and_say_so() -> None:
    model, x = One(), torch.randn(2, 64)
    call = torch.compile(model, backend="effllm", options={"recipe": "w4", "inner": "eager"})
    with pytest.warns(UserWarning, match="no_grad"):
        y = call(x)
    y.sum().backward()
    assert model.w.weight.grad is not None and torch.equal(y, model(x))
    decision, = [d for d in effllm.last_report().decisions if d.module == "w"]
    assert (decision.action, decision.code) == ("kept", "grad")
    with torch.no_grad():
        assert 0 < relative(call(x), model(x)) < 0.2  # the same callable, now rewritten


def test_strict_raises_where_nothing_applied() -> None:
    call = torch.compile(One(), backend="effllm", options={"recipe": "w4", "strict": True, "inner": "eager"})
    with pytest.raises(Exception, match="E-PAS-STRICT"):
        call(torch.randn(2, 64))  # gradients are on


def test_nan_weight_stays_dense_with_a_failed_decision() -> None:
    model = One()
    with torch.no_grad():
        model.w.weight[3, 3] = float("nan")
        call = torch.compile(model, backend="effllm", options={"recipe": "w4", "inner": "eager"})
        with pytest.warns(UserWarning, match="E-WGT-NAN"):
            call(torch.randn(2, 64))
    decision, = [d for d in effllm.last_report().decisions if d.module == "w"]
    assert (decision.action, decision.code) == ("failed", "E-WGT-NAN")


@pytest.mark.parametrize(
    ("options", "code", "hint"),
    [
        ({"recipy": "w4"}, "E-OPT-KEY", "recipe"),
        ({"recipe": "w9"}, "E-RCP-METHOD", "w8"),
        ({"weights": "always"}, "E-OPT-VALUE", "checked"),
        ({"mode": "max-autotun"}, "E-OPT-VALUE", "max-autotune"),
        ({"inner": "aot"}, "E-OPT-VALUE", "eager"),
        ({"inductor": {"freezin": True}}, "E-OPT-INDUCTOR", "freezing"),
    ],
)
def test_wrong_options_name_the_nearest(options: dict[str, object], code: str, hint: str) -> None:
    with pytest.raises((OptionError, RecipeError)) as caught:
        backend.Options.parse(options, None)
    assert caught.value.code == code and hint in str(caught.value)


def test_mode_may_be_a_recipe_or_a_mode_of_inductor() -> None:
    assert backend.Options.parse(None, "w4a8").recipe.name == "w4a8"
    assert backend.Options.parse(None, "max-autotune").mode == "max-autotune"
    assert backend.Options.parse(None, None).recipe.name == "w8"


def test_explain_runs_nothing() -> None:
    model = Tied()
    ran: list[int] = []
    model.register_forward_hook(lambda *_: ran.append(1))
    report = effllm.explain(model, torch.randint(0, 48, (1, 4)), "w4a8")
    assert not ran and {d.module for d in report.applied} >= {"emb", "lm_head", "blocks.0.q"}
    assert "4 x" in str(report) or "2 x" in str(report)
    assert all(d.time_before and d.time_after for d in report.applied if d.module == "blocks.0.q")


def test_explain_of_a_graph_break_is_an_error_of_ours() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

    with pytest.raises(PassError, match="E-PAS-CAPTURE"):
        effllm.explain(Breaks(), torch.randn(2, 2))


def test_missing_kernels_mean_the_reference_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from effllm.errors import KernelError
    from effllm.kernels import cpu

    def broken(isa: object) -> None:
        raise KernelError("E-KRN-COMPILER", "no C++ compiler found", "install g++")

    monkeypatch.setattr(cpu, "ensure", broken)
    model, x = One(), torch.randn(2, 64)
    call = torch.compile(model, backend="effllm", options={"recipe": "w8", "inner": "eager"})
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert relative(call(x), model(x)) < 0.02
        call(x)
    said = [str(w.message) for w in caught if "reference" in str(w.message)]
    assert len(said) == 1 and "no C++ compiler" in said[0]


def test_compressed_model_under_other_backends() -> None:
    model, ids = Tied().eval(), torch.randint(0, 48, (1, 6))
    effllm.compress(model, "w4a8")
    with torch.no_grad():
        want = model(ids)
        for name in ("eager", "inductor", "effllm"):
            torch._dynamo.reset()
            assert relative(torch.compile(model, backend=name, fullgraph=True)(ids), want) < 5e-3


def test_registering_twice_keeps_the_first() -> None:
    compat.register_backend("effllm", lambda *a, **k: None)
    with torch.no_grad():
        assert torch.compile(One(), backend="effllm", options={"inner": "eager"})(torch.randn(1, 64)).shape == (1, 64)


def test_a_stricter_gate_keeps_more_dense() -> None:
    model, x = nn.Linear(64, 64), torch.randn(4, 64)
    found = {}
    for slack in (1e9, 1e-9):
        found[slack] = effllm.explain(model, x, "w8", max_slowdown=slack).decisions
    assert [d.code for d in found[1e9] if d.action == "applied"] and next(d.code for d in found[1e-9]) == "slower"
    for wrong in (0, -1, "much"):
        with pytest.raises(OptionError, match="max_slowdown"):
            backend.Options.parse({"max_slowdown": wrong}, None)
