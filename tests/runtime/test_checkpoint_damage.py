"""Every kind of damage to a real checkpoint has its error, and leaves the model that was passed as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effllm.errors import CheckpointError
from effllm.runtime.checkpoint import load, save
from effllm.runtime.header import NAME
from tests.runtime.checkpoints import edit_header, skeleton, small

SHARD = "effllm-00001.safetensors"
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(small(), tmp_path / "m")


def code_of(folder: Path, **options: Any) -> str:
    """The code of the error that loading raises; the skeleton must come out untouched."""
    model = skeleton()
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    with pytest.raises(CheckpointError) as caught:
        load(folder, model=model, **options)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert caught.value.next_step and caught.value.cause
    return caught.value.code


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_no_checkpoint(tmp_path: Path) -> None:
    assert code_of(tmp_path) == "E-CKP-NONE"
    assert code_of(tmp_path / "absent") == "E-CKP-NONE"


def test_missing_file(folder: Path) -> None:
    (folder / SHARD).unlink()
    assert code_of(folder) == "E-CKP-MISSING"


@pytest.mark.parametrize("name", ["proj.weight.planes", "norm.bias"])
def test_missing_tensor(folder: Path, name: str) -> None:
    edit_header(folder, lambda h: h["tensors"].pop(name))
    assert code_of(folder) == "E-CKP-MISSING"


def test_tensor_missing_in_the_file(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes().replace(b'"norm.bias"', b'"norm.bulk"'))
    assert code_of(folder) == "E-CKP-MISSING"


def test_tensor_that_the_model_needs_is_missing(folder: Path) -> None:
    edit_header(folder, lambda h: (h["tensors"].pop("norm.bias"), h["plain"].pop("norm.bias")))
    assert code_of(folder) == "E-CKP-MISSING"


@pytest.mark.parametrize("keep", [0, 5, 40, -1, -3000])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:keep])
    assert code_of(folder) == "E-CKP-TRUNCATED"
    size = path.stat().st_size
    edit_header(folder, lambda h: h["files"].update({SHARD: size}))
    assert code_of(folder) in ("E-CKP-TRUNCATED", "E-CKP-HASH"), "also when the header was made to agree"


def test_truncated_header(folder: Path) -> None:
    text = (folder / NAME).read_text()
    for keep in (0, 1, len(text) // 2, len(text) - 2):
        (folder / NAME).write_text(text[:keep])
        assert code_of(folder) == "E-CKP-TRUNCATED"


def test_one_flipped_bit_anywhere_in_the_data(folder: Path) -> None:
    path = folder / SHARD
    whole = path.read_bytes()
    for at in torch.linspace(data_start(path), len(whole) - 1, 25).long().tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert code_of(folder) == "E-CKP-HASH"
    load(folder, model=skeleton(), verify=False)  # the check is what caught it


def test_a_flip_in_a_plane_that_is_not_read_does_not_matter(folder: Path) -> None:
    path = folder / SHARD
    table = json.loads(path.read_bytes()[8 : data_start(path)])
    last = data_start(path) + table["proj.weight.planes"]["data_offsets"][1] - 1
    whole = path.read_bytes()
    path.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
    assert code_of(folder) == "E-CKP-HASH"
    assert code_of(folder, bits=4) == "E-CKP-HASH"
    load(folder, bits=3, model=skeleton())


def test_swapped_tensors(folder: Path) -> None:
    path = folder / SHARD
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"norm.weight", b"#").replace(b"norm.bias", b"norm.weight").replace(b"#", b"norm.bias"))
    assert code_of(folder) == "E-CKP-HASH"


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["weights"]["embed.weight"]["attrs"].update(grid="symmetric"),
        lambda h: h["modules"]["embed"].update(padding_idx=None),
        lambda h: h["tensors"]["norm.bias"].update(sha256="0" * 64),
    ],
    ids=["grid", "padding", "hash"],
)
def test_altered_header(folder: Path, edit: Edit) -> None:
    edit_header(folder, edit, reseal=False)
    assert code_of(folder) == "E-CKP-HASH"


def test_longer_file(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")
    assert code_of(folder) == "E-CKP-HASH"


@pytest.mark.parametrize("edit", [lambda h: h.update(header_version=2), lambda h: h["weights"]["proj.weight"].update(version=2)], ids=["header", "format"])
def test_newer_version(folder: Path, edit: Edit) -> None:
    edit_header(folder, edit, reseal=False)
    assert code_of(folder) == "E-CKP-NEWER"


def test_unknown_format(folder: Path) -> None:
    edit_header(folder, lambda h: h["weights"]["proj.weight"].update(format="bipolarr"))
    assert code_of(folder) == "E-CKP-FORMAT"


SHAPES = [
    [4, 40, 10**6],
    [2**62, 2**62, 8],
    [-4, 40, 8],
    [4, -40, -8],
    [4, 40, 8.0],
    [True, 40, 8],
    [0, 2**62, 2**62],
    [10**400, 1, 1],
    [4] * 100,
    "4x40x8",
    None,
    [],
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str(s)[:24])
def test_absurd_tensor_shape(folder: Path, shape: Any) -> None:
    edit_header(folder, lambda h: h["tensors"]["proj.weight.planes"].update(shape=shape))
    assert code_of(folder) == "E-CKP-SHAPE"


@pytest.mark.parametrize("shape", [[10**9, 10**9], [2**62, 2**62], [-40, 40], [0, 40], [40], [40, 40, 1], ["40", 40], None], ids=str)
def test_absurd_weight_shape(folder: Path, shape: Any) -> None:
    edit_header(folder, lambda h: h["weights"]["proj.weight"].update(shape=shape))
    assert code_of(folder) == "E-CKP-SHAPE"


@pytest.mark.parametrize("attrs", [{"bits": 3}, {"bits": 10**9}, {"bits": -1}, {"group": 0}, {"group": 31}, {"grid": "integer"}, {"source_bits": 99}], ids=str)
def test_absurd_attributes(folder: Path, attrs: dict[str, Any]) -> None:
    edit_header(folder, lambda h: h["weights"]["proj.weight"]["attrs"].update(attrs))
    assert code_of(folder) == "E-CKP-SHAPE"


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.pop("header_version"),
        lambda h: h.update(tensors=[]),
        lambda h: h["tensors"].update({"norm.bias": 3}),
        lambda h: h["tensors"]["norm.bias"].update(file=["x"]),
        lambda h: h["tensors"]["norm.bias"].update(dtype="Q4_K"),
        lambda h: h["files"].update({"../../etc.safetensors": 4}),
        lambda h: h["weights"].update({"proj.weight": None}),
        lambda h: h["weights"]["proj.weight"].update(act="a4"),
        lambda h: h["weights"]["proj.weight"].update(tensors=[["planes"]]),
        lambda h: h["modules"]["proj"].update(kind="conv"),
        lambda h: h["modules"]["proj"].update(weight={}),
        lambda h: h["plain"].update({"norm.bias": "secret"}),
        lambda h: h["ties"].update({"norm.bias": []}),
    ],
)
def test_another_structure(folder: Path, edit: Edit) -> None:
    edit_header(folder, edit)
    assert code_of(folder) in ("E-CKP-HEADER", "E-CKP-MISSING")


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"header_version": "1"}', '{"header_version": true}'])
def test_json_that_is_no_header(folder: Path, text: str) -> None:
    (folder / NAME).write_text(text)
    assert code_of(folder) == "E-CKP-HEADER"


def test_a_model_of_another_shape_or_without_a_config(folder: Path) -> None:
    edit_header(folder, lambda h: h["weights"]["proj.weight"].update(shape=[40, 39]))  # fits the planes, not the model
    assert code_of(folder) == "E-CKP-MODEL"
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.code == "E-CKP-MODEL"
