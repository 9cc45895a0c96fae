"""Edit sessions over packed caches: the text is edited, pages are not; what a page rounds is rounded once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm import backend
from effllm.errors import CacheError, EditError
from effllm.hf.edit import EditSession
from effllm.hf.edit_packed import PackedEditCache
from effllm.hf.kv_calibrate import collect, pca_tables
from tests.hf.rotary_models import made
from tests.hf.test_edit import SCRIPT, apart, applied, deep, opened, same, seen, state, text

EXACT = "dense(page=16,window=8)"
KIVI = "kivi(page=32,window=8,group=32,bits={})"


def packed(session: EditSession) -> PackedEditCache:
    assert isinstance(session._cache, PackedEditCache)
    return session._cache


def random_edits(count: int, length: int, seed: int) -> list[list[Any]]:
    """Insertions, deletions and replacements, many at 0 and at the end, some in two places."""
    rng, script = random.Random(seed), []
    while len(script) < count:
        at = rng.choice([0, length, rng.randrange(length + 1)])
        stop = min(length, at + rng.choice([0, 0, 4, 30]))
        new = [rng.randrange(3, 60) for _ in range(rng.choice([0, 1, 6, 40]))]
        if (not new and at == stop) or length - (stop - at) + len(new) < 20:
            continue
        edits = [(at, stop, new)]
        if rng.random() < 0.3 and stop + 3 < length:
            edits.append((stop + 2, stop + 3, [5]))
        script.append(edits)
        length += len(new) - (stop - at)
    return script


@pytest.mark.parametrize("capacity", [None, 180])
def test_an_exact_format_is_the_dense_session(capacity: int | None) -> None:
    """Same keys, values, logits and tokens after each of 20 edits, while pages die, move and are added."""
    model = deep(torch.float32)
    session, plain = opened(model, text(170), cache=EXACT, capacity=capacity), opened(model, text(170))
    for edits in random_edits(20, 170, 3):
        assert session.edit(edits).encoded == plain.edit(edits).encoded
        assert session.ids == plain.ids and session.generate(3) == plain.generate(3)
        for layer in (0, 1):
            assert apart(session.keys(layer), plain.keys(layer)) < 1e-4 and apart(session.values(layer), plain.values(layer)) < 1e-4
        assert apart(session.next_token_logits(), plain.next_token_logits()) < 1e-4
    assert session.generate(30, keep=True) == plain.generate(30, keep=True)
    session.edit(SCRIPT), plain.edit(SCRIPT)
    assert apart(session.keys(1), plain.keys(1)) < 1e-4 and session.ids == plain.ids


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_rounds_each_token_once(bits: int) -> None:
    """Layer 0 of one layer: after 20 edits a key is off its true value by no more than half a step of its group's range."""
    model = deep(torch.float32, layers=1)
    session = opened(model, text(170), cache=KIVI.format(bits))
    for edits in random_edits(20, 170, bits):
        session.edit(edits)
    fresh = opened(model, session.ids)
    held = packed(session).own[0].held
    flushed = int(held.lens[1])
    slots = torch.tensor(session._slots.order)
    # a turn mixes two channels of a key: its error is at most sqrt 2 times that of the worse one; fp16 scales and minima add 2^-10 of the range
    step = 2 * float(fresh.keys(0).abs().max()) * 2**0.5 / (2**bits - 1)
    error = (seen(session) - fresh.keys(0).double()).abs().amax((0, 1, 3))
    assert float(error[slots < flushed].max()) < 2**0.5 * step * (0.5 + 2**bits * 2**-10)
    assert float(error[slots >= flushed].max()) < 1e-5 and int((slots < flushed).sum()) > 60  # the ring is dense, and most is packed
    values = (session.values(0) - fresh.values(0)).abs()
    width = fresh.values(0).amax(-1) - fresh.values(0).amin(-1)
    assert bool((values.amax(-1) <= width / (2**bits - 1) * (0.5 + 2**bits * 2**-10) + 1e-6).all())


def test_more_bits_are_nearer_to_full_recomputation() -> None:
    model = deep(torch.float32)
    plain, script, off = opened(model, text(170)), random_edits(20, 170, 0), []
    for edits in script:
        plain.edit(edits)
    for bits in (2, 4, 8):
        session = opened(model, text(170), cache=KIVI.format(bits))
        for edits in script:
            session.edit(edits)
        p, q = (s.next_token_logits().double().log_softmax(-1) for s in (plain, session))
        off.append(float((p.exp() * (p - q)).sum()))
    assert off[0] > 4 * off[1] > 16 * off[2] and off[2] < 1e-3, off


