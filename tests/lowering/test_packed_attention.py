"""The op "packed_attention": every provider against fp64, on prompts, chunks and decoding steps in one table; and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider
from effllm.runtime.segments import Segment, table

providers.load("cpu")
OP = OPS["packed_attention"]
HERE = [p for p in OP.providers.values() if p.device in ("any", "cpu")]
NAMES = [p.name for p in HERE]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a prompt; a decoding step; a gap of no segment; a chunk; one prompt longer than a block of rows; a prompt of one token
ROWS = [Segment(0, 5, 3, 5), Segment(5, 1, 10, 20), Segment(8, 6, 30, 21), Segment(20, 100, 60, 130), Segment(120, 40, 200, 40), Segment(160, 1, 245, 1)]
T, P = 163, 250


def made(heads: int, groups: int, size: int, value: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, T, size, generator=g).to(dtype)
    k, v = (torch.randn(P, groups, d, generator=g).to(dtype).transpose(0, 1)[None] for d in (size, value))  # strided, as the arena's are
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, rows: list[Segment], scale: float, window: int, softcap: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Query by query."""
    q, k, v = (t[0].to(dtype) for t in (q, k, v))
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[2], dtype=dtype)
    for s in rows:
        for i in range(s.q_len):
            end = s.k_start + s.k_len - s.q_len + i + 1
            keys = slice(max(s.k_start, end - window) if window else s.k_start, end)
            for h in range(q.shape[0]):
                group = h * k.shape[0] // q.shape[0]
                score = scale * (k[group, keys] @ q[h, s.q_start + i])
                score = softcap * (score / softcap).tanh() if softcap else score
                out[s.q_start + i, h] = score.softmax(0) @ v[group, keys]
    return out[None]


