"""Every contact with private names of torch (and of transformers, two of them). One small function per name, tested in tests/test_compat.py.

Tested with torch 2.11 to 2.13. Where a name is missing the function says so in its docstring; nothing else in effllm touches
underscore names of these two.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

LINEAR: tuple[Any, ...] = (torch._C._nn.linear, torch.nn.functional.linear)
ATTENTION: tuple[Any, ...] = (torch._C._nn.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
EMBEDDING: tuple[Any, ...] = (torch.nn.functional.embedding,)
ADDMM: tuple[Any, ...] = (torch.addmm,)
INVOKE_SUBGRAPH: Any = getattr(torch.ops.higher_order, "invoke_subgraph", None)


def argument_names(target: Any) -> list[str]:
    """Names of an op's arguments in order; `target` is an overload, or a packet whose default overload is meant."""
    overload = target if isinstance(target, torch._ops.OpOverload) else target.default
    return [a.name for a in overload._schema.arguments]


def bind_arguments(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, defaults filled in, from the schema of an operator overload."""
    schema = target._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), args, strict=False))
    return bound | kwargs


def inductor_compiler() -> str | None:
    """The C++ compiler that Inductor would use, None if it finds none.

    Importing Inductor takes a second. Where nobody has yet, the two rules of its default setting are applied here: CXX, else g++.
    """
    if "torch._inductor.cpp_builder" not in sys.modules and sys.platform == "linux" and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        cxx = os.environ.get("CXX", "g++")
        return cxx if shutil.which(cxx) else None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return str(get_cpp_compiler())
    except ImportError:
        return shutil.which("g++") or shutil.which("clang++")
    except Exception as error:  # InvalidCxxCompiler is private; anything else is raised again
        if type(error).__name__ == "InvalidCxxCompiler":
            return None
        raise


def copy_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy that Dynamo does not know of, with what AOTAutograd needs to see static inputs; and the map from old to new nodes.

    Dynamo reads its own placeholders again after the backend returns, so the incoming graph must stay as it is.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    old_output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    next(iter(reversed(graph.nodes))).meta = dict(old_output.meta)
    new = fx.GraphModule(gm, graph)
    new.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        new._param_name_to_source = gm._param_name_to_source  # type: ignore[assignment]
    for old, copied in mapping.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            copied._dynamo_source = old._dynamo_source
    return new, mapping


def mark_static(node: fx.Node) -> None:
    """Tag a new placeholder as a static input, so that CUDA graphs do not copy it at every call."""
    node._dynamo_source = None  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def real_tensor(placeholder: fx.Node) -> Tensor | None:
    """The real tensor behind a Dynamo placeholder at compile time, None for activations that are fake or symbolic."""
    arg = placeholder.meta.get("grapharg")
    example = getattr(arg, "example", None) if arg is not None else None
    return example if isinstance(example, Tensor) else None


def source_name(placeholder: fx.Node) -> str:
    """The Python expression that Dynamo read the input from, such as L['self']._modules['a']._parameters['weight']."""
    arg = placeholder.meta.get("grapharg")
    source = getattr(arg, "source", None) if arg is not None else None
    if source is None:
        source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name)


def is_weight(placeholder: fx.Node, real: Tensor) -> bool:
    """Whether an input is a parameter or a module's buffer, so that it is worth packing once; any other tensor may be new at each call."""
    return isinstance(real, torch.nn.Parameter) or "._buffers[" in source_name(placeholder)


def parameter_name(placeholder: fx.Node) -> str:
    """Dotted name of the parameter behind a placeholder, such as model.layers.0.mlp.experts.down_proj."""
    text = re.sub(r"\._(?:modules|parameters|buffers)(?=\[)", "", source_name(placeholder))
    parts = [p for p in re.split(r"[\[\].'\"]+", text) if p]
    return ".".join((parts[2:] or parts[1:]) if parts[:1] == ["L"] else parts)


def module_of(node: fx.Node) -> tuple[str, type | None]:
    """Dotted name and class of the innermost nn.Module that a node comes from; empty name outside of modules."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", None
    path, cls = list(stack.values())[-1]
    return _dotted(path), cls if isinstance(cls, type) else None


def _dotted(path: Any) -> str:
    text = str(path).replace("_modules", "").replace("[", ".").replace("]", ".").replace("'", "").replace('"', "")
    parts = [p for p in text.split(".") if p]
    if parts[:1] == ["L"]:  # a local of the traced function: its name is not part of the module's
        parts = parts[2:]
    return ".".join(parts)


def module_paths(node: fx.Node) -> list[str]:
    """Dotted names of the nn.Modules that a node comes from, outermost first."""
    return [_dotted(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices in hardware. Where a CPU does not, torch's bf16 products take several times its fp32 ones."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """What to tell one who multiplies matrices of this dtype where that is known to be slow, else nothing. Known of x86 processors alone."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64") or fast_bf16(device):
        return ""
    return "this processor has no bf16 products, which take several times as long as fp32 ones here: give model.float() where there is room"


