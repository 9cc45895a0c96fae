"""Saved packed models: flat safetensors names, a JSON header (`header.py`), a hash per tensor. No pickle anywhere.

    model.layers.0.self_attn.q_proj.weight.planes     canonical layout of the format, whatever kernel the weight served
    model.layers.0.self_attn.q_proj.weight.scale
    model.layers.0.input_layernorm.weight             tensors that were not packed, as they are
    model.rotary_emb.inv_freq                         buffers outside of the state dict too, so that nothing is computed at load

Loading builds the model on the meta device and puts the stored tensors in: the dense weights never exist.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effllm
from effllm.errors import CheckpointError, nearest
from effllm.runtime import formats, host, recorded, shards
from effllm.runtime import weights as kinds
from effllm.runtime.activated import ThresholdedActivation
from effllm.runtime.atomic import staged_directory
from effllm.runtime.dense import is_transposed, matrix
from effllm.runtime.formats import parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.header import NAME, VERSION, read_header, seal
from effllm.runtime.inventory import Inventory
from effllm.runtime.packed import PackedEmbedding, PackedLinear, PackedWeight

SHARD_BYTES = 2 * 10**9
Bits = int | Mapping[str, int] | None


def save(model: nn.Module, directory: str | Path, *, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a model to `directory`, with config, generation config and tokenizer where it comes from transformers.

    The directory appears whole or not at all; an older effllm checkpoint there stays valid until then, and files in it that
    are not part of the checkpoint are kept. The tokenizer is `tokenizer`, or the files beside the weights the model was
    loaded from. Holds one weight beside the model. Raises CheckpointError: E-CKP-WRITE (cannot be written, or the target
    holds something else), E-CKP-MODULE (a packed weight outside of a packed module).
    """
    target = Path(directory).absolute()
    old = _old_content(target)
    inventory = Inventory(model)
    try:
        with staged_directory(target) as folder:
            files, records = shards.write(folder, inventory.units, shard_bytes)
            header = {"header_version": VERSION, "effllm": effllm.__version__, "files": files, "tensors": records} | inventory.tables()
            made_with = recorded.recorded(model)
            header |= {} if made_with is None else {"recipe": made_with}
            (folder / NAME).write_text(json.dumps(header | {"sha256": seal(header)}, indent=1))
            if "transformers" in sys.modules:
                from effllm.hf import sidecar

                sidecar.write(model, folder, tokenizer)
            for path in old:
                if not (folder / path.name).exists():
                    _copy(path, folder)
    except OSError as error:
        raise CheckpointError("E-CKP-WRITE", f"cannot write to {target}: {error}", "give a directory that can be written, on a disk with room") from error
    return target


def load(
    directory: str | Path,
    bits: Bits = None,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    *,
    verify: bool = True,
    kernel: str | None = None,
) -> Any:
    """The model that `save` wrote, in eval mode; with the same kernels its logits are the same bit for bit.

    `bits` lowers every weight that has more bits (an int), or those of the modules that a glob matches (a dict of glob to
    bits, first match wins): only the first planes are read. `model` is a skeleton, best on the meta device, for directories
    without a Hugging Face config; its Linear and Embedding modules are replaced, and only after everything was read.
    `verify` compares each tensor with its hash. Raises CheckpointError (E-CKP-*).
    """
    folder = Path(directory)
    header = read_header(folder, verify)
    wanted = _bits(header, bits)
    skeleton = _skeleton(folder) if model is None else model
    _wrap(skeleton, header)
    _check_fit(skeleton, header)
    weights, plain = _read(folder, header, wanted, device, verify, kernel)
    _install(skeleton, header, weights, plain)
    name = header.get("recipe")
    recorded.record(skeleton, recorded.lowered(name if isinstance(name, str) else None, bits if wanted else None))
    del plain
    host.release_memory()
    return skeleton.eval()


def _read(
    folder: Path, header: dict[str, Any], wanted: dict[str, int], device: str | torch.device, verify: bool, kernel: str | None
) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """Packed weights as kernels read them, and the other tensors, by name."""
    reader = shards.Reader(folder, header["tensors"], verify)
    weights = {}
    for name, entry in header["weights"].items():
        packed = _read_weight(reader, name, entry, wanted.get(name)).to(device)
        weights[name] = kinds.make(packed, act=entry["act"], dtype=getattr(torch, entry["dtype"]), kernel=kernel)
    return weights, {name: reader.read(name).to(device) for name in header["plain"] if name not in header["ties"]}


def _wrap(skeleton: nn.Module, header: dict[str, Any]) -> None:
    """Give the activations that had thresholds a place for them."""
    for name, gate in header.get("gates", {}).items():
        try:
            inner = skeleton.get_submodule(name)
        except AttributeError:
            raise CheckpointError("E-CKP-MODEL", f"the model has no activation {name}", "give the model it was saved from") from None
        if not isinstance(inner, ThresholdedActivation):
            about = {key: gate.get(key, default) for key, default in (("method", ""), ("target", 0.0), ("realised", 0.0))}
            skeleton.set_submodule(name, ThresholdedActivation(inner, torch.empty(gate["size"], device="meta"), gate["limit"], **about))


def _old_content(target: Path) -> list[Path]:
    """Files of an older checkpoint that a new one keeps; refuses a target that is something else."""
    try:
        if not target.exists():
            return []
        content = sorted(target.iterdir())
    except OSError as error:
        raise CheckpointError("E-CKP-WRITE", f"cannot write to {target}: {error}", "give a directory") from error
    if content and not (target / NAME).is_file():
        raise CheckpointError("E-CKP-WRITE", f"{target} exists and is not an effllm checkpoint", "give a new or empty directory")
    return [p for p in content if p.name != NAME and not (p.name.startswith("effllm-") and p.suffix == ".safetensors")]


