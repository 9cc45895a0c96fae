"""Rotation of cached keys and attention over keys of other positions: every provider against fp64, and the identities of rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.lowering import providers
from effllm.lowering.op import OPS, Provider
from effllm.lowering.pie import attention_problem, pie_problem
from effllm.runtime.rotary import change_angles, rotate, shift_angles, turns

providers.load("cpu")
HERE = {op: [p for p in OPS[op].providers.values() if p.device in ("any", "cpu")] for op in ("pie_apply", "rotated_attention")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("half", "interleaved")


def omega(pairs: int) -> Tensor:
    return 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(angle: Tensor, d: int, layout: str) -> Tensor:
    """The rotation as a dense fp64 matrix, written down pair by pair."""
    m = torch.eye(d, dtype=torch.float64)
    pairs = angle.numel()
    for c in range(pairs):
        i, j = (c, c + pairs) if layout == "half" else (2 * c, 2 * c + 1)
        m[i, i] = m[j, j] = angle[c].cos()
        m[i, j], m[j, i] = -angle[c].sin(), angle[c].sin()
    return m


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))


def usable(provider: Provider, problem: object) -> Provider:
    verdict = provider.supports(problem)  # type: ignore[arg-type]
    if not verdict:
        pytest.skip(verdict.reason)
    return provider


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("d", "pairs", "heads", "tokens"), [(64, 32, 3, 19), (40, 10, 1, 1), (6, 3, 2, 7), (18, 0, 2, 5)])
@pytest.mark.parametrize("provider", HERE["pie_apply"], ids=lambda p: p.name)
def test_gather_and_rotate(provider: Provider, layout: str, dtype: torch.dtype, d: int, pairs: int, heads: int, tokens: int) -> None:
    k = made(2, tokens, heads, d).to(dtype).transpose(1, 2)  # strided, as caches are
    usable(provider, pie_problem(k, pairs))
    angles = shift_angles([0, 3, -5, 70000], omega(pairs))
    source = torch.tensor([tokens - 1, -1, 0, *range(tokens)])
    row = torch.arange(tokens + 3) % 4
    y = provider.call(k, source, row, *turns(angles, dtype), layout)
    want = torch.zeros(2, heads, tokens + 3, d, dtype=torch.float64)
    for t, (s, r) in enumerate(zip(source.tolist(), row.tolist(), strict=True)):
        if s >= 0:
            want[:, :, t] = k[:, :, s].double() @ matrix(angles[r], d, layout).T
    assert y.shape == want.shape and y.dtype == dtype and y.is_contiguous()
    # one rounding to the dtype of a result that is exact but for two fp32 products and the table's rounding
    assert distance(y, want) <= {torch.float64: 1e-14, torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert torch.equal(y[:, :, 3], provider.call(k, None, row[:1].repeat(tokens) * 0 + 3, *turns(angles, dtype), layout)[:, :, 0])


@pytest.mark.parametrize("provider", HERE["pie_apply"], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_shift_is_the_identity_bit_for_bit(provider: Provider, dtype: torch.dtype) -> None:
    k = made(1, 2, 33, 16).to(dtype)
    usable(provider, pie_problem(k, 8))
    cos, sin = turns(shift_angles([0], omega(8)), dtype)
    assert torch.equal(provider.call(k, None, torch.zeros(33, dtype=torch.int32), cos, sin, "half"), k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moved_key_is_the_key_of_the_new_position(layout: str) -> None:
    """fp64: R(s + shift) k = R(shift) R(s) k to 1e-11 at positions up to 131072."""
    k, w = made(1, 1, 4, 32), omega(16)
    at = torch.tensor([0, 17, 4096, 131000])
    stored = rotate(k, *turns(shift_angles(at, w), torch.float64), layout)
    moved = OPS["pie_apply"].reference(stored, None, torch.zeros(4, dtype=torch.long), *turns(shift_angles([72], w), torch.float64), layout)
    fresh = rotate(k, *turns(shift_angles(at + 72, w), torch.float64), layout)
    assert (moved - fresh).abs().max() < 1e-11
    wrong = rotate(stored, *turns(shift_angles([72] * 4, w), torch.float64), "half" if layout == "interleaved" else "interleaved")
    assert (wrong - fresh).abs().max() > 0.1  # the wrong layout is silently wrong, and seen here


def test_two_frequency_rule() -> None:
    """Keys stored at one set of frequencies, moved to other positions at another; the shift alone is wrong."""
    k, old, new = made(1, 1, 5, 24), omega(12), omega(12) * torch.linspace(1, 0.3, 12, dtype=torch.float64)
    at, to = torch.tensor([0, 3, 900, 4000, 8000]), torch.tensor([2, 5, 890, 4100, 8001])
    stored = rotate(k, *turns(shift_angles(at, old), torch.float64), "half")
    fresh = rotate(k, *turns(shift_angles(to, new), torch.float64), "half")
    angles = change_angles(at, to, old, new)
    moved = OPS["pie_apply"].reference(stored, None, torch.arange(5), *turns(angles, torch.float64), "half")
    assert (moved - fresh).abs().max() < 1e-11
    naive = OPS["pie_apply"].reference(stored, None, torch.arange(5), *turns(shift_angles(to - at, new), torch.float64), "half")
    assert (naive - fresh).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", HERE["rotated_attention"], ids=lambda p: p.name)
def test_rotated_attention(provider: Provider, dtype: torch.dtype, mask: str, layout: str) -> None:
    q = made(2, 6, 3, 40, seed=1).to(dtype)
    k, v = (made(2, 70, 2, 40, seed=s).to(dtype).transpose(1, 2) for s in (2, 3))
    usable(provider, attention_problem(q, 10))
    g = torch.Generator().manual_seed(4)
    m = None if mask == "none" else torch.rand(2, 1, 3, 70, generator=g) > 0.3 if mask == "bool" else torch.randn(1, 6, 3, 70, generator=g).to(dtype)
    angles = shift_angles([0, -7, 12345, 1], omega(10))
    row = torch.randint(0, 4, (70,), generator=g, dtype=torch.int32)
    cos, sin = turns(angles)
    turn = torch.stack([matrix(angles[r], 40, layout) for r in row.tolist()])
    moved = torch.einsum("bgsd,sed->bgse", k.double(), turn).repeat_interleave(3, 1)
    score = q.double() @ moved.transpose(-1, -2) * 0.3
    if m is not None:
        score = score.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else score + m.double()
    true = score.softmax(-1) @ v.double().repeat_interleave(3, 1)
    plain = torch.nn.functional.scaled_dot_product_attention(q, moved.to(dtype), v.repeat_interleave(3, 1), m, scale=0.3)
    y = provider.call(q, k, v, m, row, cos, sin, layout, 0.3)
    assert distance(y, true) <= 2 * distance(plain, true) + OPS["rotated_attention"].tolerance[dtype] / 10
    swapped = provider.call(q, k, v, m, row.flip(0), cos, sin, layout, 0.3)
    assert distance(swapped, true) > 0.1


@pytest.mark.parametrize("provider", HERE["rotated_attention"], ids=lambda p: p.name)
def test_masked_keys_are_not_read(provider: Provider) -> None:
    """Unused slots may hold anything; a query that sees the other keys sees no NaN."""
    q, k, v = made(1, 4, 1, 16).float(), made(1, 2, 9, 16, seed=1).float(), made(1, 2, 9, 16, seed=2).float()
    usable(provider, attention_problem(q, 8))
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 4] = False
    tables = (torch.zeros(9, dtype=torch.int32), *turns(shift_angles([0], omega(8))), "half", 0.25)
    want = provider.call(q, k, v, mask, *tables)
    k[:, :, 4], v[:, :, 4] = 1e30, 77.0
    assert torch.equal(provider.call(q, k, v, mask, *tables), want)


NATIVE = [p for p in HERE["pie_apply"] if p.name != "reference" and p.supports(pie_problem(torch.zeros(1, 1, 1, 2), 1))]


@pytest.mark.parametrize("provider", NATIVE, ids=lambda p: p.name)
def test_tables_that_do_not_fit_are_refused(provider: Provider) -> None:
    k, cos = torch.zeros(1, 1, 4, 8), torch.ones(2, 4)
    for row, source, table in (
        (torch.full((4,), 2), None, cos), (torch.full((4,), -1), None, cos), (torch.zeros(3, dtype=torch.long), None, cos),
        (torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 2, 4]), cos), (torch.zeros(4, dtype=torch.long), None, torch.ones(2, 5)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="effllm"):
            provider.call(k, source, row, table, torch.zeros_like(table), "half")


@pytest.mark.parametrize("provider", NATIVE, ids=lambda p: p.name)
def test_opcheck(provider: Provider) -> None:
    own = getattr(torch.ops, f"effllm_{provider.name.replace('-', '_')}")
    provider.prepare()  # type: ignore[misc]
    k, q = torch.randn(1, 2, 9, 16), torch.randn(1, 4, 1, 16)
    row, (cos, sin) = torch.zeros(9, dtype=torch.int32), turns(shift_angles([0, 4], omega(8)))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(own.pie_apply.default, (k, None, row, cos, sin, True), test_utils=tests)
    torch.library.opcheck(own.rotated_attention.default, (q, k, k, None, row, cos, sin, True, 0.25), test_utils=tests)
