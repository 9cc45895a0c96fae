"""Problems of a model: distinct, counted through outlined layers, ordered by their share; and tuning them through every entry."""

from __future__ import annotations

import pytest
import torch

import effllm
from effllm import backend, tuning
from effllm.autotune import problems, use
from effllm.autotune.budget import parse_budget
from effllm.autotune.store import Store, open_store
from effllm.errors import OptionError, TuneError
from tests.autotune.simulated import Simulated
from tests.hf.tiny import tiny_llama
from tests.models import One, Tied


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """A store of the test's own behind the default one; kernels stay where they are."""
    monkeypatch.setattr("effllm.autotune.store.default_directory", lambda: tmp_path / "tuning")
    monkeypatch.setattr("effllm.autotune.dense.seconds", lambda problem: 1.0)  # portable kernels are rewritten to on any machine
    use.forget()
    torch._dynamo.reset()  # sizes that differ between tests must not become dynamic
    yield
    use.forget()


def options(**given):
    return backend.Options.parse({"recipe": "bipolar(bits=4)", "kernel": "cpu-portable"} | given, None)


class Flat(Simulated):
    """Every configuration takes the same time."""

    def __init__(self) -> None:
        super().__init__(seconds=lambda c: 1e-3)


@pytest.mark.parametrize("layers", ["inline", "once"])
def test_outlined_layers_count_like_inlined_ones(layers):
    done = backend.capture(Tied(blocks=4), torch.zeros(1, 3, dtype=torch.long), options(layers=layers, step="off"), dynamic=False)
    calls = {str(n.target) for n in done.gm.graph.nodes if n.op == "call_function"}
    assert any("invoke_subgraph" in c for c in calls) == (layers == "once")
    found = {(s.problem.op, s.problem.n, s.problem.k, s.problem.m): s.count for s in problems.of_graph(done.gm)}
    assert found[("bipolar_linear_many", 96, 64, 3)] == 4 and found[("bipolar_linear", 64, 96, 3)] == 4


def test_shares_order_the_problems_and_graphs_merge():
    sites = tuning.sites_of(tiny_llama(), options(), 7, None)
    assert [s.seconds for s in sites] == sorted((s.seconds for s in sites), reverse=True)
    assert len({(s.problem, s.provider.name) for s in sites}) == len(sites)
    assert {s.problem.m for s in sites} == {1, 7}
    head = next(s for s in sites if s.part == "decode, prefill")  # the head reads one row in both
    assert head.problem.m == 1 and head.weight == tuning.DECODE_STEPS + 1 and head.count == 2


def test_dynamic_rows_are_left_out():
    model = One()
    x = torch.randn(5, 64)
    torch._dynamo.mark_dynamic(x, 0)
    done = backend.capture(model, x, options())
    assert done.report.applied and not problems.of_graph(done.gm)


def test_a_model_without_ids_needs_inputs():
    with pytest.raises(TuneError, match="E-TUN-INPUTS"):
        tuning.tune(One(), budget=1)


def test_tuning_fills_the_store_and_compilation_uses_it():
    model = One()
    before = effllm.explain(model, torch.randn(3, 64), "w4", kernel="cpu-portable")
    assert before.applied[0].config["tuned"] == "cost model" and "measured" not in before.applied[0].reason
    sites = tuning.sites_of(model, options(recipe="w4"), 1, torch.randn(3, 64))
    done = tuning.tune_sites(sites, 100, runner=Flat())
    assert done.measured and "new trials" in tuning.summary(done)
    after = effllm.explain(model, torch.randn(3, 64), "w4", kernel="cpu-portable")  # tune forgot what was chosen before
    assert after.applied[0].config["tuned"] == "measured" and "exact: 1000.0 us measured" in after.applied[0].reason
    again = tuning.tune_sites(sites, 100, runner=Flat())
    assert again.measured == 0 and "nothing new to measure" in tuning.summary(again)


def test_a_budget_that_ends_early_says_what_is_open():
    sites = tuning.sites_of(tiny_llama(), options(), 7, None)
    done = tuning.tune_sites(sites, 1e-9, runner=Flat())
    assert len(done.results) == len(sites) and "not finished: run again" in tuning.summary(done) and done.measured == 0
    assert all(r["stopped"] == "not reached" for r in done.to_dict()["rows"])


