"""Random operands of a problem, in a provider's layout: what a candidate is verified and timed on.

Codes are random, scales spread over ten powers of two so that a swapped or shifted scale cannot hide. The weight comes in several
copies that together exceed the last-level cache: in decoding every weight is read once per token and is never in cache. An op names
its generator in `Op.inputs`; the ones below serve the bipolar linears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import fingerprint
from effllm.errors import TuneError, nearest
from effllm.lowering.op import OPS, Problem
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar

_TILE = 16  # merged weights fill whole tiles
_MOST = 512  # copies
_DEFAULT_CACHE = 32 << 20  # bytes, where the system does not tell


@dataclass(frozen=True)
class Expected:
    """A part of the output with its exact value in fp64, and what plain torch computes for it in the problem's dtype."""

    pick: Callable[[Tensor], Tensor]
    true: Tensor
    plain: Tensor


@dataclass(frozen=True)
class Operands:
    """`args[i]` are the op's arguments with the i-th copy of the weight, of `nbytes` bytes; `expected` computes what to compare with."""

    args: Sequence[tuple[Any, ...]]
    nbytes: int
    expected: Callable[[], list[Expected]]


Generator = Callable[[Problem, str, int, int], Operands]  # problem, layout, copies, seed


def make(problem: Problem, layout: str, copies: int | None = None, seed: int = 0) -> Operands:
    """Operands for a problem with static rows. `copies` defaults to what rotates past the last-level cache.

    Raises TuneError: E-TUN-OP for an unknown op or one without a generator, E-TUN-SHAPE for a shape that cannot be.
    """
    op = OPS.get(problem.op)
    if op is None:
        raise TuneError("E-TUN-OP", f"unknown op {problem.op!r}", nearest(problem.op, OPS))
    if op.inputs is None:
        raise TuneError("E-TUN-OP", f"{problem.op} has no input generator, so it cannot be measured", "give the op an `inputs` function")
    if problem.m is None or min(problem.m, problem.n, problem.k) < 1:
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: m={problem.m}, n={problem.n}, k={problem.k}", "give positive whole numbers")
    made: Operands = op.inputs(problem, layout, 1 if copies is None else copies, seed)
    if copies is None:
        made = copied(made, rotation(made.nbytes, problem.device))
    return made


def cache_bytes(device: str) -> int:
    """The last-level cache of a device in bytes."""
    where = torch.device(device)
    if where.type == "cuda":
        return fingerprint.gpu(torch.cuda.current_device() if where.index is None else where.index).l2 or _DEFAULT_CACHE
    return fingerprint.cache_bytes(3) or fingerprint.cache_bytes(2) or _DEFAULT_CACHE


