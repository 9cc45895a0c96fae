"""GGUF import: every stored weight comes out equal, bit for bit in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from effllm.errors import EffllmError
from effllm.hf.demo import demo_gguf
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.gguf import BLOCK_BYTES, import_gguf, open_gguf, pack_blocks, read

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
quants = pytest.importorskip("gguf.quants")


def bits_of(t: torch.Tensor) -> torch.Tensor:
    """fp32 as int32, so that equality is of bits."""
    return t.contiguous().view(torch.int32)


def blocks(kind: str, rows: int, k: int, seed: int, exponents: tuple[int, int]) -> np.ndarray:
    """Random blocks with scales over a wide range of magnitudes and of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, k // 32, BLOCK_BYTES[kind]), dtype=np.uint8)
    for at in (0, 2) if kind == "Q4_1" else (0,):
        value = rng.choice([-1.0, 1.0], raw.shape[:2]) * 2.0 ** rng.uniform(*exponents, raw.shape[:2])
        raw[..., at : at + 2] = value.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("exponents", [(-8, 0), (-13, 15), (-24, -12)], ids=["usual", "wide", "subnormal"])
def test_blocks_match_the_library_bit_for_bit(kind: str, exponents: tuple[int, int]) -> None:
    raw = blocks(kind, 7, 96, 1, exponents)
    packed = pack_blocks(kind, torch.from_numpy(raw.copy()), 96)
    want = torch.from_numpy(quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(bits_of(bipolar.unpack(packed)), bits_of(want))
    narrow = packed.tensors["scale"].dtype == torch.float16
    assert narrow == (exponents[0] > -24), "fp32 scales exactly where halving drops a bit"
    assert packed.attrs == {
        "bits": 8 if kind == "Q8_0" else 4,
        "group": 32,
        "grid": "affine" if kind == "Q4_1" else "integer",
        "source_bits": packed.attrs["bits"],
    }


def test_every_code_value_survives() -> None:
    raw = np.zeros((1, 8 * 34), np.uint8).reshape(1, 8, 34)
    raw[..., :2] = np.full((1, 8, 1), 0.5, np.float16).view(np.uint8)
    raw[..., 2:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    values = bipolar.unpack(pack_blocks("Q8_0", torch.from_numpy(raw.reshape(1, -1)), 256))
    want = torch.arange(256).to(torch.uint8).view(torch.int8).float() * 0.5
    assert torch.equal(values[0], want)


def test_rows_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(EffllmError) as caught:
        pack_blocks("Q4_0", torch.zeros(2, 18, dtype=torch.uint8), 64)
    assert caught.value.code == "E-GGF-SHAPE"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for name, content in (("text", b"not a gguf file at all, but long enough for a header"), ("empty", b""), ("cut", b"GGUF\x03\x00\x00\x00\x05")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EffllmError) as caught:
            open_gguf(tmp_path / name)
        assert caught.value.code == "E-GGF-FILE"
    with pytest.raises(EffllmError) as caught:
        list(import_gguf(tmp_path / "absent"))
    assert caught.value.code == "E-GGF-FILE"


def test_every_weight_of_the_demo_file_is_exact() -> None:
    try:
        path = demo_gguf()
    except EffllmError as error:
        pytest.skip(error.cause)
    kinds: dict[str, int] = {}
    for record in open_gguf(path).records:
        got = read(record)
        kind = record.tensor_type.name
        kinds[kind] = kinds.get(kind, 0) + 1
        want = torch.from_numpy(quants.dequantize(record.data, record.tensor_type).copy())
        if isinstance(got, Packed):
            got = bipolar.unpack(got)
        assert torch.equal(bits_of(got), bits_of(want)), record.name
    assert kinds == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
