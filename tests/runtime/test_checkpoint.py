"""Saved models come back equal bit for bit, at their own precision or a lower one, and never as dense weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from effllm.errors import CheckpointError
from effllm.runtime import shards
from effllm.runtime.checkpoint import load, save
from effllm.runtime.formats import bipolar
from effllm.runtime.header import NAME, read_header
from effllm.runtime.packed import PackedLinear, packed_weights
from tests.runtime.checkpoints import IDS, Small, edit_header, logits, pattern, skeleton, small

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoint-v1"


@pytest.mark.parametrize("act", ["a16", "a8"])
@pytest.mark.parametrize("kernel", ["reference", None])
def test_logits_and_tensors_are_the_same_bit_for_bit(tmp_path: Path, act: str, kernel: str | None) -> None:
    model = small(act=act, kernel=kernel)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", model=skeleton(), kernel=kernel)
    assert torch.equal(logits(model), logits(again))
    assert again.head.weight is again.embed.weight and again.embed.padding_idx == 3
    assert again.proj.weight.act == act and again.proj.weight.attrs == model.proj.weight.attrs
    assert bool(again.flag) and torch.equal(again.table, model.table)
    assert not again.training and set(again.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("grid", bipolar.GRIDS)
@pytest.mark.parametrize("group", [*bipolar.GROUPS, bipolar.CHANNEL])
def test_every_grid_and_group_comes_back(tmp_path: Path, grid: str, group: int) -> None:
    dtype = torch.float32 if group == 64 else torch.float16
    model = small(proj=pattern(40, 40, 1 + group % 7, grid, group, dtype=dtype))
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", model=skeleton(), kernel="reference").proj.weight.packed()
    want = model.proj.weight.packed()
    assert again.attrs == want.attrs and again.shape == want.shape and again.tensors.keys() == want.tensors.keys()
    for key, t in want.tensors.items():
        assert again.tensors[key].dtype == t.dtype and torch.equal(again.tensors[key], t)


def test_files_are_plain_safetensors_with_flat_names_and_no_tensor_twice(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "effllm-00001.safetensors")
    assert set(stored) == {
        *(f"embed.weight.{t}" for t in ("planes", "scale")),
        *(f"proj.weight.{t}" for t in ("planes", "scale", "minimum")),
        *("proj.bias", "norm.weight", "norm.bias", "table", "flag"),
    }
    want = model.proj.weight.packed().tensors
    assert all(torch.equal(stored[f"proj.weight.{key}"], want[key]) for key in want)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["effllm-00001.safetensors", NAME]


def test_the_kernel_layout_does_not_reach_the_file(tmp_path: Path) -> None:
    save(small(kernel="reference"), tmp_path / "a")
    save(small(kernel=None), tmp_path / "b")
    hashes = [{n: r["sha256"] for n, r in read_header(tmp_path / d)["tensors"].items()} for d in "ab"]
    assert hashes[0] == hashes[1]


def test_shards_split_at_the_limit_and_load_together(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path / "m", shard_bytes=1000)
    names = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(names) >= 3 and names[0] == "effllm-00001.safetensors"
    assert torch.equal(logits(load(tmp_path / "m", model=skeleton(), kernel="reference")), logits(model))


@pytest.mark.parametrize("grid", bipolar.GRIDS)
def test_fewer_bits_are_the_truncated_weight_and_only_those_planes_are_read(tmp_path: Path, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(proj=pattern(40, 40, 6, grid, step=13))
    save(model, tmp_path / "m")
    read: dict[str, tuple[int, ...]] = {}
    original = shards.Reader.read

    def spy(self: shards.Reader, name: str, first: int | None = None) -> torch.Tensor:
        t = original(self, name, first)
        read[name] = tuple(t.shape)
        return t

    monkeypatch.setattr(shards.Reader, "read", spy)
    for bits in range(1, 9):
        again = load(tmp_path / "m", bits=bits, model=skeleton(), kernel="reference")
        for name, weight in packed_weights(again).items():
            source = packed_weights(model)[name].packed()
            want = bipolar.truncate(source, min(bits, source.attrs["bits"]))
            got = weight.packed()
            assert got.attrs == want.attrs and torch.equal(bipolar.unpack(got), bipolar.unpack(want))
            assert read[f"{name}.planes"][0] == min(bits, source.attrs["bits"])


def test_bits_by_module(tmp_path: Path) -> None:
    save(small(), tmp_path / "m")
    again = load(tmp_path / "m", bits={"pro*": 2, "*": 5}, model=skeleton())
    assert again.proj.weight.bits == 2 and again.embed.weight.bits == 5 and again.head.weight is again.embed.weight
    for wrong in (0, 9, True, {"proj": 2.5}, {"nothing*": 2}):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "m", bits=wrong, model=skeleton())  # type: ignore[arg-type]
        assert caught.value.code == "E-CKP-BITS"


class Largest(TorchDispatchMode):
    """The most elements of a floating tensor that was made off the meta device."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_meta:
                self.seen = max(self.seen, t.numel())
        return out