def _copy(path: Path, folder: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.copytree(path, folder / path.name)
    else:
        shutil.copy2(path, folder / path.name)


def _skeleton(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise CheckpointError("E-CKP-MODEL", f"{folder} has no config.json to build the model from", "pass model=, a skeleton on the meta device")
    from effllm.hf.skeleton import empty_model

    made: nn.Module = empty_model(folder)
    return made


def _bits(header: dict[str, Any], bits: Bits) -> dict[str, int]:
    """Bits to read of each weight that is to be lowered."""
    if bits is None:
        return {}
    rules = dict(bits) if isinstance(bits, Mapping) else {"*": bits}
    users = {name: m["weight"] for name, m in header["modules"].items()}
    wanted: dict[str, int] = {}
    for pattern, value in rules.items():
        if type(value) is not int or not 1 <= value <= 8:
            raise CheckpointError("E-CKP-BITS", f"bits={value!r} for {pattern!r}", "bits is a whole number from 1 to 8")
        hit = [weight for name, weight in users.items() if fnmatch.fnmatchcase(name, pattern)]
        if not hit and users:
            raise CheckpointError("E-CKP-BITS", f"no packed module matches {pattern!r}", nearest(pattern, users))
        for weight in hit:
            wanted.setdefault(weight, value)
    return {name: value for name, value in wanted.items() if value < parts.precision(header["weights"][name]["attrs"]) < 16}


def _read_weight(reader: shards.Reader, name: str, entry: dict[str, Any], bits: int | None) -> Packed:
    kind = formats.get(entry["format"])
    tensors = {key: reader.read(f"{name}.{key}", _planes(entry["attrs"], key, bits)) for key in entry["tensors"]}
    n, k = entry["shape"]
    packed = Packed(kind.name, entry["version"], (n, k), tensors, dict(entry["attrs"]))
    return packed if bits is None else parts.truncate(packed, bits)


def _planes(attrs: dict[str, Any], key: str, bits: int | None) -> int | None:
    """How many bit planes of a tensor to read; None for the whole of it."""
    if bits is None or key.rpartition(".")[2] != "planes":
        return None
    return min(bits, parts.part_bits(attrs, key))


def _check_fit(skeleton: nn.Module, header: dict[str, Any]) -> None:
    """Every tensor of the skeleton is stored, and every stored one has its place, with the same shape."""
    have: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in skeleton.named_parameters(remove_duplicate=False)}
    have |= {n: tuple(t.shape) for n, t in skeleton.named_buffers(remove_duplicate=False)}
    for name, part in skeleton.named_modules(remove_duplicate=False):
        if isinstance(part, PackedWeight):  # a skeleton that is packed itself
            for leaf in (*part._parameters, *part._buffers):
                have.pop(f"{name}.{leaf}", None)
            have[name] = part.shape
        elif name in header["modules"] and is_transposed(part):
            have[f"{name}.weight"] = tuple(matrix(part).shape)
    for name in header["modules"]:  # a solver may have given a linear a bias that the dense one has not (AFM)
        bias = header["ties"].get(f"{name}.bias", f"{name}.bias")
        if f"{name}.bias" in header["plain"] and f"{name}.bias" not in have:
            have[f"{name}.bias"] = tuple(header["tensors"][bias]["shape"])
    want = {f"{name}.weight": tuple(header["weights"][m["weight"]]["shape"]) for name, m in header["modules"].items()}
    for name, role in header["plain"].items():
        if role != "temporary" or name in have:  # another version of the model's code may do without a temporary buffer
            want[name] = tuple(header["tensors"][header["ties"].get(name, name)]["shape"])
    missing, extra = sorted(have.keys() - want.keys()), sorted(want.keys() - have.keys())
    if missing:
        raise CheckpointError("E-CKP-MISSING", f"the checkpoint lacks {', '.join(missing[:4])} ({len(missing)} in all)", "give the model it was saved from")
    if extra:
        raise CheckpointError("E-CKP-MODEL", f"the model has no place for {', '.join(extra[:4])} ({len(extra)} in all)", "give the model it was saved from")
    for name, shape in want.items():
        if have[name] != shape:
            raise CheckpointError("E-CKP-MODEL", f"{name} is {shape} in the checkpoint, {have[name]} in the model", "give the model it was saved from")


def _install(skeleton: nn.Module, header: dict[str, Any], weights: dict[str, PackedWeight], plain: dict[str, Tensor]) -> None:
    for name, module in header["modules"].items():
        weight = weights[module["weight"]]
        # its bias, if it has one, follows with the other plain tensors
        bias = plain.get(header["ties"].get(f"{name}.bias", f"{name}.bias"))
        made = PackedEmbedding(weight, module["padding_idx"]) if module["kind"] == "embedding" else PackedLinear(weight, bias)
        skeleton.set_submodule(name, made)
    made_of: dict[str, Tensor] = {}
    for name, role in header["plain"].items():
        owner_name, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(owner_name)
        if role == "temporary" and not hasattr(owner, leaf):
            continue
        stored = header["ties"].get(name, name)
        if role == "parameter" and stored not in made_of:
            made_of[stored] = nn.Parameter(plain[stored], requires_grad=False)
        setattr(owner, leaf, made_of.get(stored, plain[stored]))
