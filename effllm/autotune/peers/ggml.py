"""llama.cpp's matrix products, Q8_0 and Q4_0, as single nodes of ggml graphs.

As llama.cpp does at load, the weight goes to a buffer type that reorders it where the CPU has one for its type. A product quantizes
its fp32 activations to Q8_0 inside. One graph holds several products, as in a model, so that the cost of starting one is shared.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Candidate, copies
from effllm.autotune.peers import ggml_api
from effllm.autotune.peers.base import Peer, label

NODES = 16  # products of a graph at few rows; one at many
BLOCK = 32  # columns that share a scale


class Product(Candidate):
    """Copies of one quantized weight, and graphs over them for the rows that were loaded."""

    floor = 0.03  # int8 activations

    def __init__(self, weight: Tensor, kind: int, cache: int) -> None:
        self._g = g = ggml_api.load()
        self._n, self._k = n, k = weight.shape
        self._type, self._row = kind, g.row_size(kind, k)
        self.nbytes = n * self._row
        count = copies(self.nbytes, cache)
        self.copies = -(-count // NODES) * NODES if count > 1 else 1
        self._codes = torch.empty(self.nbytes, dtype=torch.uint8)  # in ggml's plain order
        wide = weight.float().contiguous()
        g.quantize_chunk(kind, wide.data_ptr(), self._codes.data_ptr(), 0, n, k, None)
        self._context = g.context(self.copies)
        self._weights = [g.new_tensor_2d(self._context, kind, k, n) for _ in range(self.copies)]
        self._buffer = g.backend_alloc_ctx_tensors_from_buft(self._context, self._buffer_type())
        if not self._buffer:
            raise MemoryError(f"ggml cannot allocate {self.copies} weights of {self.nbytes} bytes")
        for one in self._weights:
            g.backend_tensor_set(one, self._codes.data_ptr(), 0, self.nbytes)
        self._work: tuple[int, int] | None = None  # context and buffer of the graphs

    def _buffer_type(self) -> int:
        """The first reordering buffer type that takes this product, else the plain one."""
        g = self._g
        for kind in g.reordering:
            context = g.context(3)
            weight = g.new_tensor_2d(context, self._type, self._k, self._n)
            buffer = g.backend_alloc_ctx_tensors_from_buft(context, kind)
            x = g.new_tensor_2d(context, ggml_api.F32, self._k, 1)
            fits = bool(buffer) and g.backend_dev_supports_op(g.device, g.mul_mat(context, weight, x))
            if buffer:
                g.backend_buffer_free(buffer)
            g.free(context)
            if fits:
                return int(kind)
        return int(g.plain)

    def load(self, x: Tensor) -> None:
        """Write the activations in fp32 and build the graphs."""
        g, m = self._g, x.shape[0]
        self._release()
        g.backend_cpu_set_n_threads(g.backend, torch.get_num_threads())
        self.calls = min(NODES, self.copies) if m <= NODES else 1
        count = self.copies // self.calls
        context = g.context(self.copies + 1, count, 2 * self.calls + 2)
        xs, ys = m * self._k * 4, m * self._n * 4
        start = -(-xs // 128) * 128
        buffer = g.backend_buft_alloc_buffer(g.plain, start + ys + 128)
        self._work = (context, buffer)
        base = g.backend_buffer_get_base(buffer)
        given = g.new_tensor_2d(context, ggml_api.F32, self._k, m)
        g.backend_tensor_alloc(buffer, given, base)
        wide = x.float().contiguous()
        g.backend_tensor_set(given, wide.data_ptr(), 0, xs)
        self._graphs, self._shape = [], (m, self._n)
        for i in range(count):
            graph = g.new_graph_custom(context, 2 * self.calls + 2, False)
            for weight in self._weights[i * self.calls : (i + 1) * self.calls]:
                self._y = g.mul_mat(context, weight, given)
                g.backend_tensor_alloc(buffer, self._y, base + start)  # all write the same output
                g.build_forward_expand(graph, self._y)
            self._graphs.append(graph)
        self._turn = 0

    def run(self) -> None:
        """Compute the next graph."""
        graph = self._graphs[self._turn]
        self._turn = (self._turn + 1) % len(self._graphs)
        status = self._g.backend_graph_compute(self._g.backend, graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self) -> Tensor:
        """The product of the last node of the first graph: all copies are alike."""
        self._turn = 0
        self.run()
        y = torch.full(self._shape, float("nan"))
        self._g.backend_tensor_get(self._y, y.data_ptr(), 0, y.numel() * 4)
        return y

    def stored(self, index: Tensor) -> Tensor:
        """By ggml's own dequantizer."""
        rows = self._codes.view(self._n, self._row)[index].contiguous()
        values = torch.empty(len(index), self._k)
        traits = self._g.get_type_traits(self._type).contents
        traits.to_float(ctypes.c_void_p(rows.data_ptr()), ctypes.c_void_p(values.data_ptr()), values.numel())
        return values.double()

    def _release(self) -> None:
        if self._work is not None:
            self._g.backend_buffer_free(self._work[1])
            self._g.free(self._work[0])
            self._work = None

    def __del__(self) -> None:
        if getattr(self, "_buffer", None):
            self._release()
            self._g.backend_buffer_free(self._buffer)
            self._g.free(self._context)


class Llama(Peer):
    """One of llama.cpp's types."""

    package, distribution, devices = "llama_cpp", "llama-cpp-python", ("cpu",)
    install = "pip install --no-binary llama-cpp-python llama-cpp-python (builds for this CPU: minutes)"

    def __init__(self, name: str, kind: int, bits: int) -> None:
        self.name, self._type, self._bits = name, kind, bits

    def missing(self, device: str) -> str:
        """The package's shared libraries are needed, not its Python."""
        found = super().missing(device)
        return found or ("" if ggml_api.folder() else "llama_cpp is installed without libggml-base.so and libggml-cpu.so in its lib folder")

    def refuses(self, n: int, k: int, group: int) -> str:
        """Blocks of 32 must divide K."""
        return f"K = {k} is no multiple of its block, {BLOCK}" if k % BLOCK else ""

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize with ggml's own rounding, without an importance matrix."""
        del group
        made = Product(weight, self._type, cache)
        label(made, self, self._bits, "int8")
        return made


PEERS: tuple[Peer, ...] = (Llama("llama.cpp-q8_0", ggml_api.Q8_0, 8), Llama("llama.cpp-q4_0", ggml_api.Q4_0, 4))
