"""What N:M patterns cost the demo model: perplexity as a ratio to dense, per pattern and solver, with equal calibration.

    python benchmarks/nm_quality.py [--texts WHEEL] [--patterns 2:4,4:8,6:8] [--methods magnitude,wanda,...] [--windows 16]
                                    [--permute inner] [--ratios farms] [--recipe "nm(pattern=2:4, solver=sparsegpt, bits=4)"]

Every linear of the decoder layers is solved, the embedding and head stay dense. Statistics are sequential: 16 windows of 512 tokens of
even articles go through the layers solved so far, input by input (query/key/value, output, gate/up, down). Solved weights are written
into the model as dense fp32 numbers, odd articles are scored in windows of 512. `method@output` aims at the dense model's outputs
instead of the weight's outputs on the same inputs. proxy: mean over linears of the calibration error relative to the zero matrix.
--permute reorders channels of the dense model first (effllm.reordering), --ratios gives every block a pattern of its own, the pattern being
the mean (effllm.solvers.nm.layerwise). --recipe goes through effllm.compress instead of this script's loop, in bf16.
Results go to benchmarks/results/nm_quality.json, rows of other runs stay there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effllm
from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import perplexity
from effllm.methods import NM
from effllm.reordering import reorder
from effllm.solvers import blocks, nm
from effllm.solvers.moments import Moments, of_inputs
from effllm.solvers.nm import layerwise
from effllm.solvers.nm.masks import row_loss
from effllm.solvers.statistics import Statistics, Stop

RESULTS = Path(__file__).parent / "results" / "nm_quality.json"
METHODS = ("magnitude", "wanda", "sparsegpt", "dsnot", "armor")
_KEYS = ("pattern", "method", "rounds", "damp", "permute", "ratios", "calibration_tokens")
_BEFORE = {"permute": "none", "ratios": "uniform"}  # of rows from before these could be chosen
Solver = Callable[[Tensor, Moments, int, int], Tensor]


def _dsnot(w: Tensor, x: Moments, n: int, m: int, guard: bool = True) -> Tensor:
    score = nm.wanda(w, x)
    return w * nm.dsnot(w, x, nm.nm_mask(score, n, m), score, pattern=(n, m), guard=guard)


def solvers(block: int, rounds: int, damp: float) -> dict[str, Solver]:
    """Every row by name: (w, moments, n, m) to the new dense weight."""
    return {
        "wanda": lambda w, x, n, m: w * nm.nm_mask(nm.wanda(w, x), n, m),
        "nowag": lambda w, x, n, m: w * nm.nm_mask(nm.nowag(w, x), n, m),
        "sparsegpt": lambda w, x, n, m: nm.sparsegpt(w, x, n, m, damp=damp).weight,
        "sparsegpt-sorted": lambda w, x, n, m: nm.sparsegpt(w, x, n, m, sort=True, damp=damp).weight,
        "dsnot": _dsnot,
        "dsnot-unguarded": lambda w, x, n, m: _dsnot(w, x, n, m, guard=False),
        "armor": lambda w, x, n, m: nm.armor(w, x, n, m, block=block, rounds=rounds, damp=damp).dense(),
        "armor-diagonal": lambda w, x, n, m: nm.armor(w, x, n, m, block=block, rounds=rounds, metric="diagonal").dense(),
    }


def stages(block: nn.Module, call: blocks.Call) -> list[list[str]]:
    """The block's linears by shared input, in order of execution."""
    own = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    with Statistics(own) as probe:
        block(*call.args, **call.kwargs)
    return probe.stages()


def inputs(block: nn.Module, name: str, calls: list[blocks.Call]) -> Tensor:
    """Inputs (tokens, K) of one linear over all calls."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].flatten(0, -2).clone())
        raise Stop

    handle = block.get_submodule(name).register_forward_pre_hook(see)
    for call in calls:
        with contextlib.suppress(Stop):
            block(*call.args, **call.kwargs)
    handle.remove()
    return torch.cat(seen)


def outputs(block: nn.Module, calls: list[blocks.Call]) -> list[Tensor]:
    """The block's hidden states."""
    found = [blocks.hidden(block(*call.args, **call.kwargs)) for call in calls]
    return [state for state in found if state is not None]


@torch.no_grad()
def solve(model: nn.Module, calibration: Tensor, solver: Solver, keeps: dict[str, int], m: int, *, to_output: bool) -> tuple[float, float]:
    """Solve every linear of the decoder layers in place, keeps[name] of every m; (seconds in the solver, mean relative proxy loss)."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    found = blocks.chain(model, layers, blocks.batches(calibration))
    assert found is not None
    # the same calls with the dense model's states, where a solver aims at its outputs
    twins = [[blocks.Call(list(c.args), dict(c.kwargs)) for c in calls] for calls in found.calls] if to_output else None
    seconds, losses = 0.0, list[float]()
    for i, (layer, calls) in enumerate(zip(layers, found.calls, strict=True)):
        original = copy.deepcopy(layer)
        for names in stages(layer, calls[0]):
            x = inputs(layer, names[0], calls)
            moments = of_inputs(x, None if twins is None else inputs(original, names[0], twins[i]))
            for name in names:
                weight = layer.get_submodule(name).weight
                start = time.perf_counter()
                n = keeps[f"model.layers.{i}.{name}"]
                new = weight.clone() if n == m else solver(nm.target(weight, moments), moments, n, m)
                seconds += time.perf_counter() - start
                losses.append(float(row_loss(weight, new, moments.hessian).sum() / row_loss(weight, torch.zeros_like(weight), moments.hessian).sum()))
                weight.copy_(new)
        if i + 1 < len(layers):
            for call, state in zip(found.calls[i + 1], outputs(layer, calls), strict=True):
                call.put(found.place, state)
            if twins is not None:
                for call, state in zip(twins[i + 1], outputs(original, twins[i]), strict=True):
                    call.put(found.place, state)
    return seconds, sum(losses) / len(losses)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder layers' linears."""
    return {n: x for n, x in model.named_modules() if isinstance(x, nn.Linear) and n.startswith("model.layers.")}