def test_pages_are_never_written_again() -> None:
    """What a page held after the prompt it holds after any edits, in deleted places too."""
    session = opened(deep(torch.float32), text(170), cache=KIVI.format(4), capacity=900)
    held = packed(session).own[1].held
    filled = int(held.lens[1]) // 32
    before = held.pages[:, :filled].clone()
    for edits in random_edits(12, 170, 5):
        session.edit(edits)
    assert filled >= 4 and int(held.lens[1]) > filled * 32 and torch.equal(held.pages[:, :filled], before)
    session.recompute()
    assert packed(session).own[1].held.pages.shape == before.shape[:1] + held.pages.shape[1:]
    fresh = opened(session.model, session.ids, cache=KIVI.format(4), capacity=900)
    assert torch.equal(session.keys(1), fresh.keys(1)) and session._slots.used == len(session)


def test_typing_leaves_no_dead_tokens_and_empty_pages_come_back() -> None:
    session = opened(deep(torch.float32), text(60), cache=EXACT, capacity=200)
    for i in range(40):  # each edit encodes the last token again; its old key must not stay behind
        session.edit([(20 + i, 20 + i, [7])])
    assert session._slots.used == len(session) == 100
    size = session._slots.size
    for _ in range(30):  # a function is rewritten again and again
        session.edit([(10, 50, text(40, 8))])
    assert session._slots.size == size and len(session) == 100
    assert apart(session.keys(0), opened(session.model, session.ids).keys(0)) < 1e-4


@pytest.mark.parametrize("spec", [EXACT, KIVI.format(4), "gear(page=32,window=8,group=32)", "mustafar(page=64,window=8)", "bfp(page=16,window=8,block=16)"])
def test_formats_that_pack_keys_as_they_are(spec: str) -> None:
    """Every format of the contract: layer-0 keys as the format's own rounding of the keys that went in, turned to where they stand now."""
    model = deep(torch.float32)
    session = opened(model, text(170), cache=spec)
    held = packed(session).own[0].held
    kept, _ = held.read()
    kept = kept[:, :, : int(held.lens[1])].clone()
    for edits in ([(0, 0, [7, 8])], [(40, 50, [])], [(100, 101, text(30, 2))]):
        session.edit(edits)
    slots = [s for s in session._slots.order if s < kept.shape[2]]
    assert len(slots) > 90 and torch.equal(held.read()[0][:, :, slots], kept[:, :, slots])
    dense = opened(model, session.ids)
    off = (session.keys(0) - dense.keys(0)).norm() / dense.keys(0).norm()
    assert off < 0.35, off  # mustafar drops half of the channels, the smallest
    assert len(session.generate(4)) == 4


def test_a_projecting_format_turns_what_it_reconstructs() -> None:
    model = deep(torch.float32)
    tables = pca_tables(collect(model, [torch.tensor([text(200, 9)])]))
    session = opened(model, text(170), cache="matryoshka(page=16,window=8,k=full,v=full)", tables=tables)
    dense = opened(model, text(170))
    for edits in random_edits(6, 170, 1):
        session.edit(edits), dense.edit(edits)
    assert apart(session.keys(1), dense.keys(1)) < 1e-3 and session.generate(4) == dense.generate(4)  # all of the basis: nothing is lost


def broken(*args: Any, **kwargs: Any) -> Tensor:
    raise KeyboardInterrupt


def test_the_session_is_unchanged_after_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(torch.float32)
    session = opened(model, text(170), cache=KIVI.format(4), capacity=200)
    session.edit([(4, 4, [9, 9])])
    before = state(session)
    for edits in ([(0, 199, [])], [(0, 3, []), (2, 4, [])], [(0, 1, [10**6])], [(0, 172, [])]):
        with pytest.raises(EditError):
            session.edit(edits)
        assert same(state(session), before)
    right = type(model.model.layers[1].mlp).forward
    calls = (
        lambda: session.edit(SCRIPT), lambda: session.edit([(165, 170, [])]), lambda: session.edit([(7, 9, text(300, 5))]), session.recompute,
        lambda: session.generate(3, keep=True), lambda: session.generate(40),
    )  # fmt: skip
    for call in calls:
        monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", broken)  # both layers have appended by then, pages too
        with pytest.raises(KeyboardInterrupt):
            call()
        monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", right)
        assert same(state(session), before)
    session.edit([(1, 2, [4])])
    assert session.ids == applied(before[0], [(1, 2, [4])])


