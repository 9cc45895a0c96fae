"""`effllm.generate`: many prompts of any lengths in one call, prefilled without padding and decoded as one batch.

    texts = effllm.generate(model, ["first prompt", "a second, longer one"], tokenizer=tok, max_new_tokens=64)
    for event in effllm.stream(model, prompts, max_new_tokens=64): ...

Each prompt gets what transformers' `generate` would return for it alone: the same tokens under greedy decoding, up to ties that the
order of floating-point sums decides. Prompts are packed into bins (runtime/prepack.py), their keys and values go to one extent each,
and a decoding step is one forward over the last tokens of all sequences that still run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from effllm.errors import OptionError
from effllm.hf.cache import CompressedCache
from effllm.hf.engine import Engine, Piece, Row, limit, vocabulary
from effllm.hf.sampling import Sampling, generators
from effllm.runtime.prepack import checked, prepack

BIN = 1024  # tokens of a prefill forward unless a prompt is longer: matrix products gain nothing beyond
Prompt = str | Tensor | Sequence[int]


@dataclass(frozen=True)
class Event:
    """A token of sequence `index`. `text`: what it adds, with a tokenizer. `done`: "eos", "stop" or "length" with its last token."""

    index: int
    token: int
    text: str = ""
    done: Literal["", "eos", "stop", "length"] = ""


@overload
def generate(model: Any, prompts: Sequence[str], **settings: Any) -> list[str]: ...
@overload
def generate(model: Any, prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]], **settings: Any) -> list[Tensor]: ...
def generate(model: Any, prompts: Any, **settings: Any) -> Any:
    """Continue every prompt; in their order, the texts that follow (for texts) or the ids of prompt and continuation (1-D, for ids).

    `model` is a causal LM of transformers: dense, packed by `effllm.compress`, or wrapped by torch.compile. `settings` are those of
    `stream`. Raises what `stream` raises.
    """
    run = _Run(model, prompts, **settings)
    for _ in run.events():
        pass
    return run.texts() if run.from_text else [run._whole(s) for s in run.sequences]


def stream(model: Any, prompts: Any, **settings: Any) -> Iterator[Event]:
    """Tokens as they come, of all prompts interleaved; the model is as before whenever the caller stops listening.

    Settings: `max_new_tokens` (20), `temperature` (0: greedy), `top_k`, `top_p`, `repetition_penalty`, `seed` (one, or one per prompt),
    `stop` (texts, with a tokenizer), `eos_token_id` (default: the model's), `tokenizer`, `capacity` (tokens of a prefill forward),
    `attention_mask` (B, S): which tokens of prompts (B, S) are no padding, on either side; padding is left out of the ids that come back.
    `cache`: a cache format such as "kivi(bits=4)", or a function that makes an empty transformers cache. Each sequence then has one of its own:
    prompts are read exactly, packed together as ever, and each goes into its cache when it is complete; decoding is one forward per sequence.
    A sequence also ends, with "length", where the model's positions end. Raises PromptError (E-PRM-*) and OptionError (E-OPT-*)
    before the first forward.
    """
    return _Run(model, prompts, **settings).events()


@dataclass
class _Sequence:
    """A sequence on its way."""

    prompt: Tensor
    most: int  # new tokens
    new: list[int]
    generator: torch.Generator | None
    row: Row | None = None
    cache: Any = None  # of its own, once its prompt is read, where one was asked for
    text: str = ""  # what was streamed
    seen: tuple[int, int] = (0, 0)  # tokens new[a:b] were streamed last; a decoder needs some before the next to place spaces


class _Run:
    """The sequences of one call and the loop over them."""

    def __init__(
        self, model: Any, prompts: Any, *, max_new_tokens: int = 20, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, stop: str | Sequence[str] = (), eos_token_id: int | Sequence[int] | None = None,
        tokenizer: Any = None, capacity: int | None = None, attention_mask: Tensor | None = None, cache: str | Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.capacity = model, tokenizer, capacity
        self.sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        prompts = prompts if isinstance(prompts, (str, Tensor)) else list(prompts)
        if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() == 1):
            raise OptionError("E-OPT-PROMPTS", "prompts is one prompt", "give a list of prompts: [prompt]")
        self.from_text = any(isinstance(p, str) for p in prompts)
        if max_new_tokens < 0 or max_new_tokens != int(max_new_tokens):
            raise OptionError("E-OPT-VALUE", f"max_new_tokens = {max_new_tokens}", "give 0 or more")
        if tokenizer is None and (self.from_text or self.stop):
            raise OptionError("E-OPT-TOKENIZER", "texts are given and no tokenizer", "pass tokenizer=, or token ids and no stop texts")
        if any(not s for s in self.stop):
            raise OptionError("E-OPT-VALUE", "an empty stop text", "leave it out")
        inner = getattr(model, "_orig_mod", model)
        known = vocabulary(inner)
        if attention_mask is not None:
            prompts = unpadded(prompts, attention_mask)
        ids = [checked(tokenizer(p)["input_ids"] if isinstance(p, str) else p, i, known) for i, p in enumerate(prompts)]
        self.eos = eos_of(inner, eos_token_id)
        longest = limit(inner.config.get_text_config(decoder=True)) if hasattr(inner, "config") else 1 << 30
        streams = generators(self.sampling, seed, len(ids))
        # positions may run out: what is written last is the token before the last new one
        self.sequences = [_Sequence(p, min(max_new_tokens, max(1, longest - len(p) + 1)), [], g) for p, g in zip(ids, streams, strict=True)]
        self.packing = prepack(ids, max([BIN, *map(len, ids)]) if capacity is None else capacity)
        self.cache = _maker(inner, cache)
        if cache is None:
            slots = sum(len(s.prompt) + max(0, s.most - 1) for s in self.sequences)
        else:  # the arena holds one bin at a time
            slots = max((sum(len(ids[i]) for i in b) for b in self.packing.bins), default=0)
        self.engine = Engine(model, max(1, slots))

    def texts(self) -> list[str]:
        """What follows each prompt, special tokens left out."""
        return [str(self.tokenizer.decode(s.new, skip_special_tokens=True)) for s in self.sequences]

    def events(self) -> Iterator[Event]:
        """Prefill by bins, then step by step; a bin's first tokens are streamed before the next bin is read."""
        running: list[int] = []
        if not any(s.most for s in self.sequences):
            return
        for members in self.packing.bins:
            for i in members:
                s = self.sequences[i]
                s.row = self.engine.open(len(s.prompt) + (max(0, s.most - 1) if self.cache is None else 0))
            yield from self._step([(i, self.sequences[i].prompt) for i in members], running)
        while running:
            step, running = [(i, torch.tensor(self.sequences[i].new[-1:])) for i in sorted(running)], []
            yield from self._step(step, running)

    def _step(self, work: list[tuple[int, Tensor]], running: list[int]) -> Iterator[Event]:
        logits = self._forward(work)
        found = [self.sequences[i] for i, _ in work]
        tokens = self.sampling.choose_all(logits, lambda n: self._whole(found[n]), [s.generator for s in found])
        for (i, _), token in zip(work, tokens, strict=True):
            event = self._take(i, token)
            if not event.done:
                running.append(i)
            yield event

    def _forward(self, work: list[tuple[int, Tensor]]) -> Tensor:
        """Logits (len(work), V): one forward for rows of the arena, one each for sequences with caches of their own."""
        own = [self.sequences[i] for i, _ in work]
        if own[0].cache is not None:
            return torch.cat([self._alone(s, ids) for s, (_, ids) in zip(own, work, strict=True)])
        rows = [s.row for s in own if s.row is not None]
        logits = self.engine.run([Piece(row, ids) for row, (_, ids) in zip(rows, work, strict=True)])
        if self.cache is not None:
            for s, row in zip(own, rows, strict=True):
                s.cache, s.row = self.engine.export(row, self.cache()), None
                self.engine.close(row)
        return logits

    @torch.no_grad()
    def _alone(self, s: _Sequence, ids: Tensor) -> Tensor:
        at = torch.tensor([[len(s.prompt) + len(s.new) - 1]], device=self.engine.device)
        out = self.model(input_ids=ids[None].to(self.engine.device), position_ids=at, past_key_values=s.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _whole(self, s: _Sequence) -> Tensor:
        return torch.cat([s.prompt, torch.tensor(s.new, dtype=torch.int64)])

    def _take(self, i: int, token: int) -> Event:
        s = self.sequences[i]
        s.new.append(token)
        done: Literal["", "eos", "stop", "length"] = "eos" if token in self.eos else "length" if len(s.new) >= s.most else ""
        text = ""
        if self.tokenizer is not None:
            text = self._more(s, flush=bool(done))
            if done != "eos" and any(t in s.text[-len(text) - len(t) :] for t in self.stop if text):
                done = "stop"
        return Event(i, token, text, done)

    def _more(self, s: _Sequence, flush: bool) -> str:
        """The text since the last call; none while the last token is half of a character."""
        start, end = s.seen
        before, now = (str(self.tokenizer.decode(s.new[start:to], skip_special_tokens=True)) for to in (end, len(s.new)))
        if now.endswith("\ufffd") and not flush:
            return ""
        s.seen, s.text = (end, len(s.new)), s.text + now[len(before) :]
        return now[len(before) :]


def unpadded(prompts: Any, mask: Tensor) -> list[Tensor]:
    """The tokens of each row of prompts (B, S) that the mask (B, S) of 0 and 1 shows. Raises OptionError (E-OPT-MASK)."""
    step = "give token ids (B, S) and a mask of the same shape, as a tokenizer with padding=True makes them"
    if not isinstance(prompts, Tensor) or prompts.dim() != 2 or prompts.shape != mask.shape:
        have = tuple(prompts.shape) if isinstance(prompts, Tensor) else f"a {type(prompts).__name__}"
        raise OptionError("E-OPT-MASK", f"the prompts are {have}, the attention mask {tuple(mask.shape)}", step)
    rows = []
    for i, (ids, shown) in enumerate(zip(prompts, mask.to(prompts.device) != 0, strict=True)):
        at = shown.nonzero()[:, 0]
        if len(at) and int(at[-1] - at[0]) + 1 != len(at):
            raise OptionError("E-OPT-MASK", f"the attention mask of prompt {i} has a hole", "mask only what lies before or behind a prompt")
        rows.append(ids[shown])
    return rows


def _maker(model: Any, cache: str | Callable[[], Any] | None) -> Callable[[], Any] | None:
    """What makes a sequence's cache. A format is tried once, so that a wrong one raises CacheError before the first forward."""
    if not isinstance(cache, str):
        return cache
    CompressedCache(model, cache)
    return lambda: CompressedCache(model, cache)


def eos_of(model: Any, given: int | Sequence[int] | None = None) -> frozenset[int]:
    """The ids that end a sequence: those given, else the model's own."""
    found = given
    if found is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