def prepared(model: nn.Module, calibration: Tensor, n: int, m: int, permute: str, ratios: str) -> tuple[dict[str, int], dict[str, Any]]:
    """n of every linear, channels reordered; and what to say of both."""
    own, about = linears(model), dict[str, Any]()
    keeps = dict.fromkeys(own, n)
    if ratios != "uniform":
        keeps, about["patterns"] = layerwise.per_module(model, own, n, m, ratios, calibration)
    if permute != "none":
        moved = reorder(model, {k: (x, NM(pattern=f"{keeps[k]}:{m}", permute=permute)) for k, x in own.items() if keeps[k] < m}, calibration)
        kept = [d.config for d in moved.decisions if d.action == "applied"]
        about |= {"moved": len(kept), "energy_before": sum(c["before"] for c in kept) / len(kept), "energy_after": sum(c["after"] for c in kept) / len(kept)}
    return keeps, about


def by_recipe(recipe: str, calibration: Tensor, windows: Tensor) -> dict[str, Any]:
    """One row through effllm.compress."""
    dense, _ = load_demo(torch.bfloat16)
    base = perplexity(dense, windows)
    start = time.perf_counter()
    report = effllm.compress(dense, recipe, calibration)
    seconds, value = time.perf_counter() - start, perplexity(dense, windows)
    packed = sum(d.bytes_after for d in report.applied) / max(1, sum(d.bytes_before for d in report.applied))
    row = {"pattern": "", "method": recipe, "perplexity": value, "ratio": value / base, "log_ratio": math.log(value / base), "bytes_of_dense": packed}
    return row | {"compress_seconds": seconds, "calibration_tokens": calibration.numel(), "tokens": windows.numel(), "dense_perplexity": base}


@torch.no_grad()
def data_free(model: nn.Module, keeps: dict[str, int], m: int) -> float:
    """Magnitude masks on every linear of the decoder layers, in place; seconds."""
    start = time.perf_counter()
    for name, module in linears(model).items():
        module.weight.mul_(nm.nm_mask(nm.magnitude(module.weight), keeps[name], m))
    return time.perf_counter() - start


def rows(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the rows that are asked for."""
    dense, tokenizer = load_demo(torch.float32)
    source = texts.evaluation_text(a.texts)
    windows = texts.windows(tokenizer, source.text, 512, a.windows)
    calibration = texts.windows(tokenizer, texts.calibration_text(a.texts).text, 512, a.calibration)
    if a.recipe:
        yield by_recipe(a.recipe, calibration, windows)
        return
    base = perplexity(dense, windows)
    table = solvers(a.block, a.rounds, a.damp)
    for pattern in a.patterns.split(","):
        n, m = map(int, pattern.split(":"))
        for entry in a.methods.split(","):
            method, _, aim = entry.partition("@")
            model = copy.deepcopy(dense)
            keeps, about = prepared(model, calibration, n, m, a.permute, a.ratios)
            if method == "magnitude":  # needs no statistics
                seconds, proxy = data_free(model, keeps, m), None
            else:
                seconds, proxy = solve(model, calibration, table[method], keeps, m, to_output=aim == "output")
            value = perplexity(model, windows)
            row = {"pattern": pattern, "method": entry, "perplexity": value, "ratio": value / base, "log_ratio": math.log(value / base), "proxy": proxy}
            row |= {"solve_seconds": seconds, "calibration_tokens": calibration.numel(), "tokens": windows.numel(), "text": source.name, "damp": a.damp}
            row |= {"permute": a.permute, "ratios": a.ratios, **about}
            yield row | ({"block": a.block, "rounds": a.rounds} if method.startswith("armor") else {}) | {"dense_perplexity": base}


def main() -> None:
    """Print each row and keep it in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", metavar="WHEEL")
    parser.add_argument("--patterns", default="2:4,4:8,6:8")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens that are scored")
    parser.add_argument("--calibration", type=int, default=16, help="windows of 512 tokens that calibrate")
    parser.add_argument("--block", type=int, default=64, help="block of ARMOR's wrappers")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of ARMOR's descent")
    parser.add_argument("--damp", type=float, default=0.01, help="share of H's mean diagonal that SparseGPT and ARMOR add to it")
    parser.add_argument("--permute", default="none", help="none, inner or all")
    parser.add_argument("--ratios", default="uniform", help="uniform, farms, essential or knee")
    parser.add_argument("--recipe", help="a recipe for effllm.compress")
    a = parser.parse_args()
    for row in rows(a):
        print("  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        old = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
        keep = [r for r in old if any((_BEFORE | r).get(k) != (_BEFORE | row).get(k) for k in _KEYS)]
        RESULTS.write_text(json.dumps({"machine": describe(), "rows": [*keep, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
