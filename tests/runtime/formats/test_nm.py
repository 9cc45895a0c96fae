"""N:M weights: exact round trips, the index that is smaller, bytes by the formula, and every kind of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError, WeightError
from effllm.runtime.formats import armor, bipolar, dense, nm, parts
from effllm.runtime.formats.base import Packed

PATTERNS = [(2, 4), (1, 4), (4, 4), (4, 8), (6, 8), (2, 8), (3, 8), (8, 16), (4, 16), (3, 16), (1, 16)]


def random_mask(rows: int, k: int, n: int, m: int, seed: int = 0) -> Tensor:
    """Exactly n of every m."""
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(rows, k // m, m, generator=g).argsort(-1)[..., :n]
    return torch.zeros(rows, k // m, m, dtype=torch.bool).scatter_(-1, place, True).view(rows, k)


def code(values: Tensor, bits: int = 8, grid: str = "integer") -> Packed:
    """Round to the nearest code, one scale for each group of 16: zero is exact on the integer grid."""
    rows, kc = values.shape
    kp = bipolar.padded(kc, 16)
    full = torch.nn.functional.pad(values.float(), (0, kp - kc)).view(rows, -1, 16)
    scale = (full.abs().amax(-1, keepdim=True) / (2**bits - 2)).clamp_min(1e-6).half()
    u = (full / (2 * scale.float()) + bipolar.zero_point(bits, grid)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return bipolar.make(u.view(rows, kp), scale.squeeze(-1), None, k=kc, bits=bits, group=16, grid=grid)


def formula(expression: sympy.Expr, n: int, k: int) -> int:
    return int(expression.subs(dict(zip(sympy.symbols("N K", positive=True, integer=True), (n, k), strict=True))))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact_and_bytes_are_those_of_the_formula(n: int, m: int, dtype: torch.dtype) -> None:
    w = torch.randn(5, 48 * m // 4).to(dtype)
    keep = random_mask(*w.shape, n, m)
    packed = nm.from_dense(w, keep, n, m)
    assert torch.equal(nm.unpack(packed, dtype), torch.where(keep, w, 0))
    assert torch.equal(nm.mask(packed), keep)
    assert packed.nbytes == formula(nm.nbytes(n=n, m=m, value_bytes=w.element_size()), *w.shape)
    assert torch.equal(nm.unpack(nm.from_dense(torch.where(keep, w, 0), None, n, m), dtype), torch.where(keep, w, 0))


@pytest.mark.parametrize(("n", "m", "bits"), [(2, 4, 1.0), (4, 8, 1.0), (6, 8, 1.0), (1, 4, 0.5), (2, 8, 0.75), (3, 16, 0.75), (8, 16, 1.0)])
def test_the_smaller_index_is_stored(n: int, m: int, bits: float) -> None:
    packed = nm.from_dense(torch.randn(2, 256), random_mask(2, 256, n, m), n, m)
    assert packed.tensors["index"].numel() * 8 == bits * 512


def test_index_of_a_row_by_hand() -> None:
    w = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]])
    assert nm.from_dense(w, None, 2, 4).tensors["index"].tolist() == [[0b00111010]]
    single = torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    assert nm.from_dense(single, None, 1, 4).tensors["index"].tolist() == [[0b1101]]  # columns 1 and 3, two bits each


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_groups_with_fewer_weights(n: int, m: int) -> None:
    """Groups that keep 0 .. n weights, one row with none at all."""
    keep = random_mask(8, 8 * m, n, m) & (torch.rand(8, 8 * m, generator=torch.Generator().manual_seed(3)) < 0.5)
    keep[4] = False
    keep[0] = random_mask(1, 8 * m, n, m)[0]
    w = torch.randn(8, 8 * m)
    w[4] = float("nan")  # dropped with its row
    packed = nm.from_dense(w, keep, n, m)
    assert torch.equal(nm.unpack(packed), torch.where(keep, w, torch.zeros(())))
    assert bool((nm.mask(packed).view(8, -1, m).sum(-1) == n).all()) and bool((nm.mask(packed) | ~keep).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (6, 8), (1, 4)])
def test_coded_values(n: int, m: int, bits: int) -> None:
    w, keep = torch.randn(6, 96), random_mask(6, 96, n, m)
    packed = nm.from_dense(w, keep, n, m, quantize=lambda v: code(v, bits))
    kept = torch.where(keep, w, 0).gather(1, nm.columns_of(packed))
    assert torch.equal(nm.values_of(packed), bipolar.unpack(code(kept, bits)))
    assert torch.equal(nm.unpack(packed)[~keep], torch.zeros(int((~keep).sum())))
    assert packed.nbytes == formula(nm.nbytes(n=n, m=m, bits=bits, group=16, grid="integer"), 6, 96)


def test_a_grid_without_zero_refuses_short_groups() -> None:
    w = torch.zeros(2, 8)
    w[0, 3] = 1.0
    with pytest.raises(WeightError, match="E-WGT-GRID"):
        nm.from_dense(w, None, 2, 4, quantize=lambda v: code(v, 8, "symmetric"))
    assert torch.equal(nm.unpack(nm.from_dense(w, None, 2, 4, quantize=code)) != 0, w != 0)


def test_padding_is_asked_for() -> None:
    w = torch.randn(3, 10)
    keep = torch.nn.functional.pad(random_mask(3, 8, 2, 4), (0, 2), value=True)
    with pytest.raises(WeightError, match="multiple of 4"):
        nm.from_dense(w, keep, 2, 4)
    packed = nm.from_dense(w, keep, 2, 4, pad=True)
    assert packed.shape == (3, 10) and torch.equal(nm.unpack(packed), torch.where(keep, w, 0))
    assert packed.nbytes == formula(nm.nbytes(n=2, m=4, value_bytes=4), 3, 10)


@pytest.mark.parametrize(
    ("change", "code_"),
    [
        (lambda w, k: nm.from_dense(w, torch.ones_like(k), 2, 4), "E-WGT-MASK"),
        (lambda w, k: nm.from_dense(w, k.t().contiguous().t(), 1, 4), "E-WGT-MASK"),
        (lambda w, k: nm.from_dense(w, k[:, :8], 2, 4), "E-WGT-MASK"),
        (lambda w, k: nm.from_dense(w, k.float(), 2, 4), "E-WGT-MASK"),
        (lambda w, k: nm.from_dense(w, torch.zeros_like(k), 2, 4), "E-WGT-EMPTY"),
        (lambda w, k: nm.from_dense(w, k, 2, 5), "E-WGT-NM"),
        (lambda w, k: nm.from_dense(w, k, 0, 4), "E-WGT-NM"),
        (lambda w, k: nm.from_dense(w, k, 9, 8), "E-WGT-NM"),
    ],
)
def test_bad_input(change: object, code_: str) -> None:
    with pytest.raises(WeightError, match=code_):
        change(torch.randn(4, 16), random_mask(4, 16, 2, 4))  # type: ignore[operator]


def test_a_mask_along_the_wrong_axis_is_noticed() -> None:
    transposed = random_mask(64, 64, 2, 4).t().contiguous()
    with pytest.raises(WeightError, match=r"row .* allows 2"):
        nm.from_dense(torch.randn(64, 64), transposed, 2, 4)


def damage(packed: Packed, how: str) -> Packed:
    t, a = dict(packed.tensors), {**packed.attrs}
    if how == "shape":
        return Packed(packed.format, packed.version, (packed.shape[0], packed.shape[1] * 2), t, a)
    if how == "bitmap":
        t["index"] = t["index"] ^ 1
    if how == "index dtype":
        t["index"] = t["index"].int()
    if how == "values":
        t["values.values"] = t["values.values"][:, :-1]
    if how == "pattern":
        a["n"] = 3
    if how == "no index":
        del t["index"]
    return Packed(packed.format, packed.version, packed.shape, t, a)


@pytest.mark.parametrize("how", ["shape", "bitmap", "index dtype", "values", "pattern", "no index"])
def test_damaged_weights_are_refused(how: str) -> None:
    with pytest.raises(CheckpointError, match="E-CKP-SHAPE"):
        nm.validate(damage(nm.from_dense(torch.randn(4, 32), random_mask(4, 32, 2, 4), 2, 4), how))


def test_packed_columns_out_of_order_are_refused() -> None:
    packed = nm.from_dense(torch.randn(1, 8), random_mask(1, 8, 2, 8), 2, 8)
    packed.tensors["index"] = torch.zeros_like(packed.tensors["index"])
    with pytest.raises(CheckpointError, match="ascending"):
        nm.validate(packed)


def test_shapes_without_data() -> None:
    packed = nm.from_dense(torch.empty(32, 64, dtype=torch.bfloat16, device="meta"), torch.empty(32, 64, dtype=torch.bool, device="meta"), 2, 4)
    assert packed.nbytes == formula(nm.nbytes(n=2, m=4), 32, 64) and packed.bits_per_weight == 9.0


def test_checkpoint_keeps_the_weight(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    packed = nm.from_dense(torch.randn(4, 32), random_mask(4, 32, 4, 8), 4, 8, quantize=code)
    save_file(packed.tensors, str(tmp_path / "w"))
    again = Packed(packed.format, packed.version, packed.shape, load_file(str(tmp_path / "w")), packed.attrs)
    nm.validate(again)
    assert torch.equal(nm.unpack(again), nm.unpack(packed))


class TestArmor:
    def make(self, n: int = 32, k: int = 64, d: int = 16, values: torch.dtype = torch.bfloat16) -> Packed:
        g = torch.Generator().manual_seed(1)
        core = nm.from_dense(torch.randn(n, k, generator=g).to(values), random_mask(n, k, 2, 4), 2, 4)
        return armor.make(core, torch.randn(n, d, generator=g).to(values), torch.randn(k, d, generator=g).to(values))

    def test_unpack_is_the_product(self) -> None:
        packed = self.make()
        a, b = (torch.block_diag(*armor.blocks(packed.tensors[f"{key}.values"]).double()) for key in ("left", "right"))
        s = nm.unpack(parts.part(packed, "core"), torch.float64)
        assert torch.allclose(armor.unpack(packed, torch.float64), a @ s @ b, rtol=1e-13, atol=1e-12)

    def test_identity_is_the_core(self) -> None:
        core = parts.part(self.make(), "core")
        packed = armor.make(core, torch.eye(16).repeat(2, 1), torch.eye(16).repeat(4, 1))
        assert torch.equal(armor.unpack(packed), nm.unpack(core))

    def test_bytes(self) -> None:
        assert self.make().nbytes == formula(armor.nbytes(block=16, n=2, m=4), 32, 64)

    def test_bad_blocks(self) -> None:
        core = parts.part(self.make(), "core")
        with pytest.raises(WeightError, match="E-WGT-BLOCK"):
            armor.make(core, torch.randn(32, 24), torch.randn(64, 24))
        packed = self.make()
        packed.tensors["left.values"] = packed.tensors["left.values"][:-1]
        with pytest.raises(CheckpointError, match="E-CKP-SHAPE"):
            armor.validate(packed)

    def test_coded_core(self) -> None:
        core = nm.from_dense(torch.randn(32, 64), random_mask(32, 64, 2, 4), 2, 4, quantize=code)
        packed = armor.make(core, torch.eye(16).repeat(2, 1), torch.eye(16).repeat(4, 1))
        assert torch.equal(armor.unpack(packed), nm.unpack(core))


def test_dense_pattern_equals_dense() -> None:
    w = torch.randn(4, 16)
    assert torch.equal(nm.unpack(nm.make(dense.make(w), torch.arange(16).repeat(4, 1), 16, 4, 4)), w)
