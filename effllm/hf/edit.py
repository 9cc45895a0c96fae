"""Edit sessions: change a text in the middle and go on without reading it all again (PIE, arXiv 2407.03157).

    session = EditSession(model, ids)
    session.edit([(120, 124, new_ids)])
    session.next_token_logits(); session.generate(32)

New tokens pass through the model, and a few that stood there before: behind each edit and at the end of the text. All other keys behind an edit are
turned to their new positions, exactly; what they say still comes from the text as it was when they were read, which is the approximation of
the method (`refresh`, `tail` and `recompute` lessen it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CacheError, EditError
from effllm.hf import rope
from effllm.hf.edit_cache import EditCache, EditLayer, Tables, turn_table
from effllm.hf.edit_decode import Decoder
from effllm.hf.edit_packed import PackedEditCache, PackedEditLayer, eager_refused, size_for
from effllm.hf.edit_text import TextMap
from effllm.lowering import providers
from effllm.lowering.pie import pie_problem
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.edit.plan import Plan, plan, read_edits
from effllm.runtime.edit.slots import Log, Slots
from effllm.runtime.rotary import change_angles, turns

FORMS = ("lazy", "eager")
REFRESH = 16  # tokens behind an edit: what they say leans most on what stood there
TAIL = 64  # tokens at the end of the text, less those that are new, half of it at least: what comes next leans most on them
ROWS = 256  # rows of the table of turns; it doubles when a text has more distinct shifts
SPARE = 256  # slots beyond the text at the start
_EVICTING = ("ems",)


@dataclass(frozen=True)
class Edited:
    """What an edit did: tokens now, tokens that passed through the model, runs of tokens that share a shift."""

    tokens: int
    encoded: int
    segments: int


class EditSession:
    """A text (batch 1) with its cache. Every method leaves the session as it was where it raises.

    `ids`: token ids (S,) or (1, S), or a text where `tokenizer` is given. `form` "lazy" (default) leaves keys as stored and turns them as
    they are read, so that any number of edits rounds nothing twice; "eager" rewrites keys at each edit, after which reading is plain.
    Models whose frequencies follow the length (dynamic NTK, LongRoPE) are edited in the eager form; `why_eager` says so. `refresh`: tokens behind
    each edit that are encoded again; `tail`: so many at the end of the text, less the number of new ones, but at
    least half of it (an edit near the end is exact then); the last one always is. None: 16 and 64 for a dense cache, 0 for a packed one, in
    which each of them takes new room. `compile`: wraps the decode step, such as lambda f: torch.compile(f, backend="effllm").
    `cache`: "dense", or a cache format such as "kivi(bits=4)" (lazy form only): new tokens are appended to its pages and no page is packed
    again, so any number of edits rounds each key and value once; deleted tokens cost room until their page is empty, or until `recompute`.
    `tables[i]`: constant tensors of layer i for formats that have any (hf.kv_calibrate).

    Raises EditError: E-EDT-ROPE (rotary positions not proved), E-EDT-WINDOW (sliding windows), E-EDT-EMPTY, E-EDT-TOKEN, E-EDT-FORM,
    E-EDT-LENGTH, E-EDT-CACHE (a cache that cannot be edited, and why); CacheError (E-KVC-*) where a format does not fit the model's heads.
    """

    def __init__(
        self, model: Any, ids: Any, *, tokenizer: Any = None, cache: str = "dense", form: str = "lazy", refresh: int | None = None, tail: int | None = None,
        capacity: int | None = None, tables: dict[int, list[Tensor]] | None = None,
        compile: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
    ) -> None:  # fmt: skip
        if form not in FORMS:
            raise EditError("E-EDT-FORM", f"form={form!r}", f"form is one of {', '.join(FORMS)}")
        refresh = (REFRESH if cache == "dense" else 0) if refresh is None else refresh
        tail = (TAIL if cache == "dense" else 0) if tail is None else tail
        if not all(isinstance(n, int) and n >= least for n, least in ((refresh, 0), (tail, 0), (1 if capacity is None else capacity, 1))):
            what = f"refresh={refresh!r}, tail={tail!r}, capacity={capacity!r}"
            raise EditError("E-EDT-FORM", what, "refresh and tail are whole numbers from 0, capacity from 1")
        if not hasattr(getattr(model, "config", None), "get_text_config"):
            raise EditError("E-EDT-FORM", f"{type(model).__name__} is no causal language model of transformers", "give one, such as effllm.load_demo() loads")
        self.model, self.tokenizer, self.refresh, self.tail = model, tokenizer, refresh, tail
        config = model.config.get_text_config(decoder=True)
        self._vocabulary = int(config.vocab_size)
        self._text = TextMap.of(tokenizer, ids) if isinstance(ids, str) else None
        start = self._read(self._text.ids if self._text is not None else ids)
        found = rope.positions_of(model)
        self.rotary, self._turning = found.rotary, found.turning
        self.why_eager = f"frequencies of type {self.rotary.scaling} follow the length" if self.rotary.varies else ""
        self.form = "eager" if self.why_eager else form
        self.device = next(model.parameters()).device
        self._dtype = model.dtype
        self._boolean = config._attn_implementation == "sdpa"
        self._need_length(len(start))
        self._ids: list[int] = []
        self._format, self._bases = self._format_of(cache, form), tables or {}
        self._slots = self._empty(max(capacity or 0, len(start) + SPARE))
        self._rows = ROWS
        size = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        example = torch.empty(1, size, 1, self.rotary.head_dim, dtype=self._dtype, device=self.device)
        self._kernel = providers.select(pie_problem(example, self.rotary.omega.numel()))[0].name
        self._omegas: Tensor | None = None  # of every slot, for types that vary
        self._decoder = Decoder(model, compile)
        self._logits = torch.empty(0)
        self._cache = self._new_cache()
        self._prefill(start)

    # ---- reading

    @property
    def ids(self) -> list[int]:
        """The token ids of the present text."""
        return list(self._ids)

    @property
    def text(self) -> str:
        """The present text. EditError (E-EDT-TEXT) without a tokenizer."""
        return self._map().text

    def __len__(self) -> int:
        return len(self._ids)

    def next_token_logits(self) -> Tensor:
        """Logits (V,) of the token that follows the present text."""
        return self._logits.clone()

    def keys(self, layer: int) -> Tensor:
        """Keys (1, G, T, D) of a layer as attention sees them: in order of the text, turned to the present positions."""
        held = self._layer(layer)
        held.tables = self._tables([], high=None)
        stored, _ = held.stored()
        order = torch.tensor(self._slots.order, device=self.device)
        return held.turn(stored, held.tables.row).index_select(2, order)

    def values(self, layer: int) -> Tensor:
        """Values (1, G, T, D) of a layer in order of the text."""
        _, stored = self._layer(layer).stored()
        return stored.index_select(2, torch.tensor(self._slots.order, device=self.device))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache's tensors, free room included."""
        return self._cache.nbytes

    # ---- changing

    def edit(self, edits: Iterable[Sequence[Any]]) -> Edited:
        """Apply edits (start, stop, new ids), given in tokens of the present text: [start, stop) become the new ids.

        Insertions have start = stop, deletions no ids; several edits must not overlap. Raises EditError: E-EDT-FORM, E-EDT-RANGE,
        E-EDT-OVERLAP, E-EDT-TOKEN, E-EDT-EMPTY (nothing would be left), E-EDT-LENGTH.
        """
        ordered = read_edits(edits, len(self._ids), self._vocabulary)
        if not ordered:
            return Edited(len(self._ids), 0, self._slots.segments())
        done = self._apply(plan(self._ids, ordered))
        self._text = None
        return done

    def edit_text(self, edits: Iterable[tuple[int, int, str]]) -> Edited:
        """Apply edits (start, stop, new text), given in characters of `text`; only tokens that really change are encoded.

        Raises EditError as `edit` does, and E-EDT-TEXT (no tokenizer, or ids that its text does not give back).
        """
        now = self._map()
        after, changed = now.edited(edits)
        done = self.edit(changed)
        self._text = after
        return done

    def recompute(self) -> None:
        """Read the whole text again, as a new session would."""
        held, slots, logits, cache = self._ids, self._slots, self._logits, self._cache
        self._cache, self._slots = self._new_cache(), self._empty(slots.size)
        try:
            self._prefill(held)
        except BaseException:
            self._ids, self._slots, self._logits, self._cache = held, slots, logits, cache
            raise

    @torch.no_grad()
    def generate(self, max_new_tokens: int, *, stop: Sequence[int] = (), keep: bool = False, choose: Callable[[Tensor], int] | None = None) -> list[int]:
        """New token ids: the most likely ones, or what `choose` makes of logits (V,). Ends after an id in `stop` or `max_new_tokens`.

        The session stays as it is unless `keep` is set: then the new tokens are part of its text.
        """
        if max_new_tokens < 1:
            raise EditError("E-EDT-FORM", f"max_new_tokens={max_new_tokens}", "ask for at least one token")
        self._need_length(len(self._ids) + max_new_tokens)
        self._reserve(max_new_tokens)
        slots, logits, new = self._slots, self._logits, list[int]()
        free = slots.take(max_new_tokens)
        tables = self._tables(free[:1], high=None if self._decoder.compiled else max(slots.high, max(free) + 1))
        mask = self._mask(slots.positions(), [len(self._ids) - 1], tables.high)
        self._cache.use(tables)
        held, done = self._cache.snapshot(), False
        try:
            for i, slot in enumerate(free):
                token = int(logits.argmax()) if choose is None else int(choose(logits))
                new.append(token)
                if (i + 1 == max_new_tokens or token in stop) and not keep:
                    break
                tables.write.fill_(slot)
                mask[..., slot] = True if self._boolean else 0
                logits = self._decoder.step(token, len(self._ids) + i, mask, self._cache)
                if token in stop:
                    break
            done = keep
        finally:
            if not done:
                self._cache.restore(held)
        if keep:
            used = free[: len(new)]
            self._note_omega(used)
            self._slots = slots.extended(used)
            self._ids, self._logits, self._text = self._ids + new, logits, None
        return new

    # ---- the work

    def _apply(self, change: Plan) -> Edited:
        length = len(change.ids)
        self._need_length(length)
        first = next((p for p, old in enumerate(change.source) if old != p), length - 1)  # what stands before the first edit is as it was
        tail = max(self.tail - len(change.new), self.tail // 2)
        again = set(range(min(max(first, length - tail), length - 1), length))
        for p, old in enumerate(change.source):
            follows = old == (0 if p == 0 else change.source[p - 1] + 1) and (p == 0 or change.source[p - 1] >= 0)
            if old >= 0 and not follows:  # the first token behind an edit
                again |= set(range(p, min(p + self.refresh, length)))
        again -= set(change.new)
        self._reserve(len(change.new) + len(again))
        before, cache_before = self._slots, self._cache.snapshot()
        omegas = self._omegas
        try:
            live = {before.order[s] for p, s in enumerate(change.source) if s >= 0 and p not in again}
            slots, encode = self._cache.tidied(before, live).after(change, sorted(again))
            if self.form == "eager":
                slots = self._rewrite(change, slots, encode)
            logits = self._encode(slots, [change.ids[p] for p in encode], encode)
        except BaseException:
            self._slots, self._omegas = before, omegas
            self._cache.restore(cache_before)
            raise
        self._slots, self._ids, self._logits = slots, list(change.ids), logits
        self._note_omega([slots.order[p] for p in encode])
        return Edited(length, len(encode), slots.segments())

    @torch.no_grad()
    def _encode(self, slots: Slots, ids: list[int], positions: list[int]) -> Tensor:
        """Pass tokens at given positions through the model; logits (V,) of the last of them."""
        self._slots = slots
        write = [slots.order[p] for p in positions]
        tables = self._tables(write, high=slots.high)
        self._cache.use(tables)
        mask = self._mask(slots.positions(), positions, tables.high)
        tensor = torch.tensor([ids], device=self.device)
        return self._call(tensor, torch.tensor([positions], device=self.device), mask)

    @torch.no_grad()
    def _prefill(self, ids: list[int]) -> None:
        """Read a whole text into an empty cache."""
        slots = type(self._slots).fresh(len(ids), self._slots.size)
        self._slots = slots
        if self.rotary.varies:
            rope.omega_at(self.model, len(ids))  # forgets what longer texts have left
        tables = self._tables(list(range(len(ids))), high=len(ids))
        tables.fresh = True
        self._cache.use(tables)
        tensor = torch.tensor([ids], device=self.device)
        self._logits = self._call(tensor, torch.arange(len(ids), device=self.device)[None], None)
        self._ids = list(ids)
        self._note_omega(slots.order)

    def _call(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1]
        return logits

    def _rewrite(self, change: Plan, slots: Slots, encode: list[int]) -> Slots:
        """Keys in order of the text and turned to their positions, with holes for the tokens that are to be encoded."""
        length = len(change.ids)
        source = torch.tensor([-1 if p in set(encode) else slots.order[p] for p in range(length)])
        kept = source.clamp_min(0)
        old = torch.tensor(slots.stored)[kept]
        if self.rotary.varies:
            assert self._omegas is not None
            angles, row = change_angles(old, torch.arange(length), self._omegas[kept], rope.omega_at(self.model, length)), torch.arange(length)
        else:
            shifts, row = torch.unique((torch.arange(length) - old) * (source >= 0), return_inverse=True)
            angles = shifts.double()[:, None] * self.rotary.omega.cpu()[None]
        cos, sin = turns(angles, self._dtype)
        on = [t.to(self.device) for t in (source, row, cos, sin)]
        # one layer after the other, but nothing is dropped before the edit has succeeded
        for layer in self._cache.own:
            layer.keys, layer.values = layer.moved(*on)  # refused where pages are packed
        if self._omegas is not None:
            self._omegas = self._omegas.clone()
            self._omegas[:length] = rope.omega_now(self.model)
        return Slots.fresh(length, slots.size)

    def _tables(self, write: list[int], high: int | None) -> Tables:
        """Tables of the present slots."""
        shifts = self._slots.shifts()
        while len(shifts) > self._rows:
            self._rows *= 2
        cos, sin = turn_table(shifts, self.rotary, self._rows, self.device, self._dtype)
        row = self._slots.rows(shifts).to(self.device)
        to = torch.tensor(write, dtype=torch.long, device=self.device)
        turned = len(shifts) > 1 or (self._decoder.compiled and high is None)
        return Tables(to, row, cos, sin, self.rotary.layout, self._kernel, high=high, turned=turned)

    def _mask(self, at: Tensor, positions: list[int], high: int | None) -> Tensor:
        """(1, 1, Q, slots): a token sees the tokens before it and itself. Boolean, or added where the model's attention adds."""
        seen = at[None, :high] <= torch.tensor(positions)[:, None]
        mask = (seen & (at[:high] >= 0)).to(self.device)[None, None]
        if self._boolean:
            return mask
        return torch.zeros(mask.shape, dtype=self._dtype, device=self.device).masked_fill_(~mask, torch.finfo(self._dtype).min)

    # ---- small parts

    def _layer(self, layer: int) -> EditLayer | PackedEditLayer:
        return self._cache.own[layer]

    def _format_of(self, cache: str, form: str) -> CacheFormat | None:
        """The format of a packed cache, None for a dense one. Raises EditError, and CacheError where the text names no format."""
        if cache == "dense":
            return None
        if cache.split("(")[0].strip() in _EVICTING:
            cause = f"{cache} drops tokens, a set for each key head, and an edit needs those that are left to be the text's"
            raise EditError("E-EDT-CACHE", cause, 'use a format that keeps every token, such as "kivi(bits=4)"')
        try:
            fmt = parse(cache)
        except CacheError as error:
            raise EditError("E-EDT-CACHE", f"cache={cache!r}: {error.cause}", f'"dense" or a cache format: {error.next_step}') from error
        if self.why_eager:
            raise EditError("E-EDT-CACHE", f"{self.why_eager}, so keys have to be rewritten, which {fmt.spec} cannot", 'use cache="dense"')
        if form == "eager":
            raise eager_refused(fmt.spec)
        return fmt

    def _empty(self, size: int) -> Slots:
        return Slots(size) if self._format is None else Log(size_for(self._format, size))

    def _new_cache(self) -> EditCache | PackedEditCache:
        tables, size = self._tables([], high=None), self._slots.size
        if self._format is None:
            return EditCache(tables, size, self._turning)
        return PackedEditCache(tables, self._format, size, self._turning, self._bases)

    def _reserve(self, count: int) -> None:
        if self._slots.room() < count:
            self._slots = self._cache.dropped(self._slots)
        if self._slots.room() < count:
            size = max(2 * self._slots.size, self._slots.size + count)
            size = size if self._format is None else size_for(self._format, size)
            for layer in self._cache.own:
                layer.grow(size)
            self._slots = self._slots.grown(size)
            if self._omegas is not None:
                self._omegas = torch.cat((self._omegas, self._omegas.new_zeros(size - len(self._omegas), self._omegas.shape[1])))

    def _note_omega(self, slots: list[int]) -> None:
        """Remember the frequencies that tokens were just encoded with."""
        if not self.rotary.varies or not slots:
            return
        if self._omegas is None:
            self._omegas = torch.zeros(self._slots.size, self.rotary.omega.numel(), dtype=torch.float64)
        self._omegas[torch.tensor(slots)] = rope.omega_now(self.model)

    def _map(self) -> TextMap:
        if self._text is None:
            self._text = TextMap.of_ids(self.tokenizer, self._ids)
        return self._text

    def _need_length(self, length: int) -> None:
        limit = self.rotary.limit
        if limit is not None and length > limit:
            raise EditError("E-EDT-LENGTH", f"{length} tokens, the model's table of positions ends at {limit}", "keep the text shorter")

    def _read(self, ids: Any) -> list[int]:
        listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if listed and isinstance(listed[0], list):
            if len(listed) != 1:
                raise EditError("E-EDT-FORM", f"a batch of {len(listed)}", "one session holds one text")
            listed = listed[0]
        (whole,) = read_edits([(0, 0, listed)], 0, self._vocabulary)
        if not whole.ids:
            raise EditError("E-EDT-EMPTY", "there is no token", "start with one token at least")
        return list(whole.ids)
