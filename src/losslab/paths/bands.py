"""Elastic bands: chains of images that slide down to the lowest pass between two minima.

All images of all bands are one stack: they are evaluated together on one batch, and tangents, spacing and
redistribution are a few tensor operations, whatever the number of bands and of images in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Points, checkpoints
from losslab.errors import LosslabError
from losslab.paths.combinations import combine, joined
from losslab.paths.curves import hats
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path, ends_of, stations, walk
from losslab.paths.slopes import Mover, Slopes
from losslab.paths.work import Kept, Out, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

    What there is one of an image (losses, lengths, places) is a numpy array: a step has dozens of operations
    on such short rows, and they are dear as tensors. What has an axis of weights stays a tensor.

    Args:
        counts: Images in each band.

    Attributes:
        inner: Indices of the images that move: all but the ends.
        band: The band of each image.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)
        self.band = np.repeat(np.arange(len(counts)), counts)
        self.last = np.cumsum(counts) - 1
        self.first = self.last + 1 - np.asarray(counts)
        ends = np.zeros(len(self.band), dtype=bool)
        ends[self.first] = ends[self.last] = True
        self.inner = np.flatnonzero(~ends)
        # One band alone is read and written in place, several are gathered.
        self._alone = len(self.counts) == 1
        self._offset = 2.0 * self.band  # bands side by side on one axis, for one search in all of them
        self._inner_offset = self._offset[self.inner]
        self._low, self._high = self.first[self.band][self.inner] + 1, self.last[self.band][self.inner]

    def inner_of(self, rows: Tensor, shift: int = 0) -> Tensor:
        """The rows of the inner images, or so many rows further on: ``[I or I - 1, ...]``."""
        if self._alone:
            return rows[1 + shift : self.counts[0] - 1 + shift]
        return rows[torch.from_numpy(self.inner + shift).to(rows.device)]

    def steps(self, moves: Tensor) -> NDArray[np.float64]:
        """Lengths of the moves from image to image, ``[I - 1, P] -> [I]``; 0 after a band's last."""
        away = np.zeros(len(self.band))
        away[:-1] = torch.linalg.vector_norm(moves, dim=1).double().cpu().numpy()
        away[self.last] = 0.0
        return away

    def places(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far along its band each image stands, as a share of the length: ``[I] -> [I]``.

        NaN all along a band with a step that is not finite.
        """
        known = np.isfinite(steps)
        whole = bool(known.all())
        walked = steps if whole else np.where(known, steps, 0.0)
        before = np.cumsum(walked) - walked
        if not self._alone:
            before -= before[self.first][self.band]
        with np.errstate(invalid="ignore"):
            places = before / before[self.last][self.band]
        if not whole:
            places[np.isin(self.band, self.band[~known])] = np.nan
        return places

    def leanings(self, losses: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How much of the move ahead and of the move behind is in the tangent of each inner image.

        The upwind tangent of Henkelman and Jonsson (2000, eqs. 8-12), not yet of unit length: towards the
        higher neighbour, and at extrema a mean of both sides weighted by the differences of the losses, so
        that it turns smoothly.
        """
        here, after, before = losses[self.inner], losses[self.inner + 1], losses[self.inner - 1]
        up, down = after - here, here - before
        with np.errstate(invalid="ignore"):
            # With losses that rise or fall on both sides, only the higher neighbour counts.
            steady = up * down > 0
            rise, fall = np.abs(up), np.abs(down)
            large = np.maximum(rise, fall)
            flat = large == 0
            most = np.where(steady | flat, 1.0, large)
            least = np.where(steady, 0.0, np.where(flat, 1.0, np.minimum(rise, fall)))
            higher = after > before
        return np.where(higher, most, least), np.where(higher, least, most)

    def spread(self, theta: Tensor, wanted: NDArray[np.float64], tops: Any = None) -> Tensor:
        """The inner images moved along the chain of their band to wanted places ``[I]``.

        A band with an image that is not finite has no places: its inner images become NaN.

        Args:
            theta: ``[I, P]``.
            wanted: Shares of the length; ascending within a band, from 0 to 1.
            tops: Images that stay where they are; the places to their sides are stretched.
        """
        moves = theta[1:] - theta[:-1]
        at = self.places(self.steps(moves))
        lost = np.isnan(at)
        if lost.any():
            at = np.where(lost, wanted, at)
        if tops is not None:
            own, top = at[tops][self.band], wanted[tops][self.band]
            wanted = np.where(wanted <= top, wanted / top * own, 1 - (1 - wanted) / (1 - top) * (1 - own))
        goal = wanted[self.inner]
        right = np.searchsorted(at + self._offset, goal + self._inner_offset)
        left = np.minimum(np.maximum(right, self._low), self._high) - 1
        gap = at[left + 1] - at[left]
        share = np.minimum(np.maximum((goal - at[left]) / np.where(gap > 0, gap, 1.0), 0.0), 1.0)
        share[lost[self.inner]] = np.nan
        rows = torch.from_numpy(left).to(theta.device)
        found = theta.index_select(0, rows)
        return found.addcmul_(torch.from_numpy(share)[:, None].to(theta), moves.index_select(0, rows))

    def put(self, theta: Tensor, rows: Tensor) -> None:
        """Writes the inner images into the stack, in place."""
        if self._alone:
            theta[1:-1] = rows
        else:
            theta.index_copy_(0, torch.from_numpy(self.inner).to(theta.device), rows)


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
    out: Out = None,
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
        out: Where to keep unfinished work, see `Work`.

    Raises:
        LosslabError: A spring constant that is not positive, a band of fewer than three images.
    """
    if spring is not None and not spring > 0:
        raise LosslabError(f"spring is {spring}: pass a positive constant, or None for none")
    if any(band.images.members < 3 for band in bands):
        raise LosslabError("a band of two images has nothing to move: insert images between its ends")
    work = Work.of(out)
    asked = {} if work.path is None else {**slopes.describe(), **_asked(bands, spring, climb, rule)}
    with work.begin(asked, f"settling {len(bands)} bands", start + steps, len(bands)) as kept:
        return slide(
            slopes, bands, kept, rule=rule, steps=steps, spring=spring, climb=climb, start=start, watch=watch
        )


def slide(
    slopes: Slopes,
    bands: Sequence[Band],
    kept: Kept,
    *,
    rule: Any,
    steps: int,
    spring: float | None = None,
    climb: bool = False,
    start: int = 0,
    watch: Callable[[int, list[Band]], None] | None = None,
) -> list[Band]:
    """What `relax` does, going on from what is kept."""
    chain = Chain([band.images.members for band in bands])
    stack = joined(*(band.images for band in bands))
    places = torch.cat([band.places for band in bands])
    wanted = places.double().numpy()
    like, theta = stack.select([0]), stack.matrix().clone()
    mover = Mover(rule, chain.inner_of(theta).contiguous())  # of one band, a view of the stack
    losses = np.full(len(theta), np.nan)
    if "theta" in kept.tensors:
        mover.load(kept.tensors)
        chain.put(theta, mover.theta)
        losses = kept.tensors["losses"].numpy()
    for step in range(kept.meta.get("step", start), start + steps):
        if watch is not None:
            watch(step, _bands(chain, stack, theta, places, losses))
        values, slope = slopes(like, theta, step)
        losses = values.numpy()
        tops = _tops(chain, losses) if climb else None
        mover.move(_forces(chain, theta, slope, losses, spring, tops), step)
        chain.put(theta, mover.theta)
        if spring is None:
            mover.theta.copy_(chain.spread(theta, wanted, tops))
            chain.put(theta, mover.theta)
        kept.tell(step + 1, losses)
        if kept.due():
            kept.write({**mover.tensors(), "losses": torch.from_numpy(losses)}, step=step + 1)
    return _bands(chain, stack, theta, places, losses)


def _asked(bands: Sequence[Band], spring: float | None, climb: bool, rule: Any) -> dict[str, Any]:
    images = [checkpoints.digest(band.images, str(band.places.tolist())) for band in bands]
    return {"images": images, "spring": spring, "climb": climb, "rule": rule}


def _forces(
    chain: Chain,
    theta: Tensor,
    slope: Tensor,
    losses: NDArray[np.float64],
    spring: float | None,
    tops: NDArray[np.intp] | None,
) -> Tensor:
    """What the update rule takes for the gradients of the inner images; the slope is used up.

    The tangent ``tau = a ahead + b behind`` is never written out: its length and its product with the
    gradient follow from the products of the gradient and the two moves.
    """
    moves = theta[1:] - theta[:-1]
    a, b = chain.leanings(losses)
    lengths = chain.steps(moves)
    ahead, behind, force = chain.inner_of(moves), chain.inner_of(moves, -1), chain.inner_of(slope)
    dots = [torch.linalg.vecdot(x, y) for x, y in ((ahead, behind), (force, ahead), (force, behind))]
    cross, up, down = torch.stack(dots).double().cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        square = (a * lengths[chain.inner]) ** 2 + 2 * a * b * cross + (b * lengths[chain.inner - 1]) ** 2
        part = (a * up + b * down) / square
        pull = 0.0
        if spring is not None:
            pull = spring * (lengths[chain.inner] - lengths[chain.inner - 1]) / np.sqrt(square)
        if tops is not None:
            part = np.where(np.isin(chain.inner, tops), 2 * part, part + pull)
        else:
            part = part + pull
    for weight, move in ((part * a, ahead), (part * b, behind)):
        force = force.addcmul_(torch.from_numpy(weight)[:, None].to(move), move, value=-1.0)
    return force


def _tops(chain: Chain, losses: NDArray[np.float64]) -> NDArray[np.intp]:
    """The highest inner image of each band."""
    known = np.nan_to_num(losses, nan=-np.inf)
    ends = zip(chain.first.tolist(), chain.last.tolist(), strict=True)
    return np.array([first + 1 + int(known[first + 1 : last].argmax()) for first, last in ends])


def _bands(
    chain: Chain, stack: Points, theta: Tensor, places: Tensor, losses: NDArray[np.float64]
) -> list[Band]:
    found = []
    moved = stack.at(theta).weights
    for a, b in zip(chain.first.tolist(), chain.last.tolist(), strict=True):
        rows = list(range(a, b + 1))
        images = Points(
            {n: w[rows] for n, w in moved.items()}, {n: t[rows] for n, t in stack.buffers.items()}
        )
        found.append(Band(images, places[rows], torch.from_numpy(losses[rows])))
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