def test_an_interrupt_while_pages_move(monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(deep(torch.float32), text(100), cache=EXACT, capacity=170)
    session.edit([(5, 60, [])])
    before = state(session)
    right, calls = PackedEditCache._ring, list[int]()

    def late(self: PackedEditCache, *args: Any) -> None:
        right(self, *args)
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(PackedEditCache, "_ring", late)
    with pytest.raises(KeyboardInterrupt):
        session.edit([(0, 0, text(120, 1))])
    monkeypatch.setattr(PackedEditCache, "_ring", right)
    assert calls and same(state(session), before)
    session.edit([(0, 0, text(120, 1))])
    assert apart(session.keys(0), opened(session.model, session.ids).keys(0)) < 1e-4


def test_what_cannot_be_edited_is_refused_with_the_reason() -> None:
    model = deep(torch.float32)
    for call, what in (
        (lambda: opened(model, text(), cache="kivi(bits=4,page=32,group=32)", form="eager"), "round them again"),
        (lambda: opened(made("dynamic"), text(30), cache=KIVI.format(4)), "follow the length"),
        (lambda: opened(model, text(), cache="ems(budget=64)"), "drops tokens"),
        (lambda: opened(model, text(), cache="kivy(bits=4)"), "did you mean 'kivi'|kivi"),
        (lambda: opened(model, text(), cache="kivi(bits=3)"), "bits"),
    ):
        with pytest.raises(EditError, match=what) as caught:
            call()
        assert caught.value.code == "E-EDT-CACHE"
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        opened(model, text(), cache="bfp(page=16,window=8)")  # blocks of 32 channels, heads of 16
    session = opened(model, text(), cache=KIVI.format(4))
    session.form = "eager"
    before = session.next_token_logits()
    with pytest.raises(EditError, match="E-EDT-CACHE"):
        session.edit([(3, 3, [4])])
    assert session.ids == text() and torch.equal(session.next_token_logits(), before)


def test_compiled_decoding_is_traced_once_for_all_edits() -> None:
    model = deep(torch.float32)
    options = {"recipe": "dense", "inner": "eager"}
    session = opened(
        model, text(120), cache=KIVI.format(8), capacity=400, compile=lambda f: torch.compile(f, backend="effllm", options=options, fullgraph=True)
    )
    plain = opened(model, text(120), cache=KIVI.format(8), capacity=400)
    backend.reports.clear()  # of a fixed length
    for edits in ([(10, 12, [5, 6, 7])], [(0, 0, [9, 9])], [(50, 95, [])], [(3, 3, [4] * 40), (44, 45, [])]):
        for s in (session, plain):
            s.edit(edits)
        assert session.generate(6) == plain.generate(6)
        assert session.generate(20, keep=True) == plain.generate(20, keep=True)
    assert len(backend.reports) == 1


def test_compiled_decoding_attends_to_packed_keys_where_they_lie() -> None:
    """The pass puts one op in the place of read, turn and attention, and its tokens are those of the eager session."""
    model = deep(torch.float32)
    options = {"recipe": "dense", "inner": "eager"}
    spec = "kivi(page=32,window=8,group=16,bits=4)"  # kernels take heads of 16 channels with groups of 16
    session = opened(model, text(120), cache=spec, capacity=400, compile=lambda f: torch.compile(f, backend="effllm", options=options, fullgraph=True))
    plain = opened(model, text(120), cache=spec, capacity=400)
    for s in (session, plain):
        s.edit([(10, 12, [5, 6, 7]), (60, 60, [4] * 20)])
        s.edit([(0, 0, [9, 9])])
    assert session.generate(8) == plain.generate(8)
    found = next(p for p in backend.last_report().passes if p.name == "compressed_attention").decisions
    turned = [d for d in found if d.config.get("table")]
    if any(d.code == "no-kernel" for d in found):
        pytest.skip("no compiler, no kernel")
    assert len(turned) == 2 and all(d.action == "applied" and "turned" in d.reason for d in turned)
    rotated = [d for p in backend.last_report().passes if p.name == "query_rotation" for d in p.decisions]
    assert rotated == []


def test_a_packed_cache_encodes_nothing_again_by_default() -> None:
    """Each token that is read again takes room in pages that only grow; who asks for it gets it."""
    for options, encoded in (({}, 4), ({"refresh": 8}, 3 + 8 + 1), ({"tail": 20}, 3 + 17)):
        session = EditSession(deep(torch.float32), text(170), cache=KIVI.format(4), **options)
        assert session.edit([(50, 50, [3, 4, 5])]).encoded == encoded