def slow_model(module: torch.nn.Module) -> str:
    """The same of a model, by its first matrix."""
    p = next((p for p in module.parameters() if p.is_floating_point() and p.dim() > 1), None)
    return "" if p is None else slow_dtype(p.dtype, p.device)


def example_value(node: Any) -> Any:
    """The fake value of a node in a Dynamo graph; arguments of nodes are typed as anything, so this is too."""
    return node.meta.get("example_value")


def set_example_value(node: fx.Node, value: Any) -> None:
    """Give a new node its fake value."""
    node.meta["example_value"] = value


def fake_mode(graph: fx.Graph) -> Any:
    """The FakeTensorMode of a Dynamo graph, None without tensors."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    return None


def version(t: Tensor) -> int:
    """The in-place version counter; -1 for inference tensors, which have none."""
    return -1 if t.is_inference() else int(t._version)


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None) -> Callable[..., Any]:
    """Hand a graph to Inductor, with one of its modes and config options."""
    from torch._inductor.compile_fx import compile_fx

    # Dynamo's guards and the fakes of our ops have checked the shapes; the asserts cost 8 % of decoding a small model
    patches: dict[str, Any] = {"size_asserts": False}
    if mode not in (None, "default"):
        patches.update(torch._inductor.list_mode_options(mode))
    patches.update(options or {})
    # torch's caches know an op by its name: what our ops are lowered to is in the tag, or an older release's code would call this one's kernels
    config: Any = torch.compiler.config
    with warnings.catch_warnings(), config.patch(cache_key_tag=f"{config.cache_key_tag} effllm {lowering_hash()}".lstrip()):
        # fp16 scales beside bf16 activations are meant: the gather widens both to fp32
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")
        compiled: Any = compile_fx(gm, [_with_number(x) for x in example_inputs], config_patches=patches or None)
    return cast(Callable[..., Any], compiled)


def _with_number(value: Any) -> Any:
    """A fake scalar that stands for a symbolic number, in the mode that compilers use.

    Dynamo gives backends a fresh mode, torch's compiler moves the fakes of the graph's own mode there, and forgets which number they hold.
    """
    context, memo = torch._guards.TracingContext.try_get(), getattr(value, "item_memo", None)
    mode = None if context is None else context.fake_mode
    if memo is None or mode is None or value.fake_mode is mode:
        return value
    moved = mode.from_tensor(value)
    moved.item_memo = memo
    return moved


@functools.cache
def lowering_hash() -> str:
    """Sixteen hex digits over the Python sources of ops and kernels, which decide what compiled graphs call."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(p for folder in ("lowering", "kernels") for p in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0{path.read_text()}\0".encode())
    return digest.hexdigest()[:16]


def can_outline() -> bool:
    """Whether Inductor compiles `invoke_subgraph` calls whose subgraph writes to its inputs (seen to work in torch 2.13)."""
    return hasattr(torch.ops.higher_order, "invoke_subgraph") and tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)


def numbers_as_constants(gm: fx.GraphModule) -> None:
    """Have Dynamo trace again with those numbers as constants that it made symbolic and that an op takes as they are (an attention scale).

    Dynamo does so to a number that differed from one model to the next of the same class. Arithmetic on tensors takes symbolic numbers; other ops
    do not, and Inductor asks for the same, but only of graphs that it was given whole. Raises what Dynamo restarts from.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    wanted = set()
    for node in gm.graph.nodes:
        memo = getattr(example_value(node), "item_memo", None)
        name = getattr(getattr(getattr(memo, "node", None), "_expr", None), "name", "") if isinstance(memo, torch.SymFloat) else ""
        items = [u for u in node.users if u.target == "item"]
        if name.startswith("zf") and len(items) == len(node.users) and any(map(_needs_number, items)) and not TensorifyState.should_specialize(name):
            wanted.add(name)
    if wanted:
        for name in sorted(wanted):
            TensorifyState.specialize(name)
        raise TensorifyScalarRestartAnalysis


def _needs_number(node: fx.Node) -> bool:
    """Whether a symbolic number, or one that is computed of it, is an argument of an op that is no arithmetic."""
    for user in node.users:
        arithmetic = getattr(user.target, "__module__", "") == "_operator"
        if not arithmetic or (isinstance(example_value(user), torch.SymFloat) and _needs_number(user)):
            return True
    return False


def is_mutation(target: Any) -> bool:
    """Whether a call target is an op that writes to its arguments, by its schema."""
    op = target.default if isinstance(target, torch._ops.OpOverloadPacket) and "default" in target.overloads() else target
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def is_log(node: fx.Node) -> bool:
    """Whether a node only counts for torch's own log how often something is used."""
    return node.op == "call_function" and node.target is torch._C._log_api_usage_once


