"""The speculative loop: a draft model proposes a chain or a tree of tokens, one forward of the model judges all of them.

The output is that of the model alone: the same tokens under greedy decoding, the same distribution otherwise (runtime/speculation/rejection.py
says why). Temperature, top-k, top-p and penalty are applied to both models' logits before anything is drawn or compared. The draft's
tokens are drawn from the sequence's own random stream, so a seed gives the same text again, but not the text of a run without a draft.

Invariant between two rounds, for n tokens of prompt and continuation: the model's cache holds the first n - 1, the draft's n - 1 or n - 2 of
them (a last token that was drafted and kept was never read by the draft). A draft that was made out of the model (hf/draft.py) has no cache of
its own: it writes behind the model's keys and values, which the model then overwrites. It reads no prompt, and sees keys and values at
full precision, as in arXiv:2410.11305.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.hf.draft import draft_of
from effllm.hf.reader import Reader
from effllm.hf.request import Event, Pending, Request
from effllm.hf.sampling import Sampling, likeliest
from effllm.hf.static_decoding import refuse, room
from effllm.hf.steps import Compiled
from effllm.runtime.speculation import grow, gumbel, verify
from effllm.runtime.speculation.settings import Speculation
from effllm.runtime.speculation.stopping import Stopping
from effllm.runtime.speculation.tree import Tree


@dataclass
class Statistics:
    """Counts over all prompts of a call. A round is one forward of the model; it gives the drafted tokens that were accepted, and one more."""

    rounds: int = 0
    drafted: int = 0  # nodes of all trees
    accepted: int = 0
    draft_forwards: int = 0

    @property
    def tokens_per_round(self) -> float:
        """Accepted drafted tokens and the one that comes with them."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were kept."""
        return self.accepted / self.drafted if self.drafted else 0.0


class SpeculativeLoop:
    """Runs a request prompt after prompt."""

    def __init__(self, request: Request, compiled: Compiled | None, draft: Any, settings: Speculation, statistics: Statistics | None) -> None:
        """Raises PromptError (E-PRM-MODEL, E-PRM-ATTENTION, E-PRM-CAPACITY), OptionError (E-OPT-DRAFT)."""
        self.request, self.settings = request, settings
        self.statistics = Statistics() if statistics is None else statistics
        refuse(request.inner)
        smaller = draft_of(request.inner, draft)
        self.shared = isinstance(draft, (int, str))
        refuse(smaller)
        trees = settings.shape != "chain"
        self.target, self.draft = Reader(request.inner, compiled, trees), Reader(smaller, compiled, trees)
        levels = settings.levels
        extra = settings.nodes(levels) + settings.level_width(levels)
        longest = max((len(s.prompt) for s in request.sequences), default=0)
        self.capacity = room(longest, max((s.most for s in request.sequences), default=0), request.limit, compiled, extra)

    def events(self) -> Iterator[Event]:
        """All tokens of the first prompt, then those of the next."""
        for i, s in enumerate(self.request.sequences):
            if not s.most:
                continue
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.target.on(self.capacity))
                stack.enter_context(self.draft.on(self.capacity, self.target if self.shared else None))
                yield from self._sequence(i, s)

    def _sequence(self, i: int, s: Pending) -> Iterator[Event]:
        logits = self.target.prompt(s.prompt)
        tokens = [self.request.sampling.choose(logits, s.prompt, s.generator)]
        ready = self.shared
        while True:
            for token in tokens:
                event = self.request.take(i, token)
                yield event
                if event.done:
                    return
            if not ready:  # the draft reads the prompt once the first token is out
                self.draft.prompt(s.prompt[: self.draft.limit - 1])
                ready = True
            tokens = self._round(s)

    def _round(self, s: Pending) -> list[int]:
        """The next tokens, at least one."""
        return Round(self, s).run()


