"""Decoding with activation sparsity beside the same model dense, variants taking turns: tokens a second, batch 1, on CPU.

    python benchmarks/activation_decode.py [--model demo --model 1b] [--weights bf16 --weights w4] [--texts WHEEL] [--tokens 24] [--rounds 5]
        [--inner eager]

demo: thresholds from tokens of text, decoding goes on from a text. 1b: a Llama of Llama-3.2-1B's layer shapes with random weights; no text
means anything to it, so thresholds come from random tokens and only the times and the share of channels skipped are of use. Baselines are
PyTorch (Inductor, or eager with --inner eager) in bf16 and the effllm backend on the same weights, dense. `every channel` is the chess model
with thresholds below every magnitude: the same kernels skip nothing. `realised` is the share of the channels under thresholds that was
skipped while decoding, `skipped` the share of the layers' weights that a token does not read, by the calibration. Each variant's compiled
logits are compared with its uncompiled ones first. Thresholds on every linear turn the last bit of a 16-bit activation into a channel that is read or
not; a sparse variant whose logits differ by more for that is compared in fp32 (`error_fp32`), where they have to agree to 0.01, or to three times what
embeddings that are larger by 2^-22 bring about (`moved_fp32`): a model of random weights damps nothing.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import effllm
from benchmarks.activation_quality import counting
from benchmarks.timing import save
from effllm.activation.apply import install, sparse_parts
from effllm.activation.calibrate import Recording, parse
from effllm.activation.calibration import Plan
from effllm.hf import texts, variants
from effllm.hf.static import StaticRunner
from effllm.hf.variants import Shape, Variant
from effllm.solvers import blocks

METHODS = ("chess(sparsity=0.5)", "teal(sparsity=0.5,allocation=uniform)")
CHECKED, TOLERANCE = 6, 0.15  # as effllm bench
EXACT = 0.01  # in fp32


@dataclasses.dataclass
class Timed:
    """A variant with its bytes of weights, what it skips, and the error of its logits."""

    variant: Variant
    skipped: float = 0.0
    realised: float = 0.0
    error: float = 0.0
    error_fp32: float | None = None
    moved_fp32: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


def random_1b(layers: int) -> tuple[Any, None]:
    """A Llama of Llama-3.2-1B's layer shapes; 16 layers make it one of 1.04 billion weights."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False), None


def nothing(plan: Plan) -> Plan:
    """The plan with thresholds below every magnitude."""

    def cuts(found: dict[str, Any]) -> dict[str, Any]:
        return {n: dataclasses.replace(c, tensors=c.tensors | {"threshold": torch.full_like(c.tensors["threshold"], -1.0)}) for n, c in found.items()}

    return dataclasses.replace(plan, inputs=cuts(plan.inputs), gates=cuts(plan.gates))


