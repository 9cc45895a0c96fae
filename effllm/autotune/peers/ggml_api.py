"""The few functions of ggml's C interface that one matrix product needs, through ctypes, from the libraries of llama-cpp-python.

The Python package itself binds whole models only; the shared libraries beside it export ggml's graphs. Nothing is loaded at import.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

F32, Q4_0, Q8_0 = 0, 2, 8  # enum ggml_type


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64), ("type_size", c_size_t),
        ("is_quantized", c_bool), ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)), ("from_float_ref", c_void_p),
    )  # fmt: skip


# function -> (result, arguments)
_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (c_void_p, c_void_p)),
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_get_type_traits": (POINTER(Traits), (c_int,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float))),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_free": (None, (c_void_p,)),
}
_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
}


def folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries; None where they are not."""
    spec = importlib.util.find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        lib = Path(place) / "lib"
        if (lib / "libggml-base.so").exists() and (lib / "libggml-cpu.so").exists():
            return lib
    return None


class Ggml:
    """The loaded functions as attributes, one CPU backend, and the buffer types of the CPU that reorder weights."""

    def __init__(self, lib: Path) -> None:
        base = ctypes.CDLL(str(lib / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(lib / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        for library, names in ((base, _BASE), (cpu, _CPU)):
            for name, (result, arguments) in names.items():
                function = getattr(library, name)  # AttributeError: another version of ggml
                function.restype, function.argtypes = result, list(arguments)
                setattr(self, name.removeprefix("ggml_"), function)
        self._silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)  # it logs every weight
        self.log_set(ctypes.cast(self._silent, c_void_p), None)
        self.backend = self.backend_cpu_init()
        registry = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(registry, 0)
        self.plain = self.backend_cpu_buffer_type()
        self.reordering = self._extra(registry)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml function {name} is not loaded")

    def _extra(self, registry: int) -> list[int]:
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
        found: list[int] = []
        while listed and (one := listed[len(found)]):
            found.append(one)
        return found

    def context(self, tensors: int, graphs: int = 0, nodes: int = 1) -> int:
        """A context for descriptions only; the memory of tensors comes from buffers."""
        size = (tensors + 1) * self.tensor_overhead() + graphs * self.graph_overhead_custom(nodes, False) + 4096
        made: int = self.init(InitParams(size, None, True))
        return made


@functools.cache
def load() -> Ggml:
    """The library, once per process. Raises OSError or AttributeError where it is missing or of an unknown version."""
    lib = folder()
    if lib is None:
        raise OSError("llama_cpp/lib has no libggml-base.so and libggml-cpu.so")
    return Ggml(lib)
