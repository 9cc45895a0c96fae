"""Which queries attend to which keys, as a table instead of a mask: one row a segment.

A segment is a run of queries of one sequence and the run of keys that hold this sequence so far, the queries' own last. Query i of a
segment (from 0) attends to its first k_len - q_len + i + 1 keys. A prompt read at once, a chunk of a prompt, and a decoding step
are the same thing with other lengths; a flattened batch is a list of them. The table is int32 (S, 4): q_start, q_len, k_start, k_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effllm.errors import PromptError

COLUMNS = 4


class Segment(NamedTuple):
    """A row of the table, in tokens."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int


def table(segments: Sequence[Segment], queries: int, keys: int) -> Tensor:
    """int32 (S, 4) for a batch of `queries` tokens over `keys` cached ones. Raises PromptError (E-PRM-SEGMENTS) where a row is impossible."""
    end = 0
    for s in sorted(segments):
        ok = s.q_len >= 1 and s.k_len >= s.q_len and s.k_start >= 0 and s.k_start + s.k_len <= keys and s.q_start >= end and s.q_start + s.q_len <= queries
        if not ok:
            cause = f"{s} does not fit {queries} queries and {keys} keys, or shares queries with the one before"
            raise PromptError("E-PRM-SEGMENTS", cause, "give disjoint runs of queries, each over at least as many keys")
        end = s.q_start + s.q_len
    return torch.tensor(segments, dtype=torch.int32).reshape(-1, COLUMNS)
