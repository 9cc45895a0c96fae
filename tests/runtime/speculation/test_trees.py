"""Trees, and whole rounds on a toy whose target and draft are tables: what comes out is distributed as the target alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effllm.runtime.speculation import grow, gumbel, verify
from effllm.runtime.speculation.tree import Tree
from tests.runtime.speculation.chi import LIMIT, deviation

V = 4


def table(seed: int) -> Tensor:
    """Next-token distributions by last token."""
    return (1.3 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


TARGET, DRAFT = table(1), table(2)


def grown(kind: str, tree: Tree, p: Tensor, stream: torch.Generator | None) -> Tree:
    def expand(nodes: list[int]) -> Tensor:
        return p[[tree.tokens[n] for n in nodes]]

    noise = None if stream is None else lambda v: gumbel.noise((v,), stream)
    if kind == "chain":
        return grow.chain(tree, 3, expand, noise, lambda t: True)
    if kind == "stopping":  # stops by the draft's own probability
        return grow.chain(tree, 3, expand, noise, lambda t: float(t.drafts[t.parents[-1]][t.tokens[-1]]) > 0.4)
    if kind == "constant":
        return grow.constant(tree, (2, 2, 1), expand, noise)
    return grow.beam(tree, 3, 3, expand, noise)


def pairs(kind: str, rounds: int, p: Tensor) -> tuple[Tensor, float]:
    """Counts (V, V) of the first two tokens after token 0, and accepted tokens a round."""
    stream, counts, accepted = torch.Generator().manual_seed(3), torch.zeros(V, V), 0
    for _ in range(rounds):
        tree = grown(kind, Tree.of(0), p, stream)
        path, token = verify.sampled(tree, lambda n, t=tree: TARGET[t.tokens[n]], stream)  # type: ignore[misc]
        out = [*(tree.tokens[n] for n in path), token]
        accepted += len(path)
        if len(out) == 1:
            out.append(int(torch.multinomial(TARGET[out[0]], 1, generator=stream)))
        counts[out[0], out[1]] += 1
    return counts, accepted / rounds


WANT = TARGET[0][:, None] * TARGET


@pytest.mark.parametrize("kind", ["chain", "stopping", "constant", "beam"])
def test_a_round_gives_what_the_target_gives(kind: str) -> None:
    counts, accepted = pairs(kind, 5000, DRAFT)
    assert deviation(counts, WANT) < LIMIT
    assert deviation(counts, DRAFT[0][:, None] * DRAFT) > LIMIT  # the test tells them apart
    assert 0.3 < accepted < 2.5


def test_a_draft_that_claims_another_distribution_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing from one distribution and judging by another biases the output: what filters applied to one model alone would do."""
    real = verify.sampled

    def unfiltered(tree: Tree, target: Callable[[int], Tensor], stream: torch.Generator | None) -> tuple[list[int], int]:
        tree.drafts = {n: d.square() / d.square().sum() for n, d in tree.drafts.items()}
        return real(tree, target, stream)

    monkeypatch.setattr(verify, "sampled", unfiltered)
    assert deviation(pairs("chain", 5000, DRAFT)[0], WANT) > LIMIT


@pytest.mark.parametrize("kind", ["chain", "constant", "beam"])
def test_a_perfect_draft_is_accepted_to_the_end(kind: str) -> None:
    stream = torch.Generator().manual_seed(4)
    for _ in range(50):
        tree = grown(kind, Tree.of(0), TARGET, stream)
        path, _ = verify.sampled(tree, lambda n, t=tree: TARGET[t.tokens[n]], stream)  # type: ignore[misc]
        # a beam may have cut the branch that is taken; where it goes on, it is accepted
        assert not tree.children(path[-1] if path else 0)


@pytest.mark.parametrize("kind", ["chain", "stopping", "constant", "beam"])
def test_greedy_trees_give_greedy_tokens(kind: str) -> None:
    for seed in range(20):
        p, start = table(seed), seed % V
        tree = grown(kind, Tree.of(start), p, None)
        path, token = verify.greedy(tree, [int(TARGET[t].argmax()) for t in tree.tokens])
        out, last = [*(tree.tokens[n] for n in path), token], start
        for t in out:
            assert t == int(TARGET[last].argmax())
            last = t


def test_the_first_beam_is_a_draw_of_a_sequence() -> None:
    """The largest sequence of a level has the draft's own probability: marginals of stochastic beam search."""
    stream, counts = torch.Generator().manual_seed(5), torch.zeros(V, V)
    for _ in range(5000):
        tree = grown("beam", Tree.of(0), DRAFT, stream)
        a, b = tree.path(next(n for n in range(len(tree)) if tree.depths[n] == 2))
        counts[tree.tokens[a], tree.tokens[b]] += 1
    assert deviation(counts, DRAFT[0][:, None] * DRAFT) < LIMIT


@pytest.mark.parametrize("kind", ["constant", "beam"])
def test_siblings_differ_and_stand_in_order(kind: str) -> None:
    stream = torch.Generator().manual_seed(6)
    for _ in range(30):
        tree = grown(kind, Tree.of(1), DRAFT, stream)
        for node in range(len(tree)):
            tokens = [tree.tokens[c] for c in tree.children(node)]
            assert len(set(tokens)) == len(tokens) and all(tree.parents[c] < c for c in tree.children(node))
        assert all(tree.depths[c] == tree.depths[tree.parents[c]] + 1 for c in range(1, len(tree)))
        assert tree.depths == sorted(tree.depths)  # level by level: rows of a cache are contiguous
    assert len(grown("constant", Tree.of(0), DRAFT, stream)) == 1 + 2 + 4 + 4


def test_sight_is_ancestors_and_self() -> None:
    tree = Tree.of(9)
    a, b = tree.add(0, 1), tree.add(0, 2)
    c, d = tree.add(a, 3), tree.add(b, 4)
    e = tree.add(c, 5)
    assert tree.path(e) == [a, c, e] and tree.children(0) == [a, b] and not tree.is_chain
    for node in range(len(tree)):
        assert tree.sight()[node].nonzero()[:, 0].tolist() == sorted([0, *tree.path(node)])
    assert tree.depths == [0, 1, 1, 2, 2, 3] and d == 4
    line = grown("chain", Tree.of(0), DRAFT, None)
    assert line.is_chain and torch.equal(line.sight(), torch.ones(4, 4).tril().bool())


def test_fewer_children_where_the_draft_knows_fewer_tokens() -> None:
    p = torch.zeros(V, V, dtype=torch.float64)
    p[:, 1], p[:, 2] = 0.6, 0.4
    stream = torch.Generator().manual_seed(7)
    tree = grow.constant(Tree.of(0), (4, 3), lambda nodes: p[[0] * len(nodes)], lambda v: gumbel.noise((v,), stream))
    assert len(tree) == 1 + 2 + 4
    assert set(grow.beam(Tree.of(0), 3, 1, lambda nodes: p[[0]], None).tokens[1:]) == {1, 2}