def twin(model: Any) -> Any:
    """A copy that shares all tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def compiled(name: str, model: Any, shape: Shape, inner: str) -> Variant:
    """A model with the effllm backend; `inner` compiles what is left of the graph."""

    def wrap(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(step, fullgraph=True, backend="effllm", options={"recipe": "dense", "inner": inner})

    return Variant(name, None, model, StaticRunner(model, wrap, length=shape.length, prefill_length=shape.prefill, compile_prefill=False))


def build(dense: Any, weights: str, calibration: Tensor, shape: Shape, inner: str, methods: list[str], tell: Callable[[str], None]) -> list[Timed]:
    """The dense variants and the sparse ones of one kind of weights."""
    base = twin(dense)
    plain = "eager-bf16" if inner == "eager" else "inductor-bf16"
    out = [Timed(variants.baseline(plain, dense, shape, compile_prefill=False))]
    if weights != "bf16":
        tell(f"packing {weights}")
        effllm.compress(base, weights)
    out.append(Timed(compiled(f"{weights} dense", base, shape, inner)))
    recording = Recording(base, blocks.batches(calibration), calibration.numel(), parse(methods), tell)
    for word in methods:
        found = recording.solve(parse(word))
        for name, plan in ((word, found.plans[0]), ("every channel", nothing(found.plans[0]))):
            if name == word or word == methods[0]:
                model = twin(base)
                install(model, found, plan, anyway=True)
                skipped = found.level(plan) if name == word else 0.0
                out.append(Timed(compiled(f"{weights} {name}", model, shape, inner), skipped))
    return out


def check(timed: Timed, ids: Tensor, shape: Shape, inner: str) -> bool:
    """Compile, and compare the logits of some steps with those of uncompiled steps on the same tokens; count what those skip. Whether it may be timed."""
    v = timed.variant
    timed.error, seen = _error(v, ids, shape)
    if seen and sparse_parts(v.model):
        timed.realised = sum(share * n for share, n in seen) / sum(n for _, n in seen)
        if timed.error > TOLERANCE:
            wide = compiled(v.name, copy.deepcopy(v.model).float(), shape, inner)
            timed.error_fp32, _ = _error(wide, ids, shape)
            timed.moved_fp32 = _moved(wide.model, ids, shape)
            return timed.error_fp32 <= max(EXACT, 3 * timed.moved_fp32)
    return timed.error <= TOLERANCE


def _error(v: Variant, ids: Tensor, shape: Shape) -> tuple[float, list[tuple[float, int]]]:
    """Relative error of compiled logits to uncompiled ones, and what the uncompiled steps skipped."""
    prompt = ids[:, : shape.prompt]
    tokens, outs = v.runner.decode(v.runner.start(prompt), shape.prompt, CHECKED)
    plain = _uncompiled(v.model, ids, shape)
    with counting(v.model, sinks=False) as seen:
        want = _follow(plain, tokens, shape)
    return _apart(torch.cat(outs), want), seen


def _uncompiled(model: Any, ids: Tensor, shape: Shape) -> StaticRunner:
    """The model without a compiler, behind the prompt."""
    plain = StaticRunner(model, None, length=shape.length, prefill_length=shape.prefill)
    plain.start(ids[:, : shape.prompt])
    return plain


def _follow(plain: StaticRunner, tokens: list[int], shape: Shape) -> Tensor:
    """Logits behind each of the tokens that follow the prompt."""
    return torch.cat([plain.decode_step(torch.tensor([[t]]), torch.tensor([[shape.prompt + i]])) for i, t in enumerate(tokens)])


def _apart(got: Tensor, true: Tensor) -> float:
    """Relative error of centred logits."""
    got, true = (x.double() - x.double().mean(-1, keepdim=True) for x in (got, true))
    return float((got - true).norm() / true.norm())


def _moved(model: Any, ids: Tensor, shape: Shape) -> float:
    """How far the logits of an uncompiled model move with its embeddings 2^-22 larger."""
    tokens = ids[0, shape.prompt : shape.prompt + CHECKED].tolist()
    true = _follow(_uncompiled(model, ids, shape), tokens, shape)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out * (1 + 2.0**-22))
    try:
        return _apart(_follow(_uncompiled(model, ids, shape), tokens, shape), true)
    finally:
        handle.remove()


def measure(built: list[Timed], ids: Tensor, shape: Shape, rounds: int) -> None:
    """Rounds of `shape.tokens` tokens each, the variants taking turns."""
    for _ in range(rounds):
        for t in built:
            logits = t.variant.runner.start(ids[:, : shape.prompt])
            start = time.perf_counter()
            t.variant.runner.decode(logits, shape.prompt, shape.tokens)
            t.seconds.append(time.perf_counter() - start)


def rows(built: list[Timed], model: str, weights: str, shape: Shape) -> list[dict[str, Any]]:
    """Results, as ratios to both dense variants: medians of the ratios of each round."""
    found = []
    for t in built:
        row = {"model": model, "weights": weights, "variant": t.variant.name, "tok_s": shape.tokens / statistics.median(t.seconds)}
        for name, other in (("vs_torch", built[0]), ("vs_effllm_dense", built[1])):
            row[name] = statistics.median(a / b for a, b in zip(other.seconds, t.seconds, strict=True))
        found.append(row | {"skipped": t.skipped, "realised": t.realised, "error": t.error, "error_fp32": t.error_fp32, "moved_fp32": t.moved_fp32})
    return found


def prepare(
    model: str, weights: str, texts_from: str | None, shape: Shape, calibration_windows: int, layers: int, inner: str, methods: list[str],
    tell: Callable[[str], None],
) -> Any:  # fmt: skip
    """(prompt ids, checked variants) of a model."""
    if model == "demo":
        dense, tokenizer = effllm.load_demo()
        dense = dense.bfloat16()
        calibration = texts.windows(tokenizer, texts.calibration_text(texts_from).text, 512, calibration_windows)
        ids = texts.windows(tokenizer, texts.evaluation_text(texts_from).text, shape.prefill, 1)
    else:
        dense, _ = random_1b(layers)
        calibration = torch.randint(0, dense.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
        ids = torch.randint(0, dense.config.vocab_size, (1, shape.prefill), generator=torch.Generator().manual_seed(1))
    built = build(dense, weights, calibration, shape, inner, methods, lambda line: tell(f"{model} {weights}: {line}"))
    good = []
    for t in built:
        tell(f"{model} {weights}: checking {t.variant.name}")
        if check(t, ids, shape, inner):
            good.append(t)
        else:
            wide = f"{t.error_fp32} in fp32 ({t.moved_fp32} for embeddings moved by 2^-22)"
            tell(f"{t.variant.name}: compiled and uncompiled logits differ by {t.error:.3g}, {wide}; not timed")
    if good[:2] != built[:2]:
        raise SystemExit("nothing to compare with: a dense variant was found wrong")
    return ids, good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("demo", "1b"))
    parser.add_argument("--weights", action="append")
    parser.add_argument("--texts", metavar="WHEEL")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="the first one also with every channel read")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"), help="what runs the rest of the graph")
    parser.add_argument("--layers", type=int, default=16, help="of the 1b model")
    parser.add_argument("--calibration", type=int, default=32, help="windows of 512 tokens that calibrate the demo model")
    a = parser.parse_args()
    shape, found = Shape(prompt=32, tokens=a.tokens, prefill=64), []
    with torch.no_grad():
        for model in a.model or ["demo", "1b"]:
            for w in a.weights or ["bf16", "w4"]:
                ids, built = prepare(model, w, a.texts, shape, a.calibration, a.layers, a.inner, a.methods, lambda line: print(line, flush=True))
                measure(built, ids, shape, a.rounds)
                found += rows(built, model, w, shape)
                save("activation-decode", found, threads=torch.get_num_threads(), tokens=a.tokens, rounds=a.rounds, layers_1b=a.layers, inner=a.inner)


if __name__ == "__main__":
    main()
