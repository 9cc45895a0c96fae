"""How a draft model's distributions become a tree: a chain that may stop early, or a tree of siblings without replacement.

`expand(nodes)` gives the distribution (V,) of what follows each node. With a `noise` of None the draft is greedy: the likeliest tokens in the
place of random ones, and `chain` and `constant` look at nothing but the order, which logits have, too.

* `chain`: one token after the other; `go_on(tree)` is asked after each (SpecDec++, arXiv:2405.19715).
* `constant`: level l gives each node branching[l] children (RSD-C, arXiv:2402.14160).
* `beam`: the `width` largest of a level by stochastic beam search, over all its parents (RSD-S, the same paper).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effllm.runtime.speculation import gumbel
from effllm.runtime.speculation.tree import Tree

Expand = Callable[[list[int]], Sequence[Tensor]]
Noise = Callable[[int], Tensor]  # V independent Gumbel numbers


def chain(tree: Tree, tokens: int, expand: Expand, noise: Noise | None, go_on: Callable[[Tree], bool]) -> Tree:
    """Up to `tokens` nodes, one below the other."""
    node = 0
    for _ in range(tokens):
        [p] = expand([node])
        tree.drafts[node] = p
        node = tree.add(node, _ordered(p, 1, noise)[0])
        if not go_on(tree):
            break
    return tree


def constant(tree: Tree, branching: Sequence[int], expand: Expand, noise: Noise | None) -> Tree:
    """Every node of level l gets branching[l] children, fewer where the draft has fewer tokens."""
    level = [0]
    for count in branching:
        below: list[int] = []
        for node, p in zip(level, expand(level), strict=True):
            tree.drafts[node] = p
            below += [tree.add(node, token) for token in _ordered(p, count, noise)]
        level = below
    return tree


def beam(tree: Tree, width: int, depth: int, expand: Expand, noise: Noise | None) -> Tree:
    """At most `width` nodes a level: the largest of all children of the level above."""
    level, likely, value = [0], torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _ in range(depth):
        rows = torch.stack(list(expand(level)))
        phi = rows.double().log() + likely[:, None]
        perturbed = phi if noise is None else torch.stack([gumbel.conditioned(float(g), f + noise(len(f))) for g, f in zip(value, phi, strict=True)])
        picked = gumbel.top(perturbed.flatten(), width)
        tree.drafts |= dict(zip(level, rows, strict=True))
        v = rows.shape[1]
        level = [tree.add(level[i // v], i % v) for i in picked]
        likely, value = phi.flatten()[picked], perturbed.flatten()[picked]
    return tree


def _ordered(p: Tensor, count: int, noise: Noise | None) -> list[int]:
    """Tokens of p (V,): drawn without replacement, or the likeliest."""
    if noise is None:
        return [int(p.max(-1).indices)] if count == 1 else p.topk(min(count, len(p))).indices.tolist()
    return gumbel.top(p.double().log() + noise(len(p)), count)
