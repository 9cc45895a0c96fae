"""Low rank and sparse plus low rank on the demo model: perplexity against dense at equal stored numbers.

    python benchmarks/structured_quality.py [--rows svd,whitened,...] [--ratios 0.9,0.8] [--texts WHEEL] [--calibration 16] [--windows 40] [--cache DIR]

All 210 linears inside of the decoder blocks are covered; `ratio` is the share of their numbers that is stored (16 bits each, unless the
row quantizes its factors), layers that stay dense counted in full. Calibration: windows of 512 tokens spread evenly over the even articles;
evaluation: the odd ones. Every row goes through the formats: factors are rounded to what is stored, then multiplied out into the dense model.
Rows of earlier runs stay in benchmarks/results/structured-quality.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import score
from effllm.recipe import Bipolar
from effllm.runtime import formats
from effllm.runtime.formats import dense as dense_format
from effllm.runtime.formats import sltrain as sltrain_format
from effllm.runtime.formats.base import Packed
from effllm.solvers.calibrate import calibrated
from effllm.solvers.lowrank import allocate, factorize, quantize, sparse
from effllm.solvers.lowrank.allocate import Allocation
from effllm.solvers.lowrank.factors import Factors, rank_for
from effllm.solvers.lowrank.gradients import gradients
from effllm.solvers.lowrank.metric import DAMP
from effllm.solvers.lowrank.pivots import pivoted
from effllm.solvers.lowrank.whitened import spectrum, whitened
from effllm.solvers.moments import Moments
from effllm.solvers.statistics import Statistics

RESULTS = Path(__file__).parent / "results" / "structured-quality.json"
Data = dict[str, Any]


@dataclass
class Subject:
    """The dense model with what every row needs of it. Statistics are computed when a row first asks for them."""

    model: Any
    calibration: Tensor
    evaluation: Tensor
    cache: Path | None

    def __post_init__(self) -> None:
        self.linears: dict[str, nn.Linear] = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
        self.shapes = {n: (m.weight.shape[0], m.weight.shape[1]) for n, m in self.linears.items()}
        self._held: Data = {}

    def _kept(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            file = None if self.cache is None else self.cache / f"{key}-{self.calibration.shape[0]}.pt"
            if file is not None and file.is_file():
                self._held[key] = torch.load(file, weights_only=False)
            else:
                self._held[key] = make()
                if file is not None:
                    torch.save(self._held[key], file)
        return self._held[key]

    def moments(self) -> dict[str, Moments]:
        """Of the dense model."""

        def make() -> dict[str, Moments | None]:
            with Statistics(dict(self.linears)) as statistics, torch.no_grad():
                for ids in self.calibration:
                    statistics.begin()
                    self.model(input_ids=ids[None], use_cache=False)
            return {n: statistics.moments(n) for n in self.linears}

        return self._kept("moments", make)

    def outputs(self) -> dict[str, Tensor]:
        """Second moments of the gradients at every output, with targets drawn from the model."""
        return self._kept("outputs", lambda: {n: g.outputs for n, g in self._gradients(self.calibration).items()})

    def fisher(self) -> dict[str, Tensor]:
        """Squared gradients of the weights on four windows of the text."""
        return self._kept("fisher", lambda: {n: g.weight for n, g in self._gradients(self.calibration[:4], weights=True, sampled=False).items()})

    def _gradients(self, windows: Tensor, **how: Any) -> Any:
        return gradients(self.model, windows, dict(self.linears), **how)

    def spectra(self, outputs: bool) -> dict[str, Tensor]:
        """Singular values whose dropped squares are a layer's loss per token; with `outputs` in nats."""

        def make() -> dict[str, Tensor]:
            moments, g = self.moments(), self.outputs() if outputs else {}
            unit = {n: replace(m, hessian=m.hessian / m.count, outputs=g.get(n)) for n, m in moments.items()}
            return {n: spectrum(m.weight, unit[n]) for n, m in self.linears.items()}

        return self._kept(f"spectra-{'outputs' if outputs else 'inputs'}", make)


Solve = Callable[[Subject, str, Tensor, int, Moments], Factors]
Allocate = Callable[[Subject, float], Allocation]


@dataclass(frozen=True)
class Row:
    """How ranks are chosen, how a layer is solved, on which statistics ("dense" or "sequential": packed prefix with dense targets)."""

    allocate: Allocate
    solve: Solve
    statistics: str = "sequential"
    pivoted: bool = False
    bits: int = 16
    extra: str = ""  # "sltrain" or "lost": a part of the budget goes to a sparse part


def even(pivoted: bool = False) -> Allocate:
    return lambda s, ratio: allocate.uniform(s.shapes, ratio, pivoted=pivoted)


def by_outputs(pivoted: bool) -> Allocate:
    return lambda s, ratio: allocate.energy(s.spectra(True), s.shapes, ratio, pivoted=pivoted, step=8)


