"""What an axis of a tensor consists of: atoms, products of factors (heads × head_dim) and sums of parts (q | k | v).

Every axis starts as one atom. A view splits it into a product, a chunk into a sum, and an addition makes two axes the same; an atom that is
split or merged keeps pointing at what became of it, so every tensor seen earlier follows. What cannot be expressed pins the atoms
involved: a pinned atom takes no permutation, and the first reasons are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

_REASONS = 4  # an axis such as the sequence is pinned by hundreds of ops; the first few say enough


class Atom:
    """An axis, or a factor or part of one, that no operation has looked inside so far. Merged and split in place."""

    __slots__ = ("definition", "pins", "rotary", "size", "used")

    def __init__(self, size: int) -> None:
        self.size = size
        self.definition: Expr | None = None
        self.pins: list[str] = []
        self.rotary = False  # cosines and sines are taken of it
        self.used = False  # something was computed of it, rather than moved


@dataclass(frozen=True, eq=False)
class Prod:
    """Factors of an axis, slowest first. No factors is an axis of size 1."""

    factors: tuple[Expr, ...]

    @property
    def size(self) -> int:
        """Product of the factors' sizes."""
        return prod(f.size for f in self.factors)


@dataclass(frozen=True, eq=False)
class Sum:
    """Parts of an axis, one after the other."""

    parts: tuple[Expr, ...]

    @property
    def size(self) -> int:
        """Sum of the parts' sizes."""
        return sum(p.size for p in self.parts)


Expr = Atom | Prod | Sum
UNIT = Prod(())


def fresh(size: int, pinned: str = "") -> Expr:
    """A new axis that nothing is known of; with a reason, one that must keep its order."""
    if size == 1:
        return UNIT
    atom = Atom(size)
    if pinned:
        atom.pins.append(pinned)
    return atom


def resolve(e: Expr) -> Expr:
    """The present form: merged and split atoms replaced, nested products and sums flattened, axes of size 1 dropped from products."""
    if isinstance(e, Atom):
        if e.definition is None:
            return e
        e.definition = resolve(e.definition)
        return e.definition
    if isinstance(e, Prod):
        factors: list[Expr] = []
        for f in map(resolve, e.factors):
            factors.extend(f.factors if isinstance(f, Prod) else (f,) if f.size != 1 else ())
        return factors[0] if len(factors) == 1 else Prod(tuple(factors)) if factors else UNIT
    parts: list[Expr] = []
    for p in map(resolve, e.parts):
        parts.extend(p.parts if isinstance(p, Sum) else (p,))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def leaves(e: Expr) -> Iterator[Atom]:
    """The atoms of an axis as it is now, in order; one that occurs twice comes twice."""
    e = resolve(e)
    if isinstance(e, Atom):
        yield e
    else:
        for inner in e.factors if isinstance(e, Prod) else e.parts:
            yield from leaves(inner)


def pin(e: Expr, reason: str) -> None:
    """No permutation of any atom of this axis from now on."""
    for atom in leaves(e):
        if len(atom.pins) < _REASONS and reason not in atom.pins:
            atom.pins.append(reason)


def _become(atom: Atom, e: Expr) -> None:
    atom.definition = e
    for leaf in leaves(e):
        leaf.rotary |= atom.rotary
        leaf.used |= atom.used
        leaf.pins.extend(r for r in atom.pins if r not in leaf.pins and len(leaf.pins) < _REASONS)


