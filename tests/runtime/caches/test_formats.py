"""What holds for every cache format: pages do not depend on how tokens arrive, nor on the batch; bytes; NaN; text form."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CacheError
from effllm.runtime.caches import paging
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.layer import Layer

CASES = [
    "dense(page=16,window=8)",
    "kivi(bits=2,page=32,group=16,window=8)",
    "kivi(bits=4,page=64,group=32,window=0)",
    "kivi(bits=8,page=32,group=32,window=40)",
    "mustafar(sparsity=0.7,page=64,window=8)",
    "mustafar(sparsity=0.5,bits=4,page=64,window=0)",
    "bfp(bits=4,block=16,page=16,window=8)",
    "bfp(bits=8,vbits=5,block=32,page=32,window=0)",
    "matryoshka(k=full,v=full,page=16,window=8)",
    "gear(bits=2,page=32,group=16,window=8,rank=2,outliers=0.05)",
    "gear(bits=4,page=32,group=16,window=8,rank=3,factors=8)",
]


def states(seed: int, tokens: int, batch: int = 2, heads: int = 2, dim: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, heads, tokens, dim, generator=g) * torch.rand(batch, heads, 1, dim, generator=g).mul(4).exp() for _ in range(2))
    return k, v


def filled(fmt: str, k: torch.Tensor, v: torch.Tensor, cuts: list[int], capacity: int | None = None) -> Layer:
    layer = Layer(fmt, capacity or k.shape[2])
    layer.allocate(k, v)
    for a, b in zip([0, *cuts], [*cuts, k.shape[2]], strict=True):
        layer.append(k[:, :, a:b], v[:, :, a:b])
    return layer


@pytest.mark.parametrize("fmt", CASES)
def test_bytes_do_not_depend_on_how_tokens_arrive(fmt: str) -> None:
    k, v = states(0, 203)
    once = filled(fmt, k, v, [])
    for cuts in ([1], [7, 8, 100], list(range(1, 203)), [150]):
        other = filled(fmt, k, v, cuts)
        assert torch.equal(once.lens, other.lens)
        assert torch.equal(once.pages, other.pages)
        assert all(torch.equal(a[:, :, :203], b[:, :, :203]) for a, b in zip(once.read(), other.read(), strict=True))
    assert int(once.lens[1]) > 0


@pytest.mark.parametrize("fmt", CASES)
def test_rows_of_a_batch_are_independent(fmt: str) -> None:
    k, v = states(1, 130, batch=3)
    together = filled(fmt, k, v, [])
    for i in range(3):
        alone = filled(fmt, k[i : i + 1], v[i : i + 1], [])
        assert torch.equal(alone.pages[0], together.pages[i])


@pytest.mark.parametrize("fmt", CASES)
def test_newest_tokens_are_exact_and_prompts_see_themselves(fmt: str) -> None:
    k, v = states(2, 160)
    layer = Layer(fmt, 200)
    seen = layer.update(k, v)
    assert torch.equal(seen[0][:, :, :160], k) and torch.equal(seen[1][:, :, :160], v)
    dense = layer.format.window + 1
    keys, values = layer.read()
    assert torch.equal(keys[:, :, 160 - dense : 160], k[:, :, -dense:]) and torch.equal(values[:, :, 160 - dense : 160], v[:, :, -dense:])
    assert keys.isfinite().all() and values.isfinite().all()  # behind the tokens too: a mask cannot hide a NaN


@pytest.mark.parametrize("fmt", CASES)
def test_dense_tokens_cycle_with_the_page(fmt: str) -> None:
    k, v = states(3, 300)
    layer, f = Layer(fmt, 300), parse(fmt)
    layer.allocate(k, v)
    for t in range(300):
        layer.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        total, flushed = layer.lens.tolist()
        assert total == t + 1 and flushed % f.page == 0
        if total > f.window:
            assert total - flushed == f.window + (total - f.window - 1) % f.page + 1


@pytest.mark.parametrize("fmt", CASES)
def test_payload_is_what_the_layout_says(fmt: str) -> None:
    f = parse(fmt)
    for heads, dim in ((1, 32), (3, 64), (2, 128)):
        layout = f.layout(heads, dim, torch.bfloat16)
        assert layout.page % 64 == 0 and layout.payload <= layout.page
        layer = Layer(fmt, 5 * f.page + f.window + f.page)
        layer.allocate(*(torch.zeros(1, heads, 0, dim, dtype=torch.bfloat16),) * 2)
        assert layer.pages.shape == (1, 5, layout.page)


@pytest.mark.parametrize("fmt", CASES)
@pytest.mark.parametrize("where", [0, 1])
def test_nan_does_not_become_a_number(fmt: str, where: int) -> None:
    k, v = states(4, 120)
    (k, v)[where][1, 0, 5, 3] = float("nan")
    keys = filled(fmt, k, v, []).read()[where]
    assert keys[1, 0, 5, 3].isnan() and keys[0].isfinite().all() and keys[1, 1].isfinite().all()


@pytest.mark.parametrize("fmt", CASES)
def test_padding_stays_out_of_pages(fmt: str) -> None:
    k, v = states(5, 150)
    pads = (0, 45)
    rough = [t.clone() for t in (k, v)]
    for t in rough:
        t[1, :, : pads[1]] = 1e4
    found = []
    for keys, values in ((k, v), rough):
        layer = Layer(fmt, 150)
        layer.allocate(k, v)
        layer.set_start(torch.tensor(pads))
        layer.update(keys, values)
        found.append(layer)
    assert torch.equal(found[0].pages, found[1].pages)
    plain = filled(fmt, k, v, [])
    assert torch.equal(plain.pages[0], found[0].pages[0]) and not torch.equal(plain.pages[1], found[0].pages[1])


@pytest.mark.parametrize("fmt", CASES)
def test_text_form_round_trips(fmt: str) -> None:
    assert parse(parse(fmt).spec) == parse(fmt)


@pytest.mark.parametrize(
    ("fmt", "code"),
    [
        ("kiwi", "NAME"),
        ("kivi(bit=4)", "KEY"),
        ("kivi(bits=3)", "VALUE"),
        ("kivi(bits=x)", "VALUE"),
        ("kivi(group=24)", "VALUE"),
        ("dense(page=0)", "VALUE"),
        ("kivi(bits=4", "NAME"),
    ],
)
def test_bad_text(fmt: str, code: str) -> None:
    with pytest.raises(CacheError) as error:
        parse(fmt)
    assert error.value.code == f"E-KVC-{code}"


def test_capacity_covers_what_was_asked_for() -> None:
    for fmt in map(parse, CASES):
        for tokens in (1, fmt.page, fmt.page + fmt.window, fmt.page + fmt.window + 1, 1000):
            limit = paging.capacity(fmt, paging.pages_for(fmt, tokens))
            assert tokens <= limit < tokens + fmt.page + fmt.window + fmt.page