def by_kl(pivoted: bool) -> Allocate:
    """Every group of layers that share an input, measured alone at three ratios on two calibration windows."""

    def run(s: Subject, ratio: float) -> Allocation:
        groups: dict[str, list[str]] = {}
        kind = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        for name in s.linears:
            parent, _, leaf = name.rpartition(".")
            groups.setdefault(f"{parent}.{kind.get(leaf, leaf)}", []).append(name)

        def measure(ranks: Any) -> float:
            old = {n: s.linears[n].weight.data for n in ranks}
            for n, rank in ranks.items():
                f = whitened(old[n], rank, replace(s.moments()[n], outputs=s.outputs()[n]))
                s.linears[n].weight.data = f.dense().to(old[n].dtype)
            kl = score({"m": s.model}, reference, s.calibration[:2])["m"]["kl"]
            for n, w in old.items():
                s.linears[n].weight.data = w
            return kl

        reference = copy.deepcopy(s.model)
        found: Allocation = s._kept(f"kl-{pivoted}-{ratio}", lambda: allocate.sensitivity(s.shapes, groups, (0.9, 0.75, 0.5), measure, ratio, pivoted=pivoted))
        return found

    return run


def welore(s: Subject, ratio: float) -> Allocation:
    spectra = s._kept("spectra-weights", lambda: {n: torch.linalg.svdvals(m.weight.double()) for n, m in s.linears.items()})
    return allocate.welore(spectra, s.shapes, ratio)


def by_output_error(s: Subject, ratio: float) -> Allocation:
    """Energy of each layer's own output, in shares of it."""
    return allocate.energy(s.spectra(False), s.shapes, ratio, step=8, relative=True)


def plain(method: str) -> Solve:
    """A method on the layer's own statistics."""

    def solve(s: Subject, name: str, w: Tensor, rank: int, m: Moments) -> Factors:
        return factorize(w, method, rank, replace(m, fisher=s.fisher()[name]) if method == "fwsvd" else m)

    return solve


def weighed(method: str = "whitened", share: float = 1.0, damp: float = DAMP) -> Solve:
    """In the metric of the outputs. The aim lies between the dense model's output (share 1) and what the dense weight makes of the
    packed prefix's input (share 0)."""

    def solve(s: Subject, name: str, w: Tensor, rank: int, m: Moments) -> Factors:
        m = replace(m, outputs=s.outputs()[name])
        if m.cross is not None and share != 1:
            m = replace(m, cross=share * m.cross + (1 - share) * m.hessian)
        return whitened(w, rank, m, damp=damp) if method == "whitened" else factorize(w, method, rank, m)

    return solve


ROWS: dict[str, Row] = {
    "svd": Row(even(), plain("svd"), "dense"),
    "fwsvd": Row(even(), plain("fwsvd"), "dense"),
    "asvd": Row(even(), plain("asvd"), "dense"),
    "script": Row(even(), plain("whitened"), "dense"),  # what a plain script does: dense statistics, uniform ranks
    "whitened": Row(even(), plain("whitened")),
    "afm": Row(even(), plain("afm")),
    "whitened, output metric": Row(even(), weighed()),
    "welore ranks": Row(welore, plain("whitened")),
    "energy ranks": Row(by_output_error, plain("whitened")),
    "kl ranks": Row(by_kl(False), weighed()),
    "sltrain": Row(even(), plain("whitened"), "dense", extra="sltrain"),
    "lost": Row(even(), plain("whitened"), "dense", extra="lost"),
    "best": Row(by_outputs(False), weighed()),
    "best, dense statistics": Row(by_outputs(False), weighed(), "dense"),
    "best, no dense targets": Row(by_outputs(False), weighed(share=0)),
    "best, half dense targets": Row(by_outputs(False), weighed(share=0.5)),
    "best, damped more": Row(by_outputs(False), weighed(damp=1e-2)),
    "best, afm": Row(by_outputs(False), weighed("afm")),
    "best, 8 bits": Row(by_outputs(False), weighed(), "dense", bits=8),
    "uniform, pivoted": Row(even(True), plain("whitened"), "dense", pivoted=True),
    "best, pivoted": Row(by_outputs(True), weighed(), pivoted=True),
    "best, pivoted, dense statistics": Row(by_outputs(True), weighed(), "dense", pivoted=True),
    "best, pivoted, half dense targets": Row(by_outputs(True), weighed(share=0.5), pivoted=True),
    "best, pivoted, 8 bits": Row(by_outputs(True), weighed(), "dense", pivoted=True, bits=8),
}
SPARSE = 0.02  # share of the weights in the sparse part; its entries take a value and an index