def unify(a: Expr, b: Expr, why: str) -> None:
    """Let two axes of one size be permuted together from now on; pins both where their structures do not fit together."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.size != b.size:
        _give_up((a, b), why, "sizes differ")
    elif isinstance(a, Atom):
        _become(a, b)
    elif isinstance(b, Atom):
        _become(b, a)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _unify_products(a, b, why)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(a, b, why)
    else:
        whole, product = (a, b) if isinstance(a, Sum) else (b, a)
        assert isinstance(whole, Sum) and isinstance(product, Prod)
        lead, rest = product.factors[0], product.factors[1:]
        inner = prod(f.size for f in rest)
        if any(p.size % inner for p in whole.parts):
            _give_up((a, b), why, "parts cut through blocks")
            return
        leads = tuple(fresh(p.size // inner) for p in whole.parts)
        unify(lead, Sum(leads), why)
        for part, outer in zip(whole.parts, leads, strict=True):
            unify(part, Prod((outer, *rest)), why)


def _give_up(axes: Iterable[Expr], why: str, what: str) -> None:
    for e in axes:
        pin(e, f"{why}: {what}")


def _unify_products(a: Prod, b: Prod, why: str) -> None:
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size == y.size:
            unify(x, y, why)
        elif x.size % y.size == 0:
            outer, inner = factor(x, x.size // y.size, why)
            unify(outer, y, why)
            left.insert(0, inner)
        elif y.size % x.size == 0:
            outer, inner = factor(y, y.size // x.size, why)
            unify(outer, x, why)
            right.insert(0, inner)
        else:
            _give_up((x, y, *left, *right), why, "blocks of different sizes")
            return


def _unify_sums(a: Sum, b: Sum, why: str) -> None:
    left, right = list(a.parts), list(b.parts)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size:
            x, tail = cut(x, y.size, why)
            left.insert(0, tail)
        elif y.size > x.size:
            y, tail = cut(y, x.size, why)
            right.insert(0, tail)
        unify(x, y, why)


def cut(e: Expr, at: int, why: str) -> tuple[Expr, Expr]:
    """Two parts of an axis, split before position `at` (0 < at < size)."""
    e = resolve(e)
    if isinstance(e, Atom):
        first, second = fresh(at), fresh(e.size - at)
        _become(e, Sum((first, second)))
        return first, second
    if isinstance(e, Sum):
        i = 0
        while at >= e.parts[i].size:
            at -= e.parts[i].size
            i += 1
        if at == 0:
            return resolve(Sum(e.parts[:i])), resolve(Sum(e.parts[i:]))
        first, second = cut(e.parts[i], at, why)
        return resolve(Sum((*e.parts[:i], first))), resolve(Sum((second, *e.parts[i + 1 :])))
    inner = prod(f.size for f in e.factors[1:])
    if at % inner:
        _give_up((e,), why, "cuts through a block")
        return fresh(at, f"{why}: cuts through a block"), fresh(e.size - at, f"{why}: cuts through a block")
    first, second = cut(e.factors[0], at // inner, why)
    return resolve(Prod((first, *e.factors[1:]))), resolve(Prod((second, *e.factors[1:])))


def pieces(e: Expr, sizes: Sequence[int], why: str) -> list[Expr]:
    """Consecutive parts of an axis; the sizes add up to its size, zeros are left out."""
    found: list[Expr] = []
    for size in sizes:
        if size == 0:
            found.append(fresh(0))
        elif size == e.size:
            found.append(e)
        else:
            first, e = cut(e, size, why)
            found.append(first)
    return found


def factor(e: Expr, inner: int, why: str) -> tuple[Expr, Expr]:
    """Outer and inner factor of an axis whose size is a multiple of `inner`."""
    e = resolve(e)
    outer = e.size // inner
    if outer == 1:
        return UNIT, e
    if inner == 1:
        return e, UNIT
    if isinstance(e, Atom):
        a, b = fresh(outer), fresh(inner)
        _become(e, Prod((a, b)))
        return a, b
    found = _factor_product(e, outer, why) if isinstance(e, Prod) else _factor_sum(e, inner, why)
    if found is None:
        _give_up((e,), why, "view across blocks")
        return fresh(outer, f"{why}: view across blocks"), fresh(inner, f"{why}: view across blocks")
    return found


def _factor_product(e: Prod, outer: int, why: str) -> tuple[Expr, Expr] | None:
    taken: list[Expr] = []
    rest = list(e.factors)
    while outer > 1:
        f = rest.pop(0)
        if outer % f.size == 0:
            taken.append(f)
            outer //= f.size
        elif f.size % outer == 0:
            a, b = factor(f, f.size // outer, why)
            taken.append(a)
            rest.insert(0, b)
            outer = 1
        else:
            return None
    return resolve(Prod(tuple(taken))), resolve(Prod(tuple(rest)))


def _factor_sum(e: Sum, inner: int, why: str) -> tuple[Expr, Expr] | None:
    """Parts that are whole blocks stay parts of the outer factor; blocks made of several parts are the same block over and over."""
    outers: list[Expr] = []
    inners: list[Expr] = []
    group: list[Expr] = []
    for part in e.parts:
        group.append(part)
        size = sum(p.size for p in group)
        if size % inner:
            continue
        if len(group) == 1:
            a, b = factor(part, inner, why)
            outers.append(a)
            inners.append(b)
        else:
            chunks = pieces(Sum(tuple(group)), [inner] * (size // inner), why)
            outers.extend([UNIT] * len(chunks))
            inners.extend(chunks)
        group = []
    if group:
        return None
    for other in inners[1:]:
        unify(inners[0], other, why)
    return resolve(Sum(tuple(outers))), resolve(inners[0])


def reshape(axes: Sequence[Expr], sizes: Sequence[int], why: str) -> list[Expr]:
    """The axes of a view with other sizes and the same order of elements."""
    whole = resolve(Prod(tuple(axes)))
    rest: list[Expr] = list(whole.factors) if isinstance(whole, Prod) else [whole]
    found: list[Expr] = []
    for i, size in enumerate(sizes):
        taken: list[Expr] = []
        while size > 1 and rest:
            f = resolve(rest.pop(0))
            if size % f.size == 0:
                taken.append(f)
                size //= f.size
            elif f.size % size == 0:
                a, b = factor(f, f.size // size, why)
                taken.append(a)
                rest.insert(0, b)
                size = 1
            else:
                _give_up((*axes,), why, "view across blocks")
                return [fresh(s, f"{why}: view across blocks") if j >= i else found[j] for j, s in enumerate(sizes)]
        found.append(resolve(Prod(tuple(taken))))
    return found
