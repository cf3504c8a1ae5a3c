"""Elastic bands: chains of images that slide down to the lowest pass between two minima.

All images of all bands are one stack: they are evaluated together on one batch, and tangents, spacing and
redistribution are a few tensor operations, whatever the number of bands and of images in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths.combinations import combine, joined
from losslab.paths.curves import hats
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path, ends_of, stations, walk
from losslab.paths.slopes import Slopes, mover

BETWEEN = 9
"""Points measured within each gap between two images, as Draxler et al. (2018) do."""


@dataclass(frozen=True)
class Band:
    """Images in order, the ends included.

    Attributes:
        images: The points, T of them.
        places: Where they are to stand, as shares of the band's length, ``[T]``.
        losses: Their losses at the last step, on its batch, ``[T]``.
    """

    images: Points
    places: Tensor
    losses: Tensor = field(default_factory=lambda: torch.empty(0))


class Chain:
    """The geometry of a stack of bands, one after another: which image follows which.

    Args:
        counts: Images in each band.

    Attributes:
        inner: Indices of the images that move: all but the ends.
        band: The band of each image.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)
        self.band = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(self.counts))
        last = torch.tensor(self.counts).cumsum(0) - 1
        first = last + 1 - torch.tensor(self.counts)
        self.first, self.last = first, last
        ends = torch.zeros(len(self.band), dtype=torch.bool)
        ends[first] = ends[last] = True
        self.inner = torch.nonzero(~ends).flatten()
        # One band alone is read in place, several are gathered.
        self._alone = len(self.counts) == 1
        self._offset = 2.0 * self.band  # bands side by side on one axis, for one search in all of them
        self._low, self._high = first[self.band][self.inner] + 1, last[self.band][self.inner]

    def inner_of(self, rows: Tensor, shift: int = 0) -> Tensor:
        """The rows of the inner images, or so many rows further on: ``[I or I - 1, ...]``."""
        if self._alone:
            return rows[1 + shift : self.counts[0] - 1 + shift]
        return rows[(self.inner + shift).to(rows.device)]

    def steps(self, moves: Tensor) -> Tensor:
        """Lengths of the moves from image to image, ``[I - 1, P] -> [I]``, float64; 0 after a band's last."""
        away = torch.zeros(len(self.band), dtype=torch.float64)
        away[:-1] = moves.norm(dim=1).double().cpu()
        away[self.last] = 0.0
        return away

    def places(self, steps: Tensor) -> Tensor:
        """How far along its band each image stands, as a share of the length: ``[I] -> [I]``, float64."""
        known = steps.nan_to_num(0.0, 0.0)
        before = known.cumsum(0) - known
        before = before - before[self.first][self.band]
        places = before / before[self.last][self.band]
        if torch.isfinite(steps.sum()):
            return places
        lost = torch.zeros(len(self.counts), dtype=torch.bool)
        lost[self.band[~torch.isfinite(steps)]] = True
        return places.masked_fill(lost[self.band], torch.nan)

    def tangents(self, moves: Tensor, losses: Tensor) -> Tensor:
        """Unit tangents of the inner images: moves ``[I - 1, P]``, losses ``[I]`` -> ``[len(inner), P]``.

        The upwind tangent of Henkelman and Jonsson (2000, eqs. 8-12): towards the higher neighbour, and at
        extrema a mean of both sides weighted by the differences of the losses, so that it turns smoothly.
        """
        here, after, before = (self.inner_of(losses, shift) for shift in (0, 1, -1))
        up, down = after - here, here - before
        # With losses that rise or fall on both sides, only the higher neighbour counts.
        steady = torch.sign(up) * torch.sign(down)
        large, small = torch.maximum(up.abs(), down.abs()), torch.minimum(up.abs(), down.abs())
        one = torch.ones_like(here)
        most = torch.where(steady > 0, one, large)
        least = torch.where(steady > 0, 1 - one, small)
        most, least = torch.where(most > 0, most, one), torch.where(most > 0, least, one)  # all equal
        higher = after > before
        w_ahead, w_behind = torch.where(higher, most, least), torch.where(higher, least, most)
        found = w_ahead[:, None].to(moves) * self.inner_of(moves)
        found.addcmul_(w_behind[:, None].to(moves), self.inner_of(moves, -1))
        return found.div_(found.norm(dim=1, keepdim=True))

    def spread(self, theta: Tensor, wanted: Tensor, tops: Tensor | None = None) -> Tensor:
        """The inner images moved along the chain of their band to wanted places ``[I]``.

        A band with an image that is not finite has no places: its inner images become NaN.

        Args:
            theta: ``[I, P]``.
            wanted: Shares of the length; ascending within a band, from 0 to 1.
            tops: Images that stay where they are; the places to their sides are stretched.
        """
        moves = theta[1:] - theta[:-1]
        at = self.places(self.steps(moves))
        lost = at.isnan()
        at = torch.where(lost, wanted, at)
        if tops is not None:
            own, top = at[tops][self.band], wanted[tops][self.band]
            wanted = torch.where(wanted <= top, wanted / top * own, 1 - (1 - wanted) / (1 - top) * (1 - own))
        goal = self.inner_of(wanted)
        right = torch.searchsorted(at + self._offset, goal + self.inner_of(self._offset))
        right = right.clamp(self._low, self._high)
        left = right - 1
        share = (goal - at[left]) / (at[right] - at[left])
        share = share.nan_to_num(0.0).clamp(0, 1).masked_fill(self.inner_of(lost), torch.nan)
        left = left.to(theta.device)
        return torch.addcmul(theta[left], share[:, None].to(theta), moves[left])

    def put(self, theta: Tensor, rows: Tensor) -> None:
        """Writes the inner images into the stack, in place."""
        if self._alone:
            theta[1:-1] = rows
        else:
            theta.index_copy_(0, self.inner.to(theta.device), rows)


