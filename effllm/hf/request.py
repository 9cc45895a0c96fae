"""What every decode loop of `effllm.generate` needs of a call: checked prompts, sampling, ends of sequences, and text as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effllm.errors import OptionError
from effllm.hf.engine import limit, vocabulary
from effllm.hf.sampling import Sampling, generators
from effllm.runtime.prepack import checked


@dataclass(frozen=True)
class Event:
    """A token of sequence `index`. `text`: what it adds, with a tokenizer. `done`: "eos", "stop" or "length" with its last token."""

    index: int
    token: int
    text: str = ""
    done: Literal["", "eos", "stop", "length"] = ""


@dataclass
class Pending:
    """A sequence on its way."""

    prompt: Tensor
    most: int  # new tokens
    new: list[int]
    generator: torch.Generator | None
    row: Any = None  # in the arena
    cache: Any = None  # of its own, once its prompt is read, where one was asked for
    text: str = ""  # what was streamed
    seen: tuple[int, int] = (0, 0)  # tokens new[a:b] were streamed last; a decoder needs some before the next to place spaces

    def whole(self) -> Tensor:
        """Prompt and continuation."""
        return torch.cat([self.prompt, torch.tensor(self.new, dtype=torch.int64)])


class Request:
    """The sequences of one call. Raises PromptError (E-PRM-*) and OptionError (E-OPT-*)."""

    def __init__(
        self, model: Any, prompts: Any, *, max_new_tokens: int = 20, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, stop: str | Sequence[str] = (), eos_token_id: int | Sequence[int] | None = None,
        tokenizer: Any = None, attention_mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.inner = getattr(model, "_orig_mod", model)
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
        known = vocabulary(self.inner)
        if attention_mask is not None:
            prompts = unpadded(prompts, attention_mask)
        ids = [checked(tokenizer(p)["input_ids"] if isinstance(p, str) else p, i, known) for i, p in enumerate(prompts)]
        self.eos = eos_of(self.inner, eos_token_id)
        self.limit = limit(self.inner.config.get_text_config(decoder=True)) if hasattr(self.inner, "config") else 1 << 30
        streams = generators(self.sampling, seed, len(ids))
        # positions may run out: what is written last is the token before the last new one
        most = [min(max_new_tokens, max(1, self.limit - len(p) + 1)) for p in ids]
        self.sequences = [Pending(p, m, [], g) for p, m, g in zip(ids, most, streams, strict=True)]

    def texts(self) -> list[str]:
        """What follows each prompt, special tokens left out."""
        return [str(self.tokenizer.decode(s.new, skip_special_tokens=True)) for s in self.sequences]

    def take(self, i: int, token: int) -> Event:
        """Sequence i goes on with a token."""
        s = self.sequences[i]
        s.new.append(token)
        done: Literal["", "eos", "stop", "length"] = "eos" if token in self.eos else "length" if len(s.new) >= s.most else ""
        text = ""
        if self.tokenizer is not None:
            text = self._more(s, flush=bool(done))
            if done != "eos" and any(t in s.text[-len(text) - len(t) :] for t in self.stop if text):
                done = "stop"
        return Event(i, token, text, done)

    def _more(self, s: Pending, flush: bool) -> str:
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


def eos_of(model: Any, given: int | Sequence[int] | None = None) -> frozenset[int]:
    """The ids that end a sequence: those given, else the model's own."""
    found = given
    if found is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
