"""Low-rank formats: exact values, byte counts, strict validation, meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError
from effllm.recipe import Bipolar
from effllm.runtime import formats
from effllm.runtime.formats import bipolar, dense, lowrank, sltrain
from effllm.runtime.formats.base import Packed
from effllm.solvers.search import search

N, K, R, C = 70, 100, 16, 5
KINDS = ("plain", "channels", "pivots", "shift", "sparse")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(t: Tensor, how: str) -> Packed:
    if how.startswith("int"):
        return search(t, Bipolar(bits=int(how[3:]), group=16, offset="none"))
    return dense.make(t.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[how]))


def make(kind: str, how: str = "bf16") -> Packed:
    rows, columns = (N - R if kind == "pivots" else N), (R + C if kind == "channels" else R)
    a, b = factor(rand(rows, columns, seed=1), how), factor(rand(R, K, seed=2), how)
    if kind == "sparse":
        return sltrain.make(a, b, rand(N, K, seed=3) * (rand(N, K, seed=4) > 1.5))
    gen = torch.Generator().manual_seed(7)
    extra: dict[str, Tensor] = {}
    if kind == "channels":
        extra["channels"] = torch.randperm(K, generator=gen)[:C]
    if kind == "pivots":
        extra["pivots"] = torch.randperm(N, generator=gen)[:R].sort().values
    if kind == "shift":
        extra["shift"] = rand(N)
    return lowrank.make(a, b, shape=(N, K), **extra)


def stored(packed: Packed, key: str) -> Tensor:
    """A factor's values, decoded here."""
    values = packed.tensors.get(f"{key}.values")
    if values is not None:
        return values.double()
    about = packed.attrs[key]
    tensors = {name: packed.tensors[f"{key}.{name}"] for name in ("planes", "scale")}
    return bipolar.unpack(Packed("bipolar", 1, tuple(about["shape"]), tensors, about["attrs"])).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bf16", "fp16", "fp32", "int8", "int3"])
def test_value(kind: str, how: str) -> None:
    """What the linear computes: B x first, then the second stage over what it reads, against the unpacked matrix."""
    packed = make(kind, how)
    a, b, x = stored(packed, "a"), stored(packed, "b"), rand(9, K).double()
    z = x @ b.t()
    if kind == "channels":
        z = torch.cat([z, x[:, packed.tensors["channels"].long()]], 1)
    y = z @ a.t()
    if kind == "pivots":
        whole = torch.empty(9, N).double()
        free = [i for i in range(N) if i not in packed.tensors["pivots"].tolist()]
        whole[:, packed.tensors["pivots"].long()], whole[:, free] = z, y
        y = whole
    if kind == "sparse":
        t = packed.tensors
        for i in range(N):
            for e in range(int(t["sparse.rows"][i]), int(t["sparse.rows"][i + 1])):
                y[:, i] += x[:, int(t["sparse.columns"][e]) + 32768] * t["sparse.values"][e].double()
    got = formats.get(packed.format).unpack(packed, torch.float64)
    torch.testing.assert_close(x @ got.t(), y, rtol=1e-12, atol=1e-12)
    assert formats.get(packed.format).unpack(packed).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bf16", "fp32", "int8", "int3"])
def test_bytes(kind: str, how: str) -> None:
    packed = make(kind, how)
    t = packed.tensors
    about: dict[str, Any] = {**packed.attrs, "shift": "shift" in t, "number_bytes": 4 if how == "fp32" else 2}
    if kind != "sparse":
        about |= {"channels": t["channels"].numel() if "channels" in t else 0, "pivots": "pivots" in t}
    n, k = sympy.symbols("N K", positive=True, integer=True)
    assert int(formats.get(packed.format).nbytes(**about).subs({n: N, k: K})) == packed.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_meta(kind: str) -> None:
    packed = make(kind).to("meta")
    formats.get(packed.format).validate(packed)
    assert packed.nbytes == make(kind).nbytes


def broken(kind: str, change: dict[str, Tensor | None], **attrs: Any) -> Packed:
    p = make(kind)
    tensors = {k: v for k, v in {**p.tensors, **change}.items() if v is not None}
    return Packed(p.format, p.version, p.shape, tensors, {**p.attrs, **attrs})


