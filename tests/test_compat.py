"""Every private name of torch that effllm touches still means what compat.py says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from effllm import compat


def capture(model: nn.Module, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        compat.copy_graph(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](self.emb(ids))
        return torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])


@pytest.fixture
def gm() -> torch.fx.GraphModule:
    return capture(Model(), torch.tensor([[1, 2]]))


def node_of(gm: torch.fx.GraphModule, targets: tuple[object, ...]) -> torch.fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets)


def test_linear_embedding_and_attention_targets(gm: torch.fx.GraphModule) -> None:
    for targets in (compat.LINEAR, compat.EMBEDDING, compat.ATTENTION):
        assert node_of(gm, targets)


def test_real_tensor_and_source_name() -> None:
    seen: list[tuple[object, str]] = []

    def look(gm: torch.fx.GraphModule, _: object) -> object:  # Dynamo drops the real tensors once the backend is done
        weight = node_of(gm, compat.LINEAR).args[1]
        seen.append((compat.real_tensor(weight), compat.source_name(weight)))
        return gm.forward

    model = Model()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=look)(torch.tensor([[1, 2]]))
    ((real, name),) = seen
    assert real is model.layers[0][0].weight and name.endswith("['weight']")


def test_module_of(gm: torch.fx.GraphModule) -> None:
    assert compat.module_of(node_of(gm, compat.LINEAR)) == ("layers.0.0", nn.Linear)
    assert compat.module_of(node_of(gm, compat.EMBEDDING)) == ("emb", nn.Embedding)


def test_module_of_a_list_inside_a_module() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    gm = capture(Deep(), torch.tensor([[1, 2]]))
    assert compat.module_of(node_of(gm, compat.LINEAR))[0] == "model.layers.0.0"


def test_copy_keeps_what_aot_reads(gm: torch.fx.GraphModule) -> None:
    copy, mapping = compat.copy_graph(gm)
    assert copy.graph is not gm.graph and len(copy.graph.nodes) == len(gm.graph.nodes)
    for old, new in mapping.items():
        if old.op == "placeholder":
            assert new._dynamo_source is old._dynamo_source
    assert copy.meta == gm.meta


def test_mark_static_sets_what_torch_looks_for(gm: torch.fx.GraphModule) -> None:
    node = next(n for n in compat.copy_graph(gm)[0].graph.nodes if n.op == "placeholder")
    compat.mark_static(node)
    assert node._dynamo_source is None and node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}


def test_fake_mode_and_example_value(gm: torch.fx.GraphModule) -> None:
    node = node_of(gm, compat.LINEAR)
    assert tuple(compat.example_value(node).shape) == (1, 2, 4) and compat.fake_mode(gm.graph) is not None
    compat.set_example_value(node, 3)
    assert compat.example_value(node) == 3


def test_version_counts_writes_and_inference_tensors_have_none() -> None:
    t = torch.zeros(2)
    before = compat.version(t)
    t.add_(1)
    assert compat.version(t) == before + 1
    with torch.inference_mode():
        assert compat.version(torch.zeros(2)) == -1


def test_inductor_names() -> None:
    assert {"default", "reduce-overhead", "max-autotune"} <= set(compat.inductor_modes())
    assert {"cpp_wrapper", "freezing", "max_autotune"} <= set(compat.inductor_option_names())


def test_the_compiler_is_found_without_inductor_and_is_the_one_it_would_take() -> None:
    code = (
        "import sys, torch; from effllm import compat; found = compat.inductor_compiler();"
        "assert 'torch._inductor.cpp_builder' not in sys.modules;"
        "from torch._inductor.cpp_builder import get_cpp_compiler; assert found == get_cpp_compiler() == compat.inductor_compiler(), found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={k: v for k, v in os.environ.items() if k != "TORCH_INDUCTOR_INSTALL_GXX"})


def test_a_compiler_that_is_not_there_is_none() -> None:
    code = "from effllm import compat; assert compat.inductor_compiler() is None"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CXX": "no-such-compiler"})


def test_compiler_is_found_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.inductor_compiler()
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert compat.inductor_compiler() is None


def test_stop_is_seen_through_dynamo() -> None:
    def stop(gm: object, inputs: object) -> object:
        raise compat.StopTracing

    with pytest.raises(Exception) as caught:
        torch.compile(nn.Linear(2, 2), backend=stop)(torch.zeros(1, 2))
    assert compat.is_stop(caught.value) and not compat.is_stop(ValueError())


def test_compiled_code_of_other_lowerings_is_not_taken_from_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: seen.append(torch.compiler.config.cache_key_tag))
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    with torch.compiler.config.patch(cache_key_tag="mine"):
        compat.compile_inner(gm, [], None, None)
        assert torch.compiler.config.cache_key_tag == "mine"
    assert seen == [f"mine effllm {compat.lowering_hash()}"]
    compat.lowering_hash.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda self: "another release")
    assert compat.lowering_hash() not in seen[0]
    compat.lowering_hash.cache_clear()


def test_compile_inner_passes_modes_and_options() -> None:
    gm = capture(nn.Linear(4, 4), torch.zeros(1, 4))
    values = [compat.example_value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    copy, _ = compat.copy_graph(gm)
    call = compat.compile_inner(copy, values, "default", {"cpp_wrapper": False})
    assert callable(call)


def test_parameter_name_and_what_counts_as_a_weight() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Bilinear(2, 3, 4)])
            self.register_buffer("table", torch.ones(3, 3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.parts[0].weight.sum() + (self.table @ y) + x

    seen: dict[str, bool] = {}

    def look(gm: torch.fx.GraphModule, _: object) -> object:
        for n in gm.graph.nodes:
            if n.op == "placeholder":
                seen[compat.parameter_name(n)] = compat.is_weight(n, compat.real_tensor(n))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Holds(), backend=look)(torch.ones(3, 3), torch.ones(3, 3))
    assert seen == {"parts.0.weight": True, "table": True, "x": False, "y": False}


def test_conv1d_is_the_class_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    assert compat.conv1d() is Conv1D and Conv1D(6, 4).weight.shape == (4, 6)  # (out, in) given, (in, out) held


def test_transformers_reads_the_mark_of_a_compile_config() -> None:
    import inspect

    from transformers import CompileConfig, GenerationMixin

    config = CompileConfig()
    assert not compat.compiles_on_every_device(config)
    compat.compile_on_every_device(config)
    assert compat.compiles_on_every_device(config)
    assert "compile_config._compile_all_devices" in inspect.getsource(GenerationMixin._valid_auto_compile_criteria)



def test_slow_dtypes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.fast_bf16(torch.device("cpu")) == torch.cpu._is_avx512_bf16_supported()
    for fast, machine in ((True, "x86_64"), (False, "x86_64"), (False, "aarch64")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert bool(compat.slow_model(nn.Linear(4, 4).bfloat16())) is (not fast and machine == "x86_64")
        assert compat.slow_model(nn.Linear(4, 4)) == compat.slow_model(nn.LayerNorm(4).bfloat16()) == compat.slow_model(nn.Module()) == ""


def test_cache_artifacts_of_our_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.compiler._cache import CacheArtifactFactory, CacheArtifactManager

    import effllm

    assert effllm and compat.artifact_problem(compat.TUNING_ARTIFACT) == "", "importing effllm registers it"
    assert "does not take" in compat.artifact_problem("effllm_test")
    monkeypatch.setattr(CacheArtifactFactory, "_artifact_types", dict(CacheArtifactFactory._artifact_types))
    loaded: list[tuple[str, bytes]] = []
    for _ in range(2):  # the second call changes nothing
        compat.register_artifact("effllm_test", lambda key, content: loaded.append((key, content)))
    with CacheArtifactManager.with_fresh_cache():
        for _ in range(2):
            compat.record_artifact("effllm_test", "k", b"content")
        compat.record_artifact("effllm_unknown", "k", b"content")
        saved = torch.compiler.save_cache_artifacts()
    assert saved is not None and dict(saved[1].artifacts) == {"effllm_test": ["k"]}
    torch.compiler.load_cache_artifacts(saved[0])
    assert loaded == [("k", b"content")]
