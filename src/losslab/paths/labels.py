"""Which entries of an axis may be permuted together: the labels that a traced network's axes carry.

An axis of n units is a leaf. Where the network's code cuts it up, the leaf becomes a product (an embedding
that is reshaped into heads times dimensions) or a sum (channels put side by side). Two axes that meet in an
operation become one; an axis that the code looks at entry by entry is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

LEAF, PRODUCT, SUM = "leaf", "product", "sum"


class Label:
    """What one axis of a tensor is made of; labels that became one share their `root`.

    Args:
        size: Entries of the axis.
        fixed: Whether they keep their places.
        kind: A leaf, a product of parts (the last one fastest), or a sum of parts (one after another).
        parts: Of a product or a sum.
    """

    __slots__ = ("_above", "_fixed", "kind", "parts", "size")

    def __init__(self, size: int, fixed: bool = False, kind: str = LEAF, parts: Sequence[Label] = ()) -> None:
        self.size, self.kind, self.parts = size, kind, tuple(parts)
        self._fixed = fixed
        self._above: Label | None = None

    @property
    def root(self) -> Label:
        """The label that this one has become."""
        here = self
        while here._above is not None:
            here = here._above
        return here

    @property
    def free(self) -> bool:
        """Whether anything in it may move."""
        here = self.root
        return any(p.free for p in here.parts) if here.parts else not here._fixed and here.size > 1

    def fix(self) -> None:
        """Keeps all entries in their places."""
        here = self.root
        here._fixed = True
        for part in here.parts:
            part.fix()

    def become(self, other: Label) -> None:
        """Makes a leaf the same as another label."""
        here, there = self.root, other.root
        if here is there:
            return
        assert here.kind == LEAF
        if here._fixed:
            there.fix()
        here._above = there


def product(parts: Sequence[Label]) -> Label:
    """The axis that runs through all combinations of the parts' entries; parts of one entry do not count."""
    kept = [p for p in flat(parts) if p.size > 1]
    if len(kept) == 1:
        return kept[0]
    return Label(prod(p.size for p in kept), not kept, PRODUCT if kept else LEAF, kept)


def total(parts: Sequence[Label]) -> Label:
    """The axis that holds the parts one after another."""
    kept: list[Label] = []
    for part in parts:
        here = part.root
        kept += here.parts if here.kind == SUM else [here]
    return kept[0] if len(kept) == 1 else Label(sum(p.size for p in kept), False, SUM, kept)


def flat(parts: Sequence[Label]) -> list[Label]:
    """The factors of a product of labels, products among them resolved."""
    found: list[Label] = []
    for part in parts:
        here = part.root
        found += flat(here.parts) if here.kind == PRODUCT else [here]
    return found


def unify(a: Label, b: Label) -> None:
    """Makes two axes one: what permutes one permutes the other."""
    a, b = a.root, b.root
    if a is b:
        return
    if a.kind == LEAF or b.kind == LEAF:
        if _inside(a, b) or _inside(b, a):  # an axis cannot be a part of itself
            a.fix()
            b.fix()
        elif a.kind == LEAF:
            a.become(b)
        else:
            b.become(a)
        return
    left = flat([a]) if a.kind == PRODUCT else list(a.parts)
    right = flat([b]) if b.kind == PRODUCT else list(b.parts)
    if a.kind == b.kind and [p.size for p in left] == [p.size for p in right]:
        for x, y in zip(left, right, strict=True):
            unify(x, y)
    else:
        a.fix()
        b.fix()


def split_into(label: Label, sizes: Sequence[int]) -> list[Label]:
    """The label as a sum of parts of these sizes (channels taken apart again).

    What does not fall into such parts is fixed.
    """
    here = label.root
    if here.kind == SUM and [p.size for p in here.parts] == list(sizes):
        return list(here.parts)
    if here.kind == LEAF and not here._fixed:
        parts = [Label(n) for n in sizes]
        here.become(Label(here.size, False, SUM, parts))
        return parts
    here.fix()
    return [Label(n, fixed=True) for n in sizes]


def regroup(labels: Sequence[Label], shape: Sequence[int]) -> list[Label]:
    """The labels of a reshaped tensor, row by row; what is cut in a way that no product allows is fixed."""
    factors, result = flat(labels), []
    factors = [f for f in factors if f.size > 1]
    for size in shape:
        taken: list[Label] = []
        left = size
        while left > 1:
            if not factors:
                return _given_up(labels, shape)
            first = factors[0].root
            if left % first.size == 0:
                taken.append(factors.pop(0))
                left //= first.size
            elif first.size % left == 0 and first.kind == LEAF:
                fast, slow = Label(first.size // left, first._fixed), Label(left, first._fixed)
                first.become(Label(first.size, False, PRODUCT, (slow, fast)))
                factors[0:1] = [slow, fast]
            else:
                return _given_up(labels, shape)
        result.append(product(taken) if taken else Label(1, fixed=True))
    return result


def _given_up(labels: Sequence[Label], shape: Sequence[int]) -> list[Label]:
    for label in labels:
        label.fix()
    return [Label(n, fixed=True) for n in shape]


def _inside(part: Label, whole: Label) -> bool:
    return any(p.root is part or _inside(part, p.root) for p in whole.parts)