def is_custom_mutation(target: Any) -> bool:
    """Whether a call target is an op outside of aten that writes to its arguments."""
    return is_mutation(target) and not str(target).startswith("aten")


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, real or fake, are views of one memory."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def erased(node: fx.Node) -> bool:
    """Whether a node was erased from its graph."""
    return bool(node._erased)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's modes and what they set."""
    return dict(torch._inductor.list_mode_options())


def inductor_option_names() -> list[str]:
    """Names of Inductor's config options."""
    return list(torch._inductor.list_options())


def conv1d() -> type | None:
    """transformers' Conv1D (a linear with an (in, out) weight); None while nothing has imported it, for then no model has one."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return found if isinstance(found, type) else None


def compile_on_every_device(config: Any) -> None:
    """Let transformers' generate use a CompileConfig on devices where it would ignore it, such as CPUs."""
    config._compile_all_devices = True


def compiles_on_every_device(config: Any) -> bool:
    """Whether `compile_on_every_device` was called on the config."""
    return bool(getattr(config, "_compile_all_devices", None))

TUNING_ARTIFACT = "effllm_tuning"


def register_artifact(kind: str, load: Callable[[str, bytes], None]) -> None:
    """Make `torch.compiler.load_cache_artifacts` call `load(key, content)` for artifacts of a kind; keeps what is registered.

    Must run before loading: torch drops a whole bundle that holds an unknown kind. Does nothing where `artifact_problem` has a reason.
    """
    try:
        from torch.compiler._cache import CacheArtifact, CacheArtifactFactory
    except ImportError:
        return
    known = getattr(CacheArtifactFactory, "_artifact_types", None)
    if known is None or kind in known:
        return

    class Artifact(CacheArtifact):
        """Hands its content to `load`."""

        @staticmethod
        def type() -> str:
            return kind

        def populate_cache(self) -> None:
            load(self.key, self.content)

    CacheArtifactFactory.register(Artifact)


def artifact_problem(kind: str) -> str:
    """Why artifacts of a kind cannot be recorded; empty where they can."""
    try:
        from torch.compiler._cache import CacheArtifactFactory, CacheArtifactManager
    except ImportError:
        return f"torch {torch.__version__} has no extensible cache artifacts (torch.compiler._cache)"
    if not hasattr(CacheArtifactManager, "record_artifact") or kind not in getattr(CacheArtifactFactory, "_artifact_types", {}):
        return f"torch {torch.__version__} does not take cache artifacts of type {kind!r}"
    return ""


def record_artifact(kind: str, key: str, content: bytes) -> None:
    """Let the next `torch.compiler.save_cache_artifacts` carry `content`, once; does nothing where `artifact_problem` has a reason."""
    if not artifact_problem(kind):
        from torch.compiler._cache import CacheArtifactManager

        CacheArtifactManager.record_artifact(kind, key, content)



def register_backend(name: str, backend: Callable[..., Any]) -> None:
    """Make `torch.compile(backend=name)` work without an installed entry point; keeps what is there.

    With the entry point Dynamo finds the backend by itself: importing Dynamo here would import Triton and cost a second.
    """
    if name in importlib.metadata.entry_points(group="torch_dynamo_backends").names:
        return
    from torch._dynamo.backends import registry

    if name not in registry._COMPILER_FNS:
        registry.register_backend(name=name)(backend)


class StopTracing(Exception):
    """Raised by the explaining backend once it has seen the graph, so that nothing is compiled or run."""


def is_stop(error: BaseException) -> bool:
    """Whether an exception that came out of Dynamo is, or wraps, StopTracing."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StopTracing) or isinstance(getattr(seen, "inner_exception", None), StopTracing):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_capture_error(error: BaseException) -> bool:
    """Whether Dynamo raised it: a graph break under fullgraph, or a backend that failed."""
    from torch._dynamo import exc

    return isinstance(error, exc.TorchDynamoException)


def attention_implementation(config: Any) -> str:
    """The name of the attention implementation that a transformers config selects."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def set_attention_implementation(config: Any, name: str) -> None:
    """Select another one for this config alone. transformers' public setter walks all modules of the model, milliseconds a call."""
    config._attn_implementation_internal = name


def takes_attention(model: Any) -> bool:
    """Whether a transformers model looks its attention up in the registry, by transformers' own test."""
    test = getattr(type(model), "_can_set_attn_implementation", None)
    return bool(test()) if test is not None else False


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: Dynamo counts recompilations per code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__)
