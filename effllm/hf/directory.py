"""Compress a local Hugging Face directory shard by shard: the dense model never exists as a whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from effllm import compat
from effllm.compression import Progress, Site, Swap, decision, one_thread, plan, require
from effllm.errors import CheckpointError, EffllmError
from effllm.hf.skeleton import empty_model
from effllm.hf.streaming import Resident, capture
from effllm.recipe import Recipe
from effllm.report import PassReport, Report
from effllm.runtime import header
from effllm.runtime.dense import is_transposed
from effllm.runtime.formats.base import Packed
from effllm.runtime.host import release_memory
from effllm.runtime.recorded import record
from effllm.solvers import blocks, solve
from effllm.solvers.calibrate import calibrated


class DenseReader:
    """Reads single tensors of a directory of safetensors shards."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        try:
            if index.is_file():
                names = json.loads(index.read_text())["weight_map"]
                self._where = {k: directory / v for k, v in names.items()}
            elif single.is_file():
                with safe_open(single, "pt") as f:
                    self._where = dict.fromkeys(f.keys(), single)
            else:
                raise CheckpointError("E-CKP-NONE", f"{directory} has no model.safetensors", "give a directory written by save_pretrained")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError("E-CKP-TRUNCATED", f"{directory} cannot be read: {error}", "fetch the model again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """One tensor; raises CheckpointError where it is missing or damaged."""
        if name not in self._where:
            step = "the checkpoint's names differ from the model's; load it with transformers and pass the module"
            raise CheckpointError("E-CKP-MISSING", f"no tensor {name!r} in the directory", step)
        try:
            with safe_open(self._where[name], "pt") as f:
                tensor: Tensor = f.get_tensor(name)
                return tensor.clone()  # what is read is a view that would keep the whole file mapped, as long as one norm of it lives
        except (OSError, SafetensorError) as error:
            raise CheckpointError("E-CKP-TRUNCATED", f"{name} cannot be read: {error}", "fetch the model again") from error


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names by the first name of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return {names[0]: names for names in groups.values()}


def compress_directory(directory: Path, recipe: Recipe, calibration: Any, *, strict: bool, progress: Progress | None) -> tuple[nn.Module, Report]:
    """See effllm.compress. Peak memory: the packed model plus two dense layers; with calibration see `streaming`.

    Where calibration cannot go block by block the dense model is loaded whole, and the report's notes say why.
    """
    if (directory / header.NAME).is_file():
        step = "read it with effllm.load(directory, bits=...), or give the dense model's directory"
        raise CheckpointError("E-CKP-PACKED", f"{directory} is packed already", step)
    if not (directory / "config.json").is_file():
        raise CheckpointError("E-CKP-NONE", f"{directory} is no Hugging Face directory (no config.json)", "give a directory written by save_pretrained")
    start = time.perf_counter()
    reader = DenseReader(directory)
    model = empty_model(directory, tables=True)
    sites, kept = plan(model, recipe)
    require(sites, kept, strict)
    aliases = tied_names(model)
    dtype = getattr(model.config, "dtype", None) or torch.float32
    source = {alias: next((n for n in names if n in reader), names[0]) for names in aliases.values() for alias in names}
    swap, report, notes = Swap(model), PassReport("compress", kept), list[str]()

    def finish(site: Site, packed: Packed | None) -> None:
        meta = site.module.weight
        weight = swap.install(site, packed)
        weight.dtype = dtype
        report.decisions.append(decision(site, meta.numel() * dtype.itemsize, weight, tied=packed is None))
        if progress is not None:
            progress(len(report.decisions) - len(kept), len(sites), site.name)
        release_memory()

    left = sites
    if any(s.params.needs_model for s in sites):
        reason = "the recipe looks at all layers before it packs the first one"
        return _whole(model, reader, source, dtype, recipe, calibration, reason, strict=strict, progress=progress)
    if calibration is not None:
        model.eval()
        fill_buffers(model, reader)
        covered = {s.name: s for s in sites if s.kind == "linear" and s.params.calibrates}
        reason = _calibrate(model, reader, source, dtype, sites, covered, calibration, finish)
        if reason:
            return _whole(model, reader, source, dtype, recipe, calibration, reason, strict=strict, progress=progress)
        notes.append("calibrated block by block: the dense model was never in memory as a whole")
        if slow := compat.slow_dtype(dtype, torch.device("cpu")):
            notes.append(slow)
        left = [s for s in sites if s.name not in covered]
    for site in sorted(left, key=lambda s: s.kind != "linear"):
        tied = swap.shared(site) is not None
        packed = None
        if not tied:
            dense = reader.read(source[f"{site.name}.weight"]).to(dtype)
            if is_transposed(site.module):
                dense = dense.t().contiguous()
            try:
                with one_thread():
                    packed = solve(dense, site.params)
            except EffllmError as error:
                raise type(error)(error.code, f"{site.name}: {error.cause}", error.next_step) from None
            del dense
        if site.kind == "linear" and site.module.bias is not None:
            site.module.bias = nn.Parameter(reader.read(source[f"{site.name}.bias"]).to(dtype), requires_grad=False)
        finish(site, packed)
    swap.commit()
    fill(model, reader, source, dtype)
    record(model, recipe.name)
    report.seconds = time.perf_counter() - start
    return model.eval(), Report(recipe.name, [report], notes=notes)


def _whole(
    model: nn.Module, reader: DenseReader, source: dict[str, str], dtype: torch.dtype, recipe: Recipe, calibration: Any, reason: str,
    *, strict: bool, progress: Progress | None,
) -> tuple[nn.Module, Report]:  # fmt: skip
    """Load the dense model and pack it in memory."""
    from effllm.compression import compress

    fill(model, reader, source, dtype)
    report = compress(model, recipe, calibration, strict=strict, progress=progress)
    report.notes.insert(0, f"the dense model was loaded whole: {reason}")
    return model, report


def _calibrate(
    model: nn.Module, reader: DenseReader, source: dict[str, str], dtype: torch.dtype, sites: list[Site], covered: dict[str, Site],
    calibration: Any, finish: Callable[[Site, Packed | None], None],
) -> str:  # fmt: skip
    """Solve and finish the covered sites block by block; or the reason why not, with nothing done."""
    lists = blocks.lists(model, covered)
    if len(lists) != 1:
        return f"it has {len(lists)} lists of blocks, one is needed"
    prefix, members = next(iter(lists.items()))
    other = next((s.name for s in sites if s.name.startswith(f"{prefix}.") and s.name not in covered), None)
    if other is not None:
        return f"{other} inside of a block is packed without calibration"
    resident = Resident(model, reader, source, dtype, prefix)
    found = capture(model, members, blocks.batches(calibration), resident)
    if isinstance(found, str):
        return found
    linears = {name: (s.module, s.params) for name, s in covered.items()}
    aims = any(s.params.aims_at_dense for s in covered.values())
    calibrated(model, calibration, linears, lambda name, packed: finish(covered[name], packed), chains={prefix: found}, around=resident.around, targets=aims)
    return ""


def fill(model: nn.Module, reader: DenseReader, source: dict[str, str], dtype: torch.dtype) -> None:
    """Load what was not packed. Persistent buffers come from the file where it has them."""
    loaded: dict[int, nn.Parameter] = {}  # tied parameters stay one tensor
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        if p.device.type == "meta" or source.get(name, name) in reader:
            if id(p) not in loaded:
                loaded[id(p)] = nn.Parameter(reader.read(source.get(name, name)).to(dtype), requires_grad=False)
            _set(model, name, loaded[id(p)])
    fill_buffers(model, reader)


def fill_buffers(model: nn.Module, reader: DenseReader) -> None:
    """Load the buffers that the file has; the others were computed when the model was built."""
    for name, b in list(model.named_buffers()):
        if name in reader:
            _set(model, name, reader.read(name))
        elif b.device.type == "meta":
            step = "load the model with transformers and pass the module"
            raise CheckpointError("E-CKP-MISSING", f"buffer {name!r} is not in the file and was not computed", step)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(value, nn.Parameter):
        parent.register_parameter(leaf, value)
    else:
        parent.register_buffer(leaf, value, persistent=leaf not in parent._non_persistent_buffers_set)


__all__ = ["DenseReader", "Site", "compress_directory"]
