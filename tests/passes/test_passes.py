"""The pass manager and each pass on its own: order, verification, idempotence, decisions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from effllm import backend, compat
from effllm.errors import PassError
from effllm.passes import manager, pipeline
from effllm.passes.base import Context, call, is_op, replace
from effllm.recipe import Recipe
from effllm.report import PassReport
from tests.models import Tied


def on_graph(model: nn.Module, inputs: tuple[Tensor, ...], look: Callable[[fx.Graph], None]) -> None:
    """Show a copy of the Dynamo graph to `look` while Dynamo still knows the real weights behind its inputs."""
    raised: list[BaseException] = []

    def keep(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        try:
            look(compat.copy_graph(gm)[0].graph)
        except BaseException as error:  # noqa: BLE001 - Dynamo would wrap it
            raised.append(error)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    if raised:
        raise raised[0]


IDS = (torch.zeros(1, 3, dtype=torch.long),)


def context(recipe: str) -> Context:
    return Context(Recipe.parse(recipe), store=backend.store, step=False)


def count(graph: fx.Graph, op: str) -> int:
    return sum(is_op(n, op) for n in graph.nodes)


class Named:
    def __init__(self, name: str, requires: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> None:
        self.name, self.requires, self.after = name, requires, after

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        return PassReport(self.name)


def test_order_follows_the_edges() -> None:
    passes = [Named("c", after=("b",)), Named("b", requires=("a",)), Named("a"), Named("d", after=("nothing",))]
    names = [p.name for p in manager.ordered(passes)]
    assert names.index("a") < names.index("b") < names.index("c") and "d" in names


def test_cycle_and_missing_requirement_name_the_passes() -> None:
    with pytest.raises(PassError, match="E-PAS-CYCLE") as cycle:
        manager.ordered([Named("a", after=("b",)), Named("b", after=("a",))])
    assert "a" in cycle.value.cause and "b" in cycle.value.cause
    with pytest.raises(PassError, match=r"E-PAS-MISSING.*'x'"):
        manager.ordered([Named("a", requires=("x",))])


def test_default_pipeline_orders() -> None:
    names = [p.name for p in manager.ordered(pipeline.default())]
    assert names.index("packed_linear") < names.index("share_activation") < names.index("merge_linear")


def test_a_pass_that_changes_a_shape_is_caught() -> None:
    class Wrong(Named):
        def run(self, graph: fx.Graph, ctx: Context) -> PassReport:
            node = next(n for n in graph.nodes if n.op == "call_function" and n.target in compat.LINEAR)
            with graph.inserting_before(node):
                new = call(graph, torch.narrow, (node.args[0], -1, 0, 7))
            replace(ctx, node, new)
            return PassReport(self.name)

    with pytest.raises(PassError, match="E-PAS-SHAPE"):
        on_graph(nn.Linear(16, 16), (torch.zeros(2, 16),), lambda g: manager.run([Wrong("wrong")], g, context("w4")) and None)


@pytest.mark.parametrize("recipe", ["w8", "w4a8"])
def test_passes_are_idempotent(recipe: str) -> None:
    def look(graph: fx.Graph) -> None:
        ctx = context(recipe)
        manager.run(pipeline.default(), graph, ctx)
        once, bound = str(graph), len(ctx.bound)
        again = manager.run(pipeline.default(), graph, ctx)
        assert str(graph) == once and len(ctx.bound) == bound
        assert not [d for r in again for d in r.decisions if d.action == "applied"]

    on_graph(Tied(), IDS, look)


def test_every_site_has_a_decision_and_siblings_are_merged() -> None:
    def look(graph: fx.Graph) -> None:
        reports = {r.name: r for r in manager.run(pipeline.default(), graph, context("w4a8(offset=none)"))}
        assert len(reports["packed_linear"].decisions) == 1 + 2 * 3 + 1
        # q and k quantize the same input once; q and k run in one call, o and the head are alone
        assert count(graph, "quantize_activation") == 2 * 2 + 1
        assert count(graph, "bipolar_linear_a8_many") == 2 and count(graph, "bipolar_linear_a8") == 2 + 1
        codes = [d.code for d in reports["merge_linear"].decisions]
        assert sorted(codes) == ["alone", "alone", "alone", "merged", "merged"]

    on_graph(Tied(blocks=2), IDS, look)


def test_tied_weight_is_bound_once() -> None:
    def look(graph: fx.Graph) -> None:
        ctx = context("w8")
        manager.run(pipeline.default(), graph, ctx)
        assert sum("emb" in b.source.name for b in ctx.bound) == 1

    on_graph(Tied(), IDS, look)


class Attention(nn.Module):
    def __init__(self, options: dict[str, object]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, d = k.shape
        k, v = (t[:, :, None, :, :].expand(b, h, 3, s, d).reshape(b, h * 3, s, d) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize(
    ("queries", "options", "code"),
    [(1, {}, "applied"), (2, {}, "applied"), (9, {}, "applied"), (9, {"is_causal": True}, "applied"), (1, {"dropout_p": 0.5}, "options")],
)
def test_attention(queries: int, options: dict[str, object], code: str) -> None:
    from effllm.lowering import providers
    from effllm.lowering.op import Problem

    q, kv = torch.randn(2, 6, queries, 16), torch.randn(2, 2, 40, 16)
    op = "decode_attention" if queries < 5 else "prompt_attention"
    here = providers.select(Problem(op, 6, 16, 0, 0, False, m=queries))[0].name != "reference"  # plain C++ leaves prompts to torch

    def look(graph: fx.Graph) -> None:
        reports = {r.name: r for r in manager.run(pipeline.default(), graph, context("w8"))}
        (decision,) = reports["attention"].decisions
        assert decision.code == (code if here or code != "applied" else "no-kernel")
        if here and code == "applied":
            node = next(n for n in graph.nodes if is_op(n, op))
            assert tuple(compat.example_value(node.args[1]).shape) == (2, 2, 40, 16)  # the repetition is gone

    on_graph(Attention(options), (q, kv, kv), look)
    if code == "applied":
        call_ = torch.compile(Attention(options), backend="effllm", options={"inner": "eager"})
        with torch.no_grad():
            assert torch.allclose(call_(q, kv, kv), Attention(options)(q, kv, kv), atol=1e-5)


def test_slower_than_dense_is_kept_and_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from effllm.autotune.cost import Prediction
    from effllm.lowering import providers
    from effllm.lowering.op import OPS, Config, Problem

    providers.load("cpu")
    table = OPS["bipolar_linear"].providers

    class Slow:
        def first(self, problem: Problem) -> Config:
            return {}

        def predict(self, problem: Problem, config: Config) -> Prediction:
            return Prediction(1, 1, 1, 1.0, 1.0)

    slow = {k: dataclasses.replace(p, tuning=Slow()) for k, p in table.items()}  # type: ignore[arg-type]
    monkeypatch.setattr(OPS["bipolar_linear"], "providers", slow)

    def look(graph: fx.Graph) -> None:
        (decision,) = manager.run([pipeline.default()[0]], graph, context("w4"))[0].decisions
        assert (decision.action, decision.code) == ("kept", "slower") and "x the time" in decision.reason

    on_graph(nn.Linear(64, 64, bias=False), (torch.zeros(2, 64),), look)


def decisions(fn: object, inputs: tuple[Tensor, ...], recipe: str = "w8(offset=none)") -> dict[str, list[tuple[str, str, str]]]:
    """(code, module, reason) of every decision, by pass."""
    found: dict[str, list[tuple[str, str, str]]] = {}

    def look(graph: fx.Graph) -> None:
        for r in manager.run(pipeline.default(), graph, context(recipe)):
            found[r.name] = [(d.code, d.module, d.reason) for d in r.decisions]

    on_graph(fn, inputs, look)
    return found


def test_a_weight_that_is_an_argument_is_not_packed() -> None:
    ((code, _, reason),) = decisions(nn.functional.linear, (torch.ones(2, 64), torch.ones(32, 64)))["packed_linear"]
    assert code == "no-parameter" and "argument" in reason


class Addmm(nn.Module):
    def __init__(self, shape: tuple[int, ...], **scale: int) -> None:
        super().__init__()
        self.w, self.b, self.scale = nn.Parameter(torch.randn(64, 48)), nn.Parameter(torch.randn(shape)), scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w, **self.scale)


def test_addmm_with_a_vector_is_a_linear_of_the_transposed_weight() -> None:
    model, x = Addmm((48,)), torch.randn(3, 64)
    assert [code for code, *_ in decisions(model, (x,))["packed_linear"]] == ["applied"]
    with torch.no_grad():
        got = torch.compile(model, backend="effllm", options={"recipe": "w8", "inner": "eager"})(x)
        assert 0 < float((got - model(x)).norm() / model(x).norm()) < 0.02
        model.w.mul_(-2.0)
        got = torch.compile(model, backend="effllm", options={"recipe": "w8", "inner": "eager"})(x)
        assert float((got - model(x)).norm() / model(x).norm()) < 0.02


@pytest.mark.parametrize("model", [Addmm((3, 48)), Addmm((48,), beta=2)])
def test_other_addmm_stay_and_name_the_parameter(model: Addmm) -> None:
    found = decisions(model, (torch.randn(3, 64),))["packed_linear"]
    assert [(c, m) for c, m, _ in found if m == "w"] == [("other-op", "w")] and all("addmm" in reason for *_, reason in found)


def test_siblings_with_another_grid_say_so() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    from effllm.lowering import providers

    if providers.load("cpu"):
        pytest.skip("the reference kernel merges nothing")
    rules = {"rules": [{"match": "a", "bits": 8, "offset": "none"}, {"bits": 4, "offset": "none"}]}
    found = decisions(Two(), (torch.zeros(2, 64),), rules)["merge_linear"]  # type: ignore[arg-type]
    assert [c for c, *_ in found] == ["unlike", "unlike"] and "b reads the same activation" in found[0][2]
