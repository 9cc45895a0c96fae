"""safetensors files written tensor by tensor and read with their hashes checked.

Writing streams: only one unit (the tensors of one weight) is in memory beside the model. Within a file, tensors lie in order
of falling element size, so that each is aligned. Hashes are sha256 over the raw bytes; a bit-plane tensor has one per plane,
so that a reader of the first planes can check what it read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime import host

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAPPED = 8 << 20  # bytes of a file to read before it is mapped anew: pages that were read count as this process's memory until then
DAMAGED = "copy the checkpoint again, or write it again with effllm.save"
_LENGTH = 8  # bytes of the header length at the start of a safetensors file


@dataclass(frozen=True)
class Spec:
    """A tensor to be written. `sliced`: one hash per entry of the first dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sliced: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together: their specs, and a function that returns them by name."""

    specs: tuple[Spec, ...]
    make: Callable[[], dict[str, Tensor]]


def raw(t: Tensor) -> Any:
    """The bytes of a CPU tensor in row-major order, as a buffer."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(t: Tensor, sliced: bool) -> str | list[str]:
    """sha256 of a tensor's bytes, or one per entry of the first dimension."""
    return [hashlib.sha256(raw(part)).hexdigest() for part in t] if sliced else hashlib.sha256(raw(t)).hexdigest()


def write(folder: Path, units: Sequence[Unit], limit: int) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Write all units to files of about `limit` bytes. Returns file sizes, and the record of each tensor by name."""
    parts: list[list[Unit]] = []
    size = 0
    for unit in units:
        own = sum(s.nbytes for s in unit.specs)
        if not parts or size + own > limit:
            parts.append([])
            size = 0
        parts[-1].append(unit)
        size += own
    files: dict[str, int] = {}
    records: dict[str, dict[str, Any]] = {}
    for i, part in enumerate(parts):
        path = folder / f"effllm-{i + 1:05d}.safetensors"
        records.update(_write_one(path, part))
        files[path.name] = path.stat().st_size
    return files, records


def _write_one(path: Path, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    specs = sorted((s for u in units for s in u.specs), key=lambda s: -s.dtype.itemsize)
    header: dict[str, Any] = {}
    end = 0
    for s in specs:
        header[s.name] = {"dtype": CODES[s.dtype], "shape": list(s.shape), "data_offsets": [end, end + s.nbytes]}
        end += s.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    records: dict[str, dict[str, Any]] = {}
    with path.open("wb") as out:
        out.write(len(text).to_bytes(_LENGTH, "little") + text)
        for unit in units:
            made = unit.make()
            for s in unit.specs:
                t = made[s.name].cpu()
                if t.dtype != s.dtype or tuple(t.shape) != s.shape:
                    raise CheckpointError("E-CKP-WRITE", f"{s.name} changed while it was saved", "do not change the model during a save")
                out.seek(_LENGTH + len(text) + header[s.name]["data_offsets"][0])
                out.write(raw(t))
                records[s.name] = {"file": path.name, "dtype": CODES[s.dtype], "shape": list(s.shape), "sha256": digest(t, s.sliced)}
        out.truncate(_LENGTH + len(text) + end)
        out.flush()
        os.fsync(out.fileno())
    return records


def read_layout(path: Path) -> dict[str, dict[str, Any]]:
    """The table of a safetensors file, checked against the file's size; no tensor is read. Raises CheckpointError."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > size - _LENGTH:
                raise CheckpointError("E-CKP-TRUNCATED", f"{path.name} ends inside its header", DAMAGED)
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError("E-CKP-HASH", f"the header of {path.name} is damaged: {error}", DAMAGED) from error
    if _LENGTH + length + end > size:
        raise CheckpointError("E-CKP-TRUNCATED", f"{path.name} has {size} bytes, its tensors need {_LENGTH + length + end}", DAMAGED)
    return dict(table)


class Reader:
    """Tensors of a checkpoint whose header has been checked. `verify` compares every read tensor with its hash."""

    def __init__(self, folder: Path, records: dict[str, dict[str, Any]], verify: bool) -> None:
        self.folder, self.records, self.verify = folder, records, verify
        self._open: dict[str, Any] = {}
        self._seen = 0  # bytes of the mapped files that were read since they were opened

    def read(self, name: str, first: int | None = None) -> Tensor:
        """A tensor, or its first `first` entries along dimension 0 (only those are read). Raises CheckpointError."""
        from safetensors import SafetensorError, safe_open

        record = self.records[name]
        try:
            if self._seen > _MAPPED:
                self._open.clear()
                self._seen = 0
                host.release_memory()
            if record["file"] not in self._open:
                self._open[record["file"]] = safe_open(self.folder / record["file"], framework="pt")
            file = self._open[record["file"]]
            view: Tensor = file.get_tensor(name) if first is None else file.get_slice(name)[:first]
            # a copy, because views of the mapped file would tie the model to it; of bytes, because copying bool mends damaged ones
            self._seen += view.nbytes
            t = view.contiguous().reshape(-1).view(torch.uint8).clone().view(view.dtype).reshape(view.shape)
        except (OSError, SafetensorError) as error:
            raise CheckpointError("E-CKP-HASH", f"{name} cannot be read from {record['file']}: {error}", DAMAGED) from error
        if self.verify:
            want = record["sha256"]
            if digest(t, isinstance(want, list)) != (want if first is None or not isinstance(want, list) else want[:first]):
                raise CheckpointError("E-CKP-HASH", f"the content of {name} in {record['file']} is not what was saved", DAMAGED)
        return t