def pack(s: Subject, row: Row, name: str, w: Tensor, rank: int, m: Moments, ratio: float) -> Packed:
    """One layer in the format that its row stores."""
    n, k = w.shape
    if row.extra == "sltrain":
        factors, rest = sparse.sltrain(w, rank_for(n, k, ratio - 2 * SPARSE), int(SPARSE * n * k), m)
        return sltrain_format.make(*(dense_format.make(t.bfloat16()) for t in (factors.a, factors.b)), rest)
    if row.extra == "lost":
        channels = max(1, int(2 * SPARSE * k))
        return quantize.store(sparse.lost(w, int((ratio * k - channels) * n / (n + k)), channels, m))
    factors = row.solve(s, name, w, rank, m)
    if row.pivoted:
        factors = pivoted(factors)
    if row.bits == 16:
        return quantize.store(factors)
    return quantize.quantize(factors, Bipolar(bits=row.bits, group=32, offset="none"), m)


def measure(s: Subject, dense: Any, key: str, ratio: float) -> dict[str, Any]:
    """Compress into the subject's model, score it, and put the dense weights back."""
    row, shapes = ROWS[key], s.shapes
    start = time.perf_counter()
    found = row.allocate(s, ratio)
    ranked = time.perf_counter() - start
    names = {id(m.weight): n for n, m in s.linears.items()}
    old = {n: (m.weight.data, m.bias) for n, m in s.linears.items()}
    numbers = stored = 0
    solving = 0.0

    def solver(w: Tensor, rank: int | None, m: Moments | None) -> Packed:
        nonlocal solving
        if rank is None or m is None:
            return dense_format.make(w)
        begin = time.perf_counter()
        packed = pack(s, row, names[id(w)], w.detach(), rank, m, ratio)
        solving += time.perf_counter() - begin
        return packed

    def install(name: str, packed: Packed) -> None:
        nonlocal stored, numbers
        module = s.linears[name]
        module.weight.data = formats.get(packed.format).unpack(packed, torch.bfloat16)
        if "shift" in packed.tensors:
            module.bias = nn.Parameter(packed.tensors["shift"].bfloat16(), requires_grad=False)
        stored += packed.nbytes
        numbers += math.prod(shapes[name])

    start = time.perf_counter()
    try:
        if row.statistics == "dense":
            for name, module in s.linears.items():
                install(name, solver(module.weight, found.ranks[name], s.moments()[name]))
        else:
            covered = {n: (m, found.ranks[n]) for n, m in s.linears.items()}
            calibrated(s.model, s.calibration, covered, install, targets=True, solver=solver)
        seconds = time.perf_counter() - start
        figures = score({"m": s.model}, dense, s.evaluation)["m"]
    finally:
        for name, (weight, bias) in old.items():
            s.linears[name].weight.data = weight
            s.linears[name].bias = bias
    about = {"row": key, "ratio": ratio, "stored": stored / (2 * numbers), **figures, "statistics": row.statistics}
    about |= {"calibration_tokens": s.calibration.numel(), "seconds_ranks": ranked, "seconds": seconds, "seconds_solving": solving}
    about |= {"dense_layers": sum(r is None for r in found.ranks.values()), "ranks_kept": allocate.summary(found, shapes)}
    if found.classes:
        about["lrc"] = sum(c == "LRC" for c in found.classes.values())
    return about


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=";".join(ROWS), help="names separated by semicolons")
    parser.add_argument("--ratios", default="0.9,0.8")
    parser.add_argument("--texts", metavar="WHEEL")
    parser.add_argument("--calibration", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens to score")
    parser.add_argument("--cache", type=Path, help="folder that keeps statistics between runs")
    a = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_demo()
    evaluation = texts.evaluation_text(a.texts)
    everything = texts.windows(tokenizer, texts.calibration_text(a.texts).text, 512)
    calibration = everything[:: len(everything) // a.calibration][: a.calibration]
    dense = copy.deepcopy(model)
    s = Subject(model, calibration, texts.windows(tokenizer, evaluation.text, 512, a.windows), a.cache)
    base = score({"m": dense}, None, s.evaluation)["m"]["perplexity"]
    print(f"dense: {base:.4f} on {evaluation.name}, {s.evaluation.numel()} tokens", flush=True)
    rows: list[Data] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for ratio in (float(r) for r in a.ratios.split(",")):
        for key in a.rows.split(";"):
            new = measure(s, dense, key.strip(), ratio) | {"text": evaluation.name, "dense_perplexity": base}
            new["perplexity_ratio"] = new["perplexity"] / base
            same = ("row", "ratio", "calibration_tokens", "tokens")
            rows = [r for r in rows if any(r[k] != new[k] for k in same)] + [new]
            RESULTS.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")
            keys = ("row", "ratio", "stored", "perplexity", "perplexity_ratio", "kl", "dense_layers", "seconds", "seconds_solving")
            print("  ".join(f"{k}={new[k]:.4g}" if isinstance(new[k], float) else f"{k}={new[k]}" for k in keys), flush=True)


if __name__ == "__main__":
    main()
