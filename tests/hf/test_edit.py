"""Edit sessions: exact where PIE is exact, the same in both forms, and unchanged after any error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm import backend
from effllm.errors import EditError
from effllm.hf import edit as edit_module
from effllm.hf.edit import EditSession
from tests.hf.rotary_models import exact, llama, made
from tests.hf.tiny import tiny_llama, tiny_text, tiny_tokenizer

SCRIPT = [(0, 0, [7]), (10, 12, [5, 6, 8, 9]), (20, 30, []), (55, 60, [11, 3])]


def opened(*args: Any, **options: Any) -> EditSession:
    """A session that encodes nothing again but the last token, unless told to: what an edit leaves as it was can be seen."""
    return EditSession(*args, **{"refresh": 0, "tail": 0} | options)


def text(count: int = 60, seed: int = 0) -> list[int]:
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def applied(ids: list[int], edits: list[Any]) -> list[int]:
    for i, j, new in sorted(edits, reverse=True):
        ids = [*ids[:i], *new, *ids[j:]]
    return ids


def deep(dtype: torch.dtype = torch.float64, layers: int = 2) -> Any:
    torch.manual_seed(0)
    return exact(llama(layers=layers)().to(dtype).eval())


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("form", ["lazy", "eager"])
@pytest.mark.parametrize(("name", "bound"), [("llama", 1e-11), ("yarn", 1e-11), ("llama3", 1e-11), ("gpt_neox", 1e-11), ("phi", 1e-11), ("cohere", 1e-4),
                                            ("gptj", 1e-4)])  # fmt: skip
def test_keys_of_the_first_layer_are_those_of_the_new_text(name: str, bound: float, form: str) -> None:
    """Layer 0 knows nothing but its tokens, so there PIE is full recomputation. Cohere and GPT-J compute cosines in fp32 themselves."""
    model = made(name, torch.float64)
    if bound < 1e-9:
        exact(model)
    session = opened(model, text(), form=form)
    done = session.edit(SCRIPT)
    assert session.ids == applied(text(), SCRIPT) and done.tokens == len(session) and done.encoded == 7 + (SCRIPT[-1][1] < 60)
    fresh = opened(model, session.ids)
    assert apart(session.keys(0), fresh.keys(0)) < bound and apart(session.values(0), fresh.values(0)) < 1e-12
    assert apart(session.next_token_logits(), fresh.next_token_logits()) < 10 * bound  # one layer: the last token sees everything right
    assert session._slots.segments() == (6 if form == "lazy" else 1)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length(name: str) -> None:
    """An edit across the trained length of 64 moves every key to the new frequencies, and back (the two-frequency rule)."""
    model = made(name, torch.float64)
    session = opened(model, text(62))
    assert session.form == "eager" and "follow the length" in session.why_eager
    before = session.keys(0)
    for edits in ([(5, 5, text(20, 1))], [(30, 33, [])], [(5, 25, [])]):
        session.edit(edits)
        kept = session.next_token_logits(), session.keys(0)
        fresh = opened(model, session.ids)
        assert apart(kept[1], fresh.keys(0)) < 2e-4  # the model's own cosines are fp32
        assert apart(kept[0], fresh.next_token_logits()) < 1e-3
    assert apart(session.keys(0)[:, :, :5], before[:, :, :5]) < 2e-4


@pytest.mark.parametrize("form", ["lazy", "eager"])
def test_encoding_everything_behind_the_edit_is_full_recomputation(form: str) -> None:
    model = deep()
    session = opened(model, text(), form=form, refresh=1000)
    session.edit(SCRIPT)
    fresh = opened(model, session.ids)
    for layer in (0, 1):
        assert apart(session.keys(layer), fresh.keys(layer)) < 1e-10
    assert apart(session.next_token_logits(), fresh.next_token_logits()) < 1e-10
    session.refresh = 0
    session.edit([(3, 9, [4])])
    assert apart(session.keys(1), opened(model, session.ids).keys(1)) > 1e-3  # and without it the second layer is an approximation
    session.recompute()
    assert apart(session.keys(1), opened(model, session.ids).keys(1)) < 1e-12


@pytest.mark.parametrize("form", ["lazy", "eager"])
def test_what_is_encoded_again_by_default(form: str) -> None:
    """16 tokens behind each edit, and at the end what new tokens leave of 64, or 32; nothing that stands before the first edit."""
    model = deep()
    for edits, again in (
        ([(20, 20, [5, 6, 7])], {*range(23, 39), *range(203 - 61, 203)}),
        ([(20, 30, []), (90, 91, [])], {*range(20, 36), *range(80, 96), *range(189 - 64, 189)}),
        ([(20, 20, text(70, 1))], {*range(90, 106), *range(270 - 32, 270)}),
        ([(190, 195, [])], set(range(190, 195))),
        ([(200, 200, [9])], set()),
    ):
        session = EditSession(model, text(200), form=form)
        before = session.keys(1)
        done = session.edit(edits)
        new = sum(len(ids) for _, _, ids in edits)
        assert done.encoded == len(again) + new
        session.edit([])
        fresh = EditSession(model, session.ids)
        first = edits[0][0]
        assert apart(session.keys(1)[:, :, :first], before[:, :, :first]) == 0
        assert apart(session.keys(0), fresh.keys(0)) < 1e-10
        if len(session) - first <= 64 - new:  # then all of the rest is new
            assert apart(session.keys(1), fresh.keys(1)) < 1e-10 and apart(session.next_token_logits(), fresh.next_token_logits()) < 1e-10


def test_what_is_encoded_again_brings_the_answer_nearer() -> None:
    model, edits = deep(), [(60, 64, text(9, 7)), (150, 150, text(5, 8))]
    off = {}
    for refresh, tail in ((0, 0), (16, 0), (0, 64), (16, 64)):
        session = EditSession(model, text(220), refresh=refresh, tail=tail)
        session.edit(edits)
        off[refresh, tail] = float((session.keys(1) - EditSession(model, session.ids).keys(1)).norm())
    assert off[16, 64] < min(off[16, 0], off[0, 64]) and max(off[16, 0], off[0, 64]) < off[0, 0]


def test_both_forms_and_one_edit_at_a_time_give_the_same() -> None:
    model, sessions = deep(), []
    for form in ("lazy", "eager"):
        together = opened(model, text(), form=form)
        together.edit(SCRIPT)
        single, shift = opened(model, text(), form=form), 0
        for i, j, new in SCRIPT:  # from the front: each span sees what is new before it, as in one pass
            single.edit([(i + shift, j + shift, new)])
            shift += len(new) - (j - i)
        sessions += [together, single]
    for s in sessions[1:]:
        assert s.ids == sessions[0].ids and apart(s.keys(0), sessions[0].keys(0)) < 1e-11
        assert apart(s.keys(1), sessions[0].keys(1)) < 1e-10 and apart(s.next_token_logits(), sessions[0].next_token_logits()) < 1e-10


def test_an_edit_at_the_end_is_ordinary_decoding() -> None:
    model = deep()
    session = opened(model, text(40))
    session.edit([(40, 40, text(9, 2))])
    fresh = opened(model, text(40) + text(9, 2))
    assert apart(session.next_token_logits(), fresh.next_token_logits()) < 1e-11 and apart(session.keys(1), fresh.keys(1)) < 1e-11


def test_new_tokens_do_not_see_the_text_behind_them() -> None:
    model = deep()
    a, b = (opened(model, text(30) + tail) for tail in (text(20, 3), text(20, 4)))
    for s in (a, b):
        s.edit([(12, 14, [5, 6, 7, 8])])
    assert apart(a.keys(1)[:, :, :16], b.keys(1)[:, :, :16]) == 0 and apart(a.keys(1)[:, :, 28:], b.keys(1)[:, :, 28:]) > 1e-3


def test_generate_is_that_of_the_model_and_leaves_the_session() -> None:
    model = deep(torch.float32)
    ids = text(30)
    want = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 30:].tolist()
    session = opened(model, ids)
    assert session.generate(6) == want and session.ids == ids and session.generate(6) == want
    assert session.generate(6, stop=(want[2],)) == want[: want.index(want[2]) + 1]
    assert session.generate(4, keep=True) == want[:4] and session.ids == ids + want[:4]
    assert session.generate(2) == want[4:]
    fresh = opened(model, session.ids)
    assert apart(session.next_token_logits(), fresh.next_token_logits()) < 1e-5
    assert session.generate(3, choose=lambda logits: int(logits.argmin())) != want[4:]


def test_short_texts_growth_and_a_table_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_module, "ROWS", 2)
    monkeypatch.setattr(edit_module, "SPARE", 2)
    model = deep(layers=1)
    session = opened(model, [9])
    for i in range(12):
        session.edit([(0, 0, [10 + i]), (len(session), len(session), [3])])
        if i % 3 == 2:
            session.edit([(1, 2, [])])
    session.edit([(0, len(session) - 1, [])])
    session.edit([(0, 0, text(20))])
    session.edit([(i, i, [i]) for i in range(3, 12)])
    assert session._rows > 2
    fresh = opened(model, session.ids)
    assert apart(session.keys(0), fresh.keys(0)) < 1e-11 and apart(session.next_token_logits(), fresh.next_token_logits()) < 1e-10


def state(session: EditSession) -> tuple[Any, ...]:
    return session.ids, session.next_token_logits(), session.keys(0), session.keys(1), session.generate(4)


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", ["lazy", "eager"])
def test_the_session_is_unchanged_after_any_error(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(torch.float32)
    session = opened(model, text(), form=form)
    session.edit([(4, 4, [9, 9])])
    before = state(session)
    bad: list[Any] = [[(0, 99, [])], [(0, 3, []), (2, 4, [])], [(0, 1, [10**6])], [(0, 62, [])], [(1, 2)], [(2, 1, [])]]
    for edits in bad:
        with pytest.raises(EditError):
            session.edit(edits)
        assert same(state(session), before)
    right = type(model.model.layers[1].mlp).forward

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise KeyboardInterrupt

    for call in (lambda: session.edit(SCRIPT), lambda: session.edit([(7, 9, text(300, 5))]), session.recompute, lambda: session.generate(3, keep=True)):
        monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", broken)  # layer 0 has written its keys by then
        with pytest.raises(KeyboardInterrupt):
            call()
        monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", right)
        assert same(state(session), before)
    session.edit([(1, 2, [4])])
    assert session.ids[:3] == [before[0][0], 4, before[0][2]]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda m: opened(m, []), "E-EDT-EMPTY"), (lambda m: opened(m, [[1, 2], [3, 4]]), "E-EDT-FORM"),
        (lambda m: opened(m, [99]), "E-EDT-TOKEN"),
        (lambda m: opened(m, [3], form="fast"), "E-EDT-FORM"), (lambda m: opened(m, [3], cache="what"), "E-EDT-CACHE"),
        (lambda m: opened(m, "w1"), "E-EDT-TEXT"),
        (lambda m: opened(m, [3]).text, "E-EDT-TEXT"), (lambda m: opened(m, [3]).generate(0), "E-EDT-FORM"),
        (lambda m: opened(m, [3], refresh=-1), "E-EDT-FORM"),
        (lambda m: EditSession(m, [3], tail=-1), "E-EDT-FORM"), (lambda m: EditSession(m, [3], tail="a"), "E-EDT-FORM"),
        (lambda m: opened(m, [3], refresh=1.5), "E-EDT-FORM"), (lambda m: opened(m, [3], capacity=0), "E-EDT-FORM"),
        (lambda m: EditSession(torch.nn.Linear(3, 3), [3]), "E-EDT-FORM"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make: Callable[[Any], Any], code: str) -> None:
    with pytest.raises(EditError) as caught:
        make(tiny_llama(torch.float32))
    assert caught.value.code == code


def test_a_table_of_positions_ends() -> None:
    session = opened(made("gptj"), text(95))
    with pytest.raises(EditError, match="E-EDT-LENGTH"):
        session.edit([(3, 3, [4] * 6)])
    with pytest.raises(EditError, match="E-EDT-LENGTH"):
        session.generate(6)
    assert len(session) == 95 and len(session.generate(5)) == 5


def test_compiled_decoding_is_traced_once_for_all_edits() -> None:
    model = deep(torch.float32)
    options = {"recipe": "dense", "inner": "eager"}
    session = opened(model, text(), compile=lambda f: torch.compile(f, backend="effllm", options=options, fullgraph=True))
    plain = opened(model, text())
    backend.reports.clear()  # of a fixed length
    for edits in ([(10, 12, [5, 6, 7])], [(0, 0, [9, 9])], [(50, 55, [])], [(3, 3, [4] * 10), (30, 31, [])]):
        for s in (session, plain):
            s.edit(edits)
        assert session.generate(6) == plain.generate(6)
    assert len(backend.reports) == 1
    found = next(p for p in backend.last_report().passes if p.name == "query_rotation").decisions
    assert [(d.action, d.config["queries"]) for d in found] == [("applied", 1)] * 2


def test_a_hundred_edits_in_bf16_round_nothing_twice() -> None:
    """Lazy: stored keys never change, so the error after 100 edits is that of storing them once. Eager: roundings add up."""
    model = exact(llama(layers=1)().to(torch.bfloat16).eval())
    script = [[(1, 1, [3 + i % 50])] for i in range(100)]  # unit shifts of nearly all keys
    error = {}
    for form in ("lazy", "eager"):
        session = opened(model, text(), form=form)
        stored = session._layer(0).stored()[0][:, :, 10:59].clone() if form == "lazy" else None
        for i, edits in enumerate(script):
            session.edit(edits)
            if i in (0, 99):
                wide = opened(exact(made_wide(model)), session.ids).keys(0)[:, :, -50:]
                error[form, i] = float((seen(session)[:, :, -50:] - wide).square().mean().sqrt())
        if stored is not None:
            assert torch.equal(session._layer(0).stored()[0][:, :, 10:59], stored)
    assert error["lazy", 99] < error["eager", 0] < error["eager", 99] / 2, error


def made_wide(model: Any) -> Any:
    import copy

    wide = copy.deepcopy(model).double()
    wide.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq)
    return wide


def seen(session: EditSession) -> Tensor:
    """Layer-0 keys as a query turned in full precision sees them."""
    from effllm.runtime.rotary import rotate, shift_angles, turns

    slots = session._slots
    keys = session._layer(0).stored()[0][:, :, slots.order].double()
    shifts = torch.tensor([p - slots.stored[s] for p, s in enumerate(slots.order)])
    return rotate(keys, *turns(shift_angles(shifts, session.rotary.omega), torch.float64), session.rotary.layout)


def test_editing_text_encodes_only_what_changes() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(torch.float32)
    start = tiny_text(80)
    session = opened(model, start, tokenizer=tokenizer)
    assert session.text == start
    places = [i for i, c in enumerate(start) if c == " "]
    done = session.edit_text([(places[20], places[22], " w1 w2 w3"), (places[60] + 1, places[60] + 1, "w5 ")])
    want = start[: places[20]] + " w1 w2 w3" + start[places[22] : places[60] + 1] + "w5 " + start[places[60] + 1 :]
    assert session.text == want and session.ids == tokenizer(want)["input_ids"] and done.encoded <= 5
    session.edit_text([(0, len(want) - len(want.split()[-1]), "")])
    assert session.text == want.split()[-1]
    with pytest.raises(EditError, match="E-EDT-EMPTY"):
        session.edit_text([(0, len(session.text), "")])
    for bad, code in (([(0, 999, "")], "E-EDT-RANGE"), ([(0, 1)], "E-EDT-FORM"), ([(0, 1, ""), (0, 1, "w2")], "E-EDT-OVERLAP")):
        with pytest.raises(EditError, match=code):
            session.edit_text(bad)  # type: ignore[arg-type]
    assert session.text == want.split()[-1]
