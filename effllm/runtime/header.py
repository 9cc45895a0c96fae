"""effllm.json, the header of a checkpoint: what each tensor means. Everything in it is checked before anything is allocated.

header_version  int; a reader refuses newer ones
effllm          version of the writer
modules         name -> kind ("linear" or "embedding"), weight (a key of weights), padding_idx
weights         name -> format, version, shape (N, K), attrs, act, dtype, tensors (the format's tensor names)
plain           name -> role: "parameter", "buffer", or "temporary" for a buffer outside of the state dict
ties            name -> the name under which the same tensor is stored
tensors         name -> file, dtype, shape, sha256 (a list of one hash per bit plane for planes)
files           name -> bytes
gates           name -> limit, size, method, target, realised of an activation function with thresholds; missing where there is none
recipe          the recipe's name as the user wrote it; missing where the model was put together by hand
sha256          of all the above, as JSON with sorted keys and no spaces
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from effllm.errors import CheckpointError
from effllm.runtime import formats
from effllm.runtime.formats.base import Packed
from effllm.runtime.shards import DAMAGED, DTYPES, read_layout

NAME, VERSION = "effllm.json", 1
ROLES = ("parameter", "buffer", "temporary")
FLOATS = ("float32", "float16", "bfloat16", "float64")
_TABLES = ("modules", "weights", "plain", "ties", "tensors", "files")


def seal(header: dict[str, Any]) -> str:
    """The hash of a header, its own hash left out."""
    rest = {k: v for k, v in header.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _bad(cause: str, code: str = "E-CKP-HEADER") -> CheckpointError:
    return CheckpointError(code, cause, DAMAGED)


def read_header(folder: Path, verify: bool = True) -> dict[str, Any]:
    """The checked header of a checkpoint. Raises CheckpointError (E-CKP-*) for anything that could not be loaded."""
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError("E-CKP-NONE", f"{folder} is not an effllm checkpoint: it has no {NAME}", "give a directory that effllm.save wrote")
    try:
        header = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _bad(f"{NAME} cannot be read: {error}", "E-CKP-TRUNCATED") from error
    if not isinstance(header, dict) or type(header.get("header_version")) is not int:
        raise _bad(f"{NAME} has no header_version")
    if header["header_version"] > VERSION:
        raise _newer(f"the checkpoint has header version {header['header_version']}, this effllm reads up to {VERSION}")
    for key in _TABLES:
        if not isinstance(header.get(key), dict):
            raise _bad(f"{NAME} has no table {key!r}")
    for name, weight in header["weights"].items():
        if isinstance(weight, dict) and type(weight.get("version")) is int and weight["version"] > formats.get(str(weight.get("format"))).version:
            raise _newer(f"{name} has version {weight['version']} of the format {weight['format']}")
    try:
        _check_files(folder, header)
        for name, weight in header["weights"].items():
            _check_weight(name, weight, header["tensors"])
        _check_names(header)
    except (TypeError, KeyError, IndexError, AttributeError) as error:  # a list or a number where the header has a name or a table
        raise _bad(f"{NAME} or a table in it has another structure: {error!r}") from error
    if verify and header.get("sha256") != seal(header):
        raise _bad(f"{NAME} was changed after it was written", "E-CKP-HASH")
    return header


def _newer(cause: str) -> CheckpointError:
    return CheckpointError("E-CKP-NEWER", cause, "install a newer effllm")


def _check_files(folder: Path, header: dict[str, Any]) -> None:
    """Files are there and whole; every tensor has the same dtype and shape here and there, and fits its file."""
    layouts: dict[str, dict[str, Any]] = {}
    for file, size in header["files"].items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise _bad(f"{file!r} is no file of this checkpoint")
        if not (folder / file).is_file():
            raise _bad(f"the file {file} is missing", "E-CKP-MISSING")
        have = (folder / file).stat().st_size
        if type(size) is not int or have < size:
            raise _bad(f"{file} has {have} bytes of {size}", "E-CKP-TRUNCATED")
        layouts[file] = read_layout(folder / file)
        if have > size:
            raise _bad(f"{file} has {have} bytes, {size} were written", "E-CKP-HASH")
    for name, record in header["tensors"].items():
        if not isinstance(record, dict) or record.get("file") not in layouts or record.get("dtype") not in DTYPES:
            raise _bad(f"the record of {name} is damaged")
        shape = _shape(name, record.get("shape"))
        entry = layouts[record["file"]].get(name)
        if entry is None:
            raise _bad(f"tensor {name} is missing from {record['file']}", "E-CKP-MISSING")
        start, end = entry["data_offsets"]
        if math.prod(shape) * DTYPES[record["dtype"]].itemsize != end - start or list(shape) != entry.get("shape") or record["dtype"] != entry.get("dtype"):
            raise _bad(f"{name} is {record['dtype']} {list(shape)} by the header, its file has {end - start} bytes for it", "E-CKP-SHAPE")


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
        raise _bad(f"{name} has the shape {str(shape)[:80]}", "E-CKP-SHAPE")
    if math.prod(n or 1 for n in shape) >= 2**62:
        raise _bad(f"{name} has the shape {shape}", "E-CKP-SHAPE")
    return tuple(shape)


def _check_weight(name: str, weight: Any, tensors: dict[str, Any]) -> None:
    if not isinstance(weight, dict) or not isinstance(weight.get("attrs"), dict) or not isinstance(weight.get("tensors"), list):
        raise _bad(f"the record of the weight {name} is damaged")
    if type(weight.get("version")) is not int or weight["version"] < 1 or weight.get("act") not in ("a16", "a8") or weight.get("dtype") not in FLOATS:
        raise _bad(f"the record of the weight {name} is damaged")
    shape = _shape(name, weight.get("shape"))
    if len(shape) != 2 or 0 in shape:
        raise _bad(f"the weight {name} has the shape {shape}", "E-CKP-SHAPE")
    kind = formats.get(str(weight.get("format")))
    own = {}
    for key in weight["tensors"]:
        if not _known(kind, weight["attrs"], key):
            raise _bad(f"{key!r} is no tensor of the format {kind.name}")
        record = tensors.get(f"{name}.{key}")
        if record is None:
            raise _bad(f"{name}.{key} is missing", "E-CKP-MISSING")
        own[key] = torch.empty(record["shape"], dtype=DTYPES[record["dtype"]], device="meta")
    kind.validate(Packed(kind.name, weight["version"], (shape[0], shape[1]), own, weight["attrs"]))


def _known(kind: Any, attrs: dict[str, Any], key: Any) -> bool:
    """Whether a format, or the format of one of its parts, has a tensor of this name."""
    prefix, dot, rest = str(key).partition(".")
    about = attrs.get(prefix)
    if dot and isinstance(about, dict) and prefix in kind.tensor_names:
        return _known(formats.get(str(about.get("format"))), about.get("attrs") or {}, rest)
    return key in kind.tensor_names


def _check_names(header: dict[str, Any]) -> None:
    for name, gate in header.get("gates", {}).items():
        if not isinstance(gate, dict) or type(gate.get("limit")) is not int or type(gate.get("size")) is not int or gate["size"] < 1 or gate["limit"] < -1:
            raise _bad(f"the record of the activation {name} is damaged")
        if f"{name}.threshold" not in header["plain"]:
            raise _bad(f"the activation {name} has no thresholds", "E-CKP-MISSING")
    for name, module in header["modules"].items():
        if not isinstance(module, dict) or module.get("kind") not in ("linear", "embedding") or module.get("weight") not in header["weights"]:
            raise _bad(f"the record of the module {name} is damaged")
    for name, role in header["plain"].items():
        if role not in ROLES or header["ties"].get(name, name) not in header["tensors"]:
            raise _bad(f"{name} has the role {role!r} and no stored tensor", "E-CKP-MISSING" if role in ROLES else "E-CKP-HEADER")