def rotation(nbytes: int, device: str) -> int:
    """Copies of a weight of `nbytes` that exceed the last-level cache: twice on CPU, five times on a GPU (its L2 keeps what is new)."""
    factor = 2 if torch.device(device).type == "cpu" else 5
    return max(2, min(_MOST, -(-factor * cache_bytes(device) // max(1, nbytes))))


def copied(made: Operands, copies: int) -> Operands:
    """The same operands with `copies` copies of all tensors."""

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return [clone(v) for v in value] if isinstance(value, list) else value

    first = made.args[0]
    return Operands([first, *(tuple(clone(v) for v in first) for _ in range(copies - 1))], made.nbytes, made.expected)


@dataclass(frozen=True)
class _Weight:
    """Codes (N, Kp) and scales (N, G) behind packed tensors."""

    codes: Tensor
    scale: Tensor
    low: Tensor | None
    zero: float

    def rows(self, index: Tensor, group: int, k: int) -> Tensor:
        """Rows of the dense fp32 weight."""
        low = None if self.low is None else self.low[index]
        return bipolar.dequantize(self.codes[index], self.scale[index], low, self.zero, group)[:, :k]


def parts(n: int) -> list[int]:
    """Rows of the weights that a merged problem of `n` outputs is made of: up to three, each of whole tiles. Raises TuneError."""
    tiles, rest = divmod(n, _TILE)
    if rest or not tiles:
        raise TuneError("E-TUN-SHAPE", f"{n} outputs of merged weights do not fill tiles of {_TILE}", f"give a multiple of {_TILE}")
    first = max(1, tiles // 2)
    second = (tiles - first) // 2
    return [t * _TILE for t in (first, second, tiles - first - second) if t]


def bipolar_linear(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of bipolar_linear, _a8, _many and _a8_many."""
    g = torch.Generator().manual_seed(seed)
    m, n, k, bits, group = problem.m or 1, problem.n, problem.k, problem.bits, problem.group
    a8, many = problem.act == "a8", problem.op.endswith("_many")
    if not 1 <= bits <= 8 or group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: bits={bits}, group={group}", f"bits is 1 to 8, group one of {(bipolar.CHANNEL, *bipolar.GROUPS)}")
    sizes = parts(n) if many else [n]
    grid = "affine" if problem.affine else "symmetric"
    kp, groups = bipolar.padded(k, group), bipolar.groups(k, group)
    codes = torch.randint(0, 2**bits, (n, kp), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=g) + 0.5) * 2.0 ** torch.randint(-6, 5, (n, groups), generator=g) / 2**bits
    scale = scale.to(problem.scale_dtype)
    low = torch.randn(n, groups, generator=g).to(problem.scale_dtype) if problem.affine else None
    whole = _Weight(codes, scale, low, bipolar.zero_point(bits, grid))
    packed: list[dict[str, Tensor]] = []
    at = 0
    for size in sizes:
        cut = slice(at, at + size)
        one = bipolar.make(codes[cut], scale[cut], None if low is None else low[cut], k=k, bits=bits, group=group, grid=grid)
        packed.append({key: t.to(problem.device) for key, t in layouts.get(layout).repack(one).items()})
        at += size
    if a8:
        x = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
        xs = 2.0 ** torch.randint(-8, -3, (m, 1), generator=g).float()
        head: tuple[Tensor, ...] = (x.to(problem.device), xs.to(problem.device))
    else:
        x = (torch.randn(m, k, generator=g) * 2.0 ** torch.randint(-3, 2, (m, 1), generator=g)).to(problem.dtype)
        xs = None
        head = (x.to(problem.device),)
    tail = (bits, group, whole.zero, *((problem.dtype,) if a8 else ()))
    if many:
        lists = [[p[key] for p in packed] if key in packed[0] else [] for key in ("codes", "scale", "minimum")]
        args: tuple[Any, ...] = (*head, *lists, *tail)
    else:
        args = (*head, packed[0]["codes"], packed[0]["scale"], packed[0].get("minimum"), None, n, *tail)
    nbytes = sum(t.numel() * t.element_size() for p in packed for t in p.values())
    made = Operands([args], nbytes, lambda: _expected(problem, whole, x, xs, seed))
    return made if copies == 1 else copied(made, copies)


def _expected(problem: Problem, w: _Weight, x: Tensor, xs: Tensor | None, seed: int) -> list[Expected]:
    """All of a small output; of a large one some rows whole, and all rows at the first, the last and some other outputs."""
    m, n = x.shape[0], problem.n
    every_row, every_column = torch.arange(m), torch.arange(n)
    if m <= 8:
        return [_part(problem, w, x, xs, every_row, every_column)]
    g = torch.Generator().manual_seed(seed + 1)
    some_rows = torch.unique(torch.cat([torch.tensor([0, m - 1]), torch.randint(0, m, (2,), generator=g)]))
    edge = torch.arange(min(_TILE, n))
    some_columns = torch.unique(torch.cat([edge, n - 1 - edge, torch.randint(0, n, (32,), generator=g)]))
    return [_part(problem, w, x, xs, some_rows, every_column), _part(problem, w, x, xs, every_row, some_columns)]


def _part(problem: Problem, w: _Weight, x: Tensor, xs: Tensor | None, rows: Tensor, columns: Tensor) -> Expected:
    dense, act = w.rows(columns, problem.group, problem.k), x[rows]
    true = torch.nn.functional.linear(act.double(), dense.double())
    if xs is None:
        plain = torch.nn.functional.linear(act, dense.to(problem.dtype))
    else:
        true = true * xs[rows].double()
        plain = torch.nn.functional.linear(act.float() * xs[rows], dense).to(problem.dtype)
    return Expected(lambda y: y.reshape(-1, problem.n)[rows][:, columns], true, plain)