def relax(
    slopes: Slopes,
    bands: Sequence[Band],
    *,
    rule: Any = None,
    steps: int = 500,
    spring: float | None = None,
    climb: bool = False,
    start: int = 0,
    watch: Callable[[int, list[Band]], None] | None = None,
) -> list[Band]:
    """Lets bands slide: nudged elastic bands (Jonsson et al. 1998), all together.

    Each image follows its gradient without the part along the band, ``g - (g . tau) tau``. Without springs
    the images are then put back to their places along the band; with springs of constant k the force
    ``k (|theta_{i+1} - theta_i| - |theta_i - theta_{i-1}|) tau`` keeps them apart instead.

    Args:
        slopes: What is minimised; all images of all bands see the same batch.
        bands: As `stretched` makes them. Several may have different numbers of images.
        rule: A losslab or torch update rule; Adam with rate 0.01 by default. Members are the inner images.
        steps: Updates.
        spring: k, or None for no springs.
        climb: Whether the highest image of each band goes up along the band and down across it, to end at
            the saddle (Henkelman et al. 2000): ``g - 2 (g . tau) tau``. It is not put back.
        start: The number of the first step, for the order of the batches.
        watch: Called before each step with its number and the bands, to draw how they settle.

    Raises:
        LosslabError: A spring constant that is not positive, a band of fewer than three images.
    """
    if spring is not None and not spring > 0:
        raise LosslabError(f"spring is {spring}: pass a positive constant, or None for none")
    if any(band.images.members < 3 for band in bands):
        raise LosslabError("a band of two images has nothing to move: insert images between its ends")
    chain = Chain([band.images.members for band in bands])
    stack = joined(*(band.images for band in bands))
    places = torch.cat([band.places for band in bands])
    like, theta = stack.select([0]), stack.matrix().clone()
    updating = mover(rule, len(chain.inner))
    weights = {"theta": theta[chain.inner].contiguous()}
    state = updating.init(weights)
    losses = torch.full((len(theta),), torch.nan, dtype=torch.float64)
    for step in range(start, start + steps):
        if watch is not None:
            watch(step, _bands(chain, stack, theta, places, losses))
        losses, slope = slopes(like, theta, step)
        tops = _tops(chain, losses) if climb else None
        force = _forces(chain, theta, slope, losses, spring, tops)
        weights, state = updating.apply({"theta": force}, state, weights, step)
        chain.put(theta, weights["theta"])
        if spring is None:
            weights["theta"].copy_(chain.spread(theta, places, tops))
            chain.put(theta, weights["theta"])
    return _bands(chain, stack, theta, places, losses)


def _forces(
    chain: Chain, theta: Tensor, slope: Tensor, losses: Tensor, spring: float | None, tops: Tensor | None
) -> Tensor:
    """What the update rule takes for the gradients of the inner images."""
    moves = theta[1:] - theta[:-1]
    tangents = chain.tangents(moves, losses)
    slope = chain.inner_of(slope)
    part = torch.linalg.vecdot(slope, tangents)
    climbing = None if tops is None else torch.isin(chain.inner, tops).to(theta.device)
    if climbing is not None:
        part = torch.where(climbing, 2 * part, part)
    if spring is not None:
        steps = chain.steps(moves).to(theta)
        pull = spring * (chain.inner_of(steps) - chain.inner_of(steps, -1))
        part = part + (pull if climbing is None else pull.masked_fill(climbing, 0.0))
    return torch.addcmul(slope, part[:, None], tangents, value=-1.0)


def _tops(chain: Chain, losses: Tensor) -> Tensor:
    """The highest inner image of each band."""
    found = []
    for a, b in zip(chain.first.tolist(), chain.last.tolist(), strict=True):
        found.append(a + 1 + int(losses[a + 1 : b].nan_to_num(-torch.inf).argmax()))
    return torch.tensor(found)


def _bands(chain: Chain, stack: Points, theta: Tensor, places: Tensor, losses: Tensor) -> list[Band]:
    found = []
    moved = stack.at(theta).weights
    for a, b in zip(chain.first.tolist(), chain.last.tolist(), strict=True):
        rows = list(range(a, b + 1))
        images = Points(
            {n: w[rows] for n, w in moved.items()}, {n: t[rows] for n, t in stack.buffers.items()}
        )
        found.append(Band(images, places[rows], losses[rows]))
    return found


def stretched(points: Points, pairs: Sequence[tuple[int, int]], images: int = 15) -> list[Band]:
    """Straight bands between minima, of so many images, the ends included, evenly spaced.

    Raises:
        LosslabError: A pair that does not exist, or fewer than three images.
    """
    if images < 3:
        raise LosslabError(f"a band of {images} images was asked for: pass at least 3, the ends among them")
    places = stations(images)
    return [Band(combine(both, hats(places, 2)), places) for both in ends_of(points, pairs)]


def walk_bands(
    landscape: Landscape, bands: Sequence[Band], between: int = BETWEEN, loss_only: bool = False
) -> list[Path]:
    """Measures bands at their images and at ``between`` even points within each gap, in one pass."""
    told, ts = [], []
    for band in bands:
        gaps = band.images.members - 1
        t = stations(gaps * (between + 1) + 1)
        told.append(hats(t, gaps + 1))
        ts.append(t)
    return walk(landscape, [b.images for b in bands], told, ts, "elastic band", loss_only)
