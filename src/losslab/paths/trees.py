"""The minimum spanning tree over minima: the lowest passes that connect all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.paths.path import Path

if TYPE_CHECKING:
    import pandas as pd

Pair = tuple[int, int]


@dataclass(frozen=True)
class Tree:
    """The paths tried between k minima, and the tree of the lowest of them.

    Attributes:
        losses: Of the minima, ``[k]``.
        paths: Every path tried, by its pair (a, b), a < b.
        edges: The pairs of the minimum spanning tree, lowest first; fewer than k - 1 where paths are missing.
    """

    losses: Tensor
    paths: dict[Pair, Path]
    edges: tuple[Pair, ...]

    @property
    def saddles(self) -> Tensor:
        """The highest loss along each edge, ``[edges]``, lowest first."""
        return torch.tensor([height_of(self.paths[edge]) for edge in self.edges], dtype=torch.float64)

    @property
    def passes(self) -> Tensor:
        """How high one has to climb from each minimum to each other one, ``[k, k]``; infinite if unknown.

        The least over all chains of paths of the highest loss on the way: what the tree is good for. On the
        diagonal stand the minima's own losses.
        """
        return lowest_passes(self.losses, {edge: height_of(self.paths[edge]) for edge in self.edges})

    @property
    def table(self) -> pd.DataFrame:
        """One row a path: its ends, whether it is in the tree, and its summary."""
        import pandas as pd

        rows = [
            {"a": a, "b": b, "in_tree": (a, b) in self.edges, **path.summary}
            for (a, b), path in self.paths.items()
        ]
        return pd.DataFrame(rows)


def height_of(path: Path) -> float:
    """The highest first loss along a path; infinite where it is not finite."""
    height = float(path.barrier().highest)
    return height if height == height else float("inf")


def spanning_edges(count: int, heights: dict[Pair, float]) -> tuple[Pair, ...]:
    """The edges of the minimum spanning tree (forest) by Kruskal's algorithm, lowest first.

    Example:
        >>> spanning_edges(3, {(0, 1): 3.0, (1, 2): 1.0, (0, 2): 2.0})
        ((1, 2), (0, 2))
    """
    part = list(range(count))
    chosen = []
    for (a, b), height in sorted(heights.items(), key=lambda item: (item[1], item[0])):
        if height < float("inf") and part[a] != part[b]:
            old, new = part[b], part[a]
            part = [new if p == old else p for p in part]
            chosen.append((a, b))
    return tuple(chosen)


def lowest_passes(losses: Tensor, heights: dict[Pair, float]) -> Tensor:
    """The minimax heights between all pairs, ``[k, k]``, from those of some edges."""
    count = len(losses)
    found = torch.full((count, count), torch.inf, dtype=torch.float64)
    for (a, b), height in heights.items():
        found[a, b] = found[b, a] = min(height, float(found[a, b]))
    for via in range(count):
        found = torch.minimum(found, torch.maximum(found[:, via, None], found[None, via, :]))
    found.fill_diagonal_(0.0)
    return found + torch.diag(losses.double())


def explore(
    losses: Tensor,
    connect: Callable[[list[Pair]], Sequence[Path]],
    budget: int | None = None,
    together: int = 4,
) -> Tree:
    """Finds the tree without trying all pairs, as Draxler et al. (2018, section 3.3) do.

    First every minimum is connected to the lowest one. Then the highest edge of the tree is attacked: without
    it the minima fall into two parts, and untried pairs across the gap, those of the lowest minima first, are
    tried instead; until there is none left or the budget is spent.

    Args:
        losses: Of the minima, ``[k]``.
        connect: Pairs -> their paths, in the same order.
        budget: The most paths to try, k - 1 or more; by default all pairs.
        together: How many pairs to try at a time after the first round.

    Raises:
        LosslabError: Fewer than two minima, one that is not finite, or a budget below k - 1.
    """
    count = len(losses)
    if count < 2 or not torch.isfinite(losses).all():
        raise LosslabError("a tree needs two minima or more, all of finite loss: leave out the others")
    allowed = count * (count - 1) // 2 if budget is None else budget
    if allowed < count - 1:
        raise LosslabError(
            f"a budget of {allowed} paths cannot connect {count} minima: pass {count - 1} or more"
        )
    root = int(losses.argmin())
    paths: dict[Pair, Path] = {}
    asked = [_ordered(i, root) for i in range(count) if i != root]
    while asked:
        paths |= dict(zip(asked, connect(asked), strict=True))
        edges = spanning_edges(count, {pair: height_of(path) for pair, path in paths.items()})
        left = min(together, allowed - len(paths))
        asked = _across(losses, paths, edges)[: max(0, left)]
    return Tree(losses, paths, edges)


def _across(losses: Tensor, paths: dict[Pair, Path], edges: Sequence[Pair]) -> list[Pair]:
    """Untried pairs that could replace the highest edge of the tree, or else the next one."""
    count = len(losses)
    complete = len(edges) == count - 1
    for dropped in reversed(range(len(edges))) if complete else [len(edges)]:
        kept = {edge: 0.0 for n, edge in enumerate(edges) if n != dropped}
        apart = torch.isinf(lowest_passes(torch.zeros(count), kept))
        # An edge between two minima cannot be lower than the higher of them.
        floor = height_of(paths[edges[dropped]]) if complete else float("inf")
        pairs = [(a, b) for a in range(count) for b in range(a + 1, count) if apart[a, b]]
        pairs = [p for p in pairs if p not in paths and float(losses[list(p)].max()) < floor]
        if pairs:
            return sorted(pairs, key=lambda p: (float(losses[list(p)].sum()), p))
    return []


def _ordered(a: int, b: int) -> Pair:
    return (min(a, b), max(a, b))