def distance(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


def usable(provider: Provider, dtype: torch.dtype) -> None:
    verdict = provider.supports(Problem("packed_attention", 6, 40, 0, 0, False, dtype=dtype))
    if not verdict:
        pytest.skip(verdict.reason)


CASES = [(6, 2, 40, 40, 0, 0.0), (9, 3, 64, 64, 0, 0.0), (4, 4, 72, 24, 7, 0.0), (6, 1, 16, 16, 64, 3.0), (8, 2, 128, 128, 0, 2.0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_provider_against_fp64(case: tuple[int, int, int, int, int, float], dtype: torch.dtype) -> None:
    heads, groups, size, value, window, softcap = case
    q, k, v = made(heads, groups, size, value, dtype)
    true = exact(q, k, v, ROWS, 0.3, window, softcap)
    plain = distance(exact(q, k, v, ROWS, 0.3, window, softcap, torch.float32).to(dtype), true)
    for provider in HERE:
        usable(provider, dtype)
        y = provider.call(q, k, v, table(ROWS, T, P), 0.3, window, softcap)
        assert y.shape == (1, T, heads, value) and y.dtype == dtype
        assert distance(y, true) <= 2 * plain + OP.tolerance[dtype], provider.name
        assert not y[0, [6, 7, *range(14, 20), 161, 162]].any()  # queries of no segment


@pytest.mark.parametrize("provider", HERE, ids=NAMES)
def test_keys_of_nobody_may_hold_anything(provider: Provider) -> None:
    usable(provider, torch.float32)
    q, k, v = made(4, 2, 32, 32, torch.float32)
    rows = [Segment(0, 50, 7, 90), Segment(60, 1, 120, 30)]
    y = provider.call(q, k, v, table(rows, T, P), 0.2, 0, 0.0)
    seen = torch.zeros(P, dtype=torch.bool)
    seen[7:97] = seen[120:150] = True
    for t in (k, v):
        t[:, :, ~seen] = torch.nan
    q[:, :, 61:] = torch.nan
    assert torch.equal(provider.call(q, k, v, table(rows, T, P), 0.2, 0, 0.0), y)


@pytest.mark.parametrize("provider", HERE, ids=NAMES)
def test_order_and_neighbours_change_nothing(provider: Provider) -> None:
    usable(provider, torch.float32)
    q, k, v = made(6, 2, 40, 40, torch.float32)
    whole = provider.call(q, k, v, table(ROWS, T, P), 0.3, 9, 0.0)
    assert torch.equal(provider.call(q, k, v, table(ROWS[::-1], T, P), 0.3, 9, 0.0), whole)
    for s in ROWS:
        alone = provider.call(q, k, v, table([s], T, P), 0.3, 9, 0.0)[:, s.q_start : s.q_start + s.q_len]
        assert distance(alone, whole[:, s.q_start : s.q_start + s.q_len].double()) < 1e-6


@pytest.mark.parametrize("provider", HERE, ids=NAMES)
def test_any_split_into_chunks_is_the_whole_prompt(provider: Provider) -> None:
    usable(provider, torch.float32)
    q, k, v = made(6, 2, 40, 40, torch.float32)
    whole = provider.call(q, k, v, table([Segment(0, 130, 5, 130)], T, P), 0.3, 0, 0.0)[:, :130]
    at = 0
    for n in (1, 2, 63, 64):
        part = provider.call(q[:, :, at : at + n].contiguous(), k, v, table([Segment(0, n, 5, at + n)], n, P), 0.3, 0, 0.0)
        assert distance(part, whole[:, at : at + n].double()) < 1e-6
        at += n
    assert at == 130


@pytest.mark.parametrize("provider", HERE, ids=NAMES)
def test_one_key_more_or_less_shows(provider: Provider) -> None:
    usable(provider, torch.float32)
    q, k, v = made(6, 2, 40, 40, torch.float32)
    y = provider.call(q, k, v, table([Segment(0, 4, 3, 30)], T, P), 0.3, 0, 0.0)[:, :4]
    for other in (Segment(0, 4, 2, 31), Segment(0, 4, 3, 31), Segment(0, 4, 4, 29), Segment(0, 4, 3, 29)):
        assert distance(provider.call(q, k, v, table([other], T, P), 0.3, 0, 0.0)[:, :4], y.double()) > 0.02


def test_an_empty_table_gives_zeros_and_bad_tables_are_refused_by_the_kernels() -> None:
    q, k, v = made(6, 2, 40, 40, torch.float32)
    for provider in HERE:
        if provider.supports(Problem("packed_attention", 6, 40, 0, 0, False)):
            assert not provider.call(q, k, v, table([], T, P), 0.3, 0, 0.0).any()
        if provider.name.startswith("cpu-") and provider.supports(Problem("packed_attention", 6, 40, 0, 0, False)):
            for row in ([0, T + 1, 0, T + 1], [0, 1, P, 1], [0, 2, 0, 1], [-1, 1, 0, 1], [0, 0, 0, 1]):
                with pytest.raises(RuntimeError, match="reaches out"):
                    provider.call(q, k, v, torch.tensor([row], dtype=torch.int32), 0.3, 0, 0.0)
            with pytest.raises(RuntimeError, match="share a query"):
                provider.call(q, k, v, torch.tensor([[0, 2, 0, 2], [1, 1, 0, 1]], dtype=torch.int32), 0.3, 0, 0.0)


@pytest.mark.parametrize("name", ["loop", "cpu-avx512", "cpu-avx2", "cpu-portable"])
def test_opcheck(name: str) -> None:
    usable(OP.providers[name], torch.float32)
    OP.providers[name].call(*made(6, 2, 40, 40, torch.float32), table(ROWS, T, P), 0.3, 0, 0.0)  # builds it
    own = torch.ops.effllm.packed_attention_loop if name == "loop" else getattr(torch.ops, f"effllm_{name.replace('-', '_')}").packed_attention
    arguments = (*made(6, 2, 40, 24, torch.float32), table(ROWS, T, P), 0.3, 0, 0.0)
    torch.library.opcheck(own.default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_the_graph_op_takes_the_named_kernel() -> None:
    q, k, v = made(6, 2, 40, 40, torch.float32)
    loop = torch.ops.effllm.packed_attention(q, k, v, table(ROWS, T, P), 0.3, 0, 0.0, "loop")
    assert torch.equal(loop, OP.providers["loop"].call(q, k, v, table(ROWS, T, P), 0.3, 0, 0.0))