class Round:
    """One tree: drafted, judged, and what is right of it kept in both caches."""

    def __init__(self, loop: SpeculativeLoop, s: Pending) -> None:
        self.settings, self.target, self.draft, self.counts = loop.settings, loop.target, loop.draft, loop.statistics
        self.shared = loop.shared
        self.sampling: Sampling = loop.request.sampling
        self.stream = s.generator
        self.whole = s.whole()
        self.last = len(self.whole) - 1  # the root's slot and position
        # the deepest token must have a position in both models, and the one behind it must be wanted
        positions = min(loop.request.limit, self.draft.limit) - 1 - self.last
        self.levels = max(0, min(self.settings.levels, s.most - len(s.new) - 1, positions))
        self.tree = Tree.of(int(self.whole[-1]))
        self.read = 0  # nodes that the draft has read
        self.plainly = not self.sampling.temperature and self.sampling.repetition_penalty == 1 and self.settings.shape != "beam" and self.settings.stop is None
        self.stopping = Stopping(1.0 if self.settings.stop is None else self.settings.stop, self.settings.least, self.levels)

    def run(self) -> list[int]:
        """Tokens that follow."""
        self._grow()
        if self.shared:
            self.target.cache.seek(self.last)
        tree, slots = self.tree, [self.last + d for d in self.tree.depths]
        sight = None if self.settings.shape == "chain" else tree.sight()
        logits, _ = self.target.read(tree.tokens, slots, self._width(len(tree)), sight, slots)
        path, token = self._judge(logits)
        self.target.keep(self.last, [self.last, *(self.last + n for n in path)])
        if self.read and not self.shared:
            self.draft.keep(self.last, [self.last, *(self.last + n for n in path if n < self.read)])
        self.counts.rounds += 1
        self.counts.drafted += len(tree) - 1
        self.counts.accepted += len(path)
        return [*(tree.tokens[n] for n in path), token]

    def _grow(self) -> None:
        noise = None if not self.sampling.temperature else lambda v: gumbel.noise((v,), self.stream)
        if not self.levels:
            return
        if self.settings.shape == "chain":
            grow.chain(self.tree, self.levels, self._expand, noise, self._go_on)
        elif self.settings.shape == "constant":
            grow.constant(self.tree, self.settings.branching[: self.levels], self._expand, noise)
        else:
            grow.beam(self.tree, self.settings.width, self.levels, self._expand, noise)

    def _width(self, nodes: int) -> int:
        """Rows of the model's compiled forward: those of the largest tree; for chains that stop early 1 + a power of two."""
        most = self.settings.nodes(self.settings.levels)
        return min(most, 1 + (1 << max(0, nodes - 2).bit_length())) if self.settings.stop is not None and nodes > 1 else most

    @torch.no_grad()
    def _expand(self, nodes: list[int]) -> list[Tensor]:
        """The draft's distribution (V,) after each node; it reads them now. Where only their order counts, its logits."""
        self.counts.draft_forwards += 1
        wanted = self.settings.head is not None
        if nodes == [0]:
            start = self.draft.length
            if self.draft.static and not self.shared and start > self.last - 1 >= 0:  # two tokens always, so that there is one graph
                start = self.last - 1
                self.draft.cache.seek(start)
            ids = self.whole[start:].tolist()
            logits, hidden = self.draft.read(ids, range(start, self.last + 1), 1 if self.shared else 2, hidden=wanted)
            logits = logits[-1:]
        else:
            depths = [self.tree.depths[n] for n in nodes]
            sight, slots = None, [self.last + d for d in self.tree.depths[: nodes[-1] + 1]]
            if self.settings.shape != "chain":
                sight = self.tree.sight()[nodes, : nodes[-1] + 1]
            logits, hidden = self.draft.read(
                [self.tree.tokens[n] for n in nodes], [self.last + d for d in depths], self.settings.level_width(depths[0]), sight, slots, hidden=wanted
            )
            if hidden is not None:
                self.stopping.saw(float(self.settings.head(hidden[-1].to(next(self.settings.head.parameters()).device))))
        self.read = nodes[-1] + 1
        if self.plainly:
            return list(logits.cpu())
        return [self._distribution(row, node) for row, node in zip(logits.cpu(), nodes, strict=True)]

    def _go_on(self, tree: Tree) -> bool:
        node = len(tree) - 1
        if self.settings.head is None and self.settings.stop is not None:
            self.stopping.saw(float(tree.drafts[tree.parents[node]][tree.tokens[node]]))
        return self.stopping.go_on(node)

    def _scores(self, logits: Tensor, node: int) -> Tensor:
        """fp32 logits (V,) after a node, with the penalty for what comes before them."""
        if self.sampling.repetition_penalty == 1:
            return logits.float()
        before = torch.tensor([self.tree.tokens[n] for n in self.tree.path(node)], dtype=torch.int64)
        return self.sampling.penalize(logits, torch.cat([self.whole, before]))

    def _distribution(self, logits: Tensor, node: int) -> Tensor:
        scores = self._scores(logits, node)
        return self.sampling.probabilities(scores) if self.sampling.temperature else scores.softmax(-1)

    def _judge(self, logits: Tensor) -> tuple[list[int], int]:
        """Nodes that are kept, and the token behind them."""
        logits = logits.cpu()
        if self.sampling.temperature:
            return verify.sampled(self.tree, lambda node: self._distribution(logits[node], node), self.stream)
        if self.sampling.repetition_penalty == 1:
            return verify.greedy(self.tree, likeliest(logits))
        return verify.greedy(self.tree, [int(self._scores(row, n).argmax()) for n, row in enumerate(logits)])