def test_loading_makes_no_dense_weight(tmp_path: Path) -> None:
    save(small(), tmp_path / "m")
    with Largest() as largest:
        load(tmp_path / "m", model=skeleton())
    assert 0 < largest.seen < 40 * 40, "the smaller dense weight has 1600 elements"


def test_a_new_process_gives_the_same_logits(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path / "m")
    code = "import sys; from tests.runtime.checkpoints import *; from effllm.runtime.checkpoint import load; from safetensors.torch import save_file; "
    code += "save_file({'y': logits(load(sys.argv[1], model=skeleton(), kernel='reference'))}, sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "y")], check=True, cwd=Path(__file__).parents[2])
    assert torch.equal(load_file(tmp_path / "y")["y"], logits(model))


def test_a_model_without_packed_modules_and_with_ties_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small().to(torch.bfloat16)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", model=skeleton())
    assert torch.equal(logits(model), logits(again)) and again.head.weight is again.embed.weight
    assert again.proj.weight.dtype == torch.bfloat16


def test_a_packed_skeleton_is_as_good_as_a_dense_one(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path / "m")
    other = small(embed=pattern(48, 40, 3, "symmetric"))
    assert torch.equal(logits(load(tmp_path / "m", model=other, kernel="reference")), logits(model))


def test_the_golden_checkpoint_of_version_1_still_loads() -> None:
    model = load(GOLDEN, model=skeleton(), kernel="reference")
    want = small()
    for name, weight in packed_weights(want).items():
        assert torch.equal(packed_weights(model)[name].dense(), weight.dense()), name
    for name, t in want.named_parameters():
        assert torch.equal(model.get_parameter(name), t), name
    assert torch.equal(model.table, want.table) and isinstance(model.head, PackedLinear)
    assert torch.equal(logits(model), logits(want)) and IDS.shape == (2, 5)
    assert read_header(GOLDEN)["header_version"] == 1


def test_a_temporary_buffer_that_the_model_no_longer_has_is_left_out(tmp_path: Path) -> None:
    save(small(), tmp_path / "m")
    model = skeleton()
    del model.table
    model.table = torch.zeros(5, 40)  # now a plain attribute
    edit_header(tmp_path / "m", lambda h: h["plain"].update(gone=h["plain"].pop("table")) or h["tensors"].update(gone=h["tensors"]["table"]))
    path = tmp_path / "m" / "effllm-00001.safetensors"
    raw = path.read_bytes().replace(b'"table"', b'"gone" ')
    path.write_bytes(raw)
    edit_header(tmp_path / "m", lambda h: h["tensors"].pop("table"))
    assert not hasattr(load(tmp_path / "m", model=model), "gone")


def test_the_header_holds_versions_and_hashes(tmp_path: Path) -> None:
    save(small(), tmp_path / "m")
    header = json.loads((tmp_path / "m" / NAME).read_text())
    assert header["weights"]["proj.weight"]["version"] == bipolar.version
    assert len(header["tensors"]["proj.weight.planes"]["sha256"]) == 4
    assert header["modules"]["head"]["weight"] == "embed.weight"
    assert header["plain"]["table"] == "temporary" and header["plain"]["flag"] == "buffer"