INT = torch.int32
BAD: dict[str, tuple[str, dict[str, Tensor | None], dict[str, Any]]] = {
    "no b": ("plain", {"b.values": None}, {}),
    "short a": ("plain", {"a.values": torch.zeros(N - 1, R)}, {}),
    "rank": ("plain", {}, {"rank": R + 1}),
    "no rank": ("plain", {}, {"rank": None}),
    "no part": ("plain", {}, {"a": 3}),
    "unknown tensor": ("plain", {"c": torch.zeros(1)}, {}),
    "unknown part": ("plain", {"c.values": torch.zeros(1)}, {}),
    "nested": ("plain", {}, {"a": {"format": "lowrank", "version": 1, "shape": [N, R], "attrs": {}}}),
    "shift dtype": ("shift", {"shift": torch.zeros(N).half()}, {}),
    "shift length": ("shift", {"shift": torch.zeros(N + 1)}, {}),
    "channel range": ("channels", {"channels": torch.tensor([0, 1, 2, 3, K], dtype=INT)}, {}),
    "channel twice": ("channels", {"channels": torch.tensor([0, 1, 2, 3, 3], dtype=INT)}, {}),
    "channel dtype": ("channels", {"channels": torch.arange(C)}, {}),
    "channels missing": ("channels", {"channels": None}, {}),
    "pivot order": ("pivots", {"pivots": torch.arange(R, dtype=INT).flip(0)}, {}),
    "pivot count": ("pivots", {"pivots": torch.arange(R - 1, dtype=INT)}, {}),
    "pivots missing": ("pivots", {"pivots": None}, {}),
    "pivots and channels": ("pivots", {"channels": torch.arange(1, dtype=INT)}, {}),
    "rows": ("sparse", {"sparse.rows": torch.zeros(N + 1, dtype=INT)}, {}),
    "row order": ("sparse", {"sparse.rows": torch.cat([torch.tensor([0, 9, 5]), torch.full((N - 2,), 9999)]).to(INT)}, {}),
    "values": ("sparse", {"sparse.values": torch.zeros(3)}, {}),
    "nnz": ("sparse", {}, {"nnz": "many"}),
    "columns dtype": ("sparse", {"sparse.columns": torch.zeros(3, dtype=INT)}, {}),
    "no columns": ("sparse", {"sparse.columns": None}, {}),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_found(case: str) -> None:
    kind, change, attrs = BAD[case]
    packed = broken(kind, change, **attrs)
    with pytest.raises(CheckpointError) as caught:
        formats.get(packed.format).validate(packed)
    assert caught.value.code == "E-CKP-SHAPE"


def test_sparse_columns_must_increase_and_fit() -> None:
    p = make("sparse")
    columns = p.tensors["sparse.columns"].clone()
    row = int((p.tensors["sparse.rows"].diff() > 1).nonzero()[0, 0])
    first = int(p.tensors["sparse.rows"][row])
    columns[first + 1] = columns[first]
    for bad in (columns, torch.full_like(columns, K - 32768)):
        with pytest.raises(CheckpointError):
            sltrain.validate(broken("sparse", {"sparse.columns": bad}))


def test_sparse_part_may_be_empty_and_wide() -> None:
    a, b = factor(rand(3, 2), "fp32"), factor(rand(2, 70000, seed=1), "fp32")
    s = torch.zeros(3, 70000)
    s[2, 69999], s[0, 40000] = 5.0, 7.0
    wide = sltrain.make(a, b, s, dtype=torch.float32)
    assert wide.tensors["sparse.columns"].dtype == torch.int32
    product = rand(3, 2).double() @ rand(2, 70000, seed=1).double()
    torch.testing.assert_close(sltrain.unpack(wide, torch.float64), product + s)
    a, b = factor(rand(3, 2), "fp32"), factor(rand(2, 40, seed=1), "fp32")
    empty = sltrain.make(a, b, torch.zeros(3, 40))
    assert empty.attrs["nnz"] == 0
    torch.testing.assert_close(sltrain.unpack(empty, torch.float64), rand(3, 2).double() @ rand(2, 40, seed=1).double())