def test_merged_linears_tell_how_their_own_configuration_was_found():
    report = effllm.explain(Tied(), torch.zeros(1, 3, dtype=torch.long), "w4", kernel="cpu-portable")
    merged = [d for d in report.applied if d.code == "merged"]
    assert merged and all(d.config == {"tuned": "cost model"} for d in merged)


def test_nothing_is_measured_in_forward_unless_asked(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("measured in forward")

    for name in ("effllm.autotune.search.Search.__init__", "effllm.autotune.worker.Worker.__init__", "effllm.autotune.measure.time_interleaved"):
        monkeypatch.setattr(name, never)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(One(), backend="effllm", options={"recipe": "w4", "inner": "eager", "kernel": "cpu-portable"})(torch.randn(2, 64))
    assert not open_store().load() and "autotune_s" not in effllm.last_report().measured


def test_the_backend_tunes_its_graph_when_asked(monkeypatch):
    made = Flat()
    monkeypatch.setattr(tuning, "Worker", lambda: _Closing(made))
    torch._dynamo.reset()
    model, x = One(), torch.randn(2, 64)
    with torch.no_grad():
        y = torch.compile(model, backend="effllm", options={"recipe": "w8", "inner": "eager", "kernel": "cpu-portable", "autotune": "5s"})(x)
        assert torch.allclose(y, model(x), atol=0.05)
    report = effllm.last_report()
    assert made.checked and open_store().load() and report.measured["autotune_s"] > 0
    assert report.applied[0].config["tuned"] == "measured"


def test_a_store_that_cannot_be_written_does_not_stop_a_compilation(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("effllm.autotune.store.default_directory", lambda: tmp_path / "file" / "tuning")
    monkeypatch.setattr(tuning, "Worker", lambda: _Closing(Flat()))
    options = {"recipe": "w8", "inner": "eager", "kernel": "cpu-portable", "autotune": "5s"}
    with torch.no_grad(), pytest.warns(UserWarning, match="E-TUN-WRITE"):
        torch.compile(One(), backend="effllm", options=options)(torch.randn(2, 64))
    assert any("E-TUN-WRITE" in n for n in effllm.last_report().notes) and effllm.last_report().applied
    with pytest.raises(TuneError, match="E-TUN-WRITE"):
        effllm.tune(One(), "w8", budget=5, inputs=torch.randn(2, 64), kernel="cpu-portable")


class _Closing:
    def __init__(self, runner):
        self.check, self.time = runner.check, runner.time

    def close(self):
        pass


@pytest.mark.parametrize(("text", "seconds"), [(120, 120), ("120", 120), ("120s", 120), ("2m", 120), (" 1.5 min ", 90), (0.5, 0.5)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", [0, "0", "0s", -1, "-2m", "soon", "", "1d", "1 2", float("inf"), float("nan"), None, True, [3]])
def test_bad_budgets(text):
    with pytest.raises(OptionError, match="E-OPT-BUDGET"):
        parse_budget(text)


def test_a_bad_budget_is_an_error_everywhere():
    with pytest.raises(OptionError, match="E-OPT-BUDGET"):
        effllm.tune(One(), "w4", budget="soon", inputs=torch.randn(1, 64))
    with pytest.raises(OptionError, match="E-OPT-BUDGET"):
        options(autotune="0s")


@pytest.mark.slow
def test_real_kernels_of_a_tiny_model_end_to_end(tmp_path):
    found = tuning.sites_of(tiny_llama(), backend.Options.parse({"recipe": "w4"}, None), 7, None)
    from effllm.autotune.worker import Worker

    with Worker(seconds=0.01, slack=None) as worker:  # whatever else this machine does
        done = tuning.tune_sites(found, 100, store=Store(tmp_path / "own"), runner=worker)
        again = tuning.tune_sites(found, 100, store=Store(tmp_path / "own"), runner=worker)
    finished = [(r, s) for r, s in zip(done.results, again.results, strict=True) if "not measured" not in r.stopped]  # a busy machine refuses some
    assert finished and all(t.status == "ok" for r, _ in finished for t in r.trials)
    assert all(r.measured and not s.measured for r, s in finished)
