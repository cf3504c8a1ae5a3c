"""AutoNEB: an elastic band that gets images where the loss between its images is too high."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths.bands import BETWEEN, Band, relax, stretched, walk_bands
from losslab.paths.combinations import combine
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path
from losslab.paths.slopes import Slopes
from losslab.rules import make


@dataclass(frozen=True)
class Cycle:
    """One round of AutoNEB: so many steps at a learning rate."""

    steps: int
    lr: float


#: The cycles of Draxler et al. (2018) for their CIFAR-10 networks.
DRAXLER = (
    *[Cycle(1000, 0.1)] * 4,
    *[Cycle(2000, 0.1)] * 2,
    *[Cycle(1000, 0.01)] * 4,
    *[Cycle(1000, 0.001)] * 4,
)

#: A tenth of that in steps, for networks of some thousand weights.
SHORT = tuple(replace(cycle, steps=cycle.steps // 10) for cycle in DRAXLER)


def heavy_ball(lr: float) -> Any:
    """Stochastic gradient descent with momentum 0.9, as Draxler et al. have it."""
    return make("momentum", lr=lr)


def auto_bands(
    slopes: Slopes,
    landscape: Landscape,
    points: Points,
    pairs: Sequence[tuple[int, int]],
    *,
    cycles: Sequence[Cycle] = SHORT,
    first: int = 3,
    insert: int = 2,
    threshold: float = 0.1,
    rule: Callable[[float], Any] = heavy_ball,
    between: int = BETWEEN,
) -> list[Path]:
    """The lowest passes that AutoNEB finds between pairs of minima (Draxler et al. 2018), all pairs together.

    The first cycle starts with ``first`` images evenly between the ends. After each cycle the loss is
    measured at ``between`` points within each gap. Where it lies above the chord of the two images by more
    than ``threshold`` times the band's range of losses, a new image goes to the highest such point, at most
    ``insert`` a cycle. The images keep their spacing without springs.

    Args:
        slopes: What is minimised; all images of all bands share each batch. (In the authors' code each image
            draws its own batch, so that tangents follow the noise, and running statistics are coordinates.)
        landscape: What is measured; its first loss decides.
        points: The minima.
        pairs: Which of them to connect.
        cycles: Steps and rate of each.
        first: Images inserted at the start.
        insert: The most images inserted later, a cycle.
        threshold: See above.
        rule: Learning rate -> update rule.
        between: See above.

    Returns:
        Of each pair, the path of the cycle whose highest loss was lowest, and among those that are no higher
        than an end the one with the lowest mean; its note says which, and how the highest loss went from
        cycle to cycle.

    Raises:
        LosslabError: No cycle, no first image, a pair that does not exist.

    Example:
        >>> from losslab.tasks import double_well, function_task
        >>> task = function_task(double_well)
        >>> minima = Points({"x": torch.tensor([[-1.0, 0.0], [1.0, 0.0]])}, {})
        >>> (path,) = auto_bands(Slopes(task), Landscape(task), minima, [(0, 1)], cycles=[Cycle(5, 0.01)])
        >>> round(float(path.barrier().highest), 6)
        1.0
    """
    if not cycles or first < 1:
        raise LosslabError(
            f"{len(cycles)} cycles and {first} first images were asked for: pass at least one of each"
        )
    bands = stretched(points, pairs, first + 2)
    best: list[tuple[Band, Path, int] | None] = [None] * len(bands)
    told: list[list[float]] = [[] for _ in bands]
    done = 0
    for number, cycle in enumerate(cycles):
        bands = relax(slopes, bands, rule=rule(cycle.lr), steps=cycle.steps, start=done)
        done += cycle.steps
        paths = walk_bands(landscape, bands, between, loss_only=True)
        for e, path in enumerate(paths):
            told[e].append(float(path.barrier().highest))
            known = best[e]
            if known is None or _better(path, known[1]):
                best[e] = (bands[e], path, number + 1)
        if number + 1 < len(cycles):
            bands = [_denser(b, p, insert, threshold, between) for b, p in zip(bands, paths, strict=True)]
    chosen = [found for found in best if found is not None]
    paths = walk_bands(landscape, [band for band, _, _ in chosen], between)
    return [
        replace(path, method="AutoNEB", note=_note(number, heights))
        for path, (_, _, number), heights in zip(paths, chosen, told, strict=True)
    ]


def _better(path: Path, other: Path) -> bool:
    """Whether a path is lower than another one; NaN is lower than nothing."""
    own, known = (
        (float(p.barrier().highest), float(next(iter(p.values.values())).mean())) for p in (path, other)
    )
    return own < known or (known[0] != known[0] and own[0] == own[0])


def gaps_to_fill(losses: Tensor, insert: int, threshold: float, between: int) -> list[int]:
    """The points of a densely measured band at which images are missing, ascending.

    Args:
        losses: At each image and at ``between`` points within each gap, ``[T]``.
        insert: The most points to name.
        threshold: The excess over the chord that counts, as a share of the range of the images' losses.
        between: See above.

    Example:
        >>> gaps_to_fill(torch.tensor([0.0, 3.0, 0.0, 0.2, 1.0]), 2, 0.1, 1)
        [1]
    """
    every = between + 1
    images = losses[::every]
    share = (torch.arange(len(losses) - 1) % every) / every
    gap = torch.arange(len(losses) - 1) // every
    excess = losses[:-1] - ((1 - share) * images[gap] + share * images[gap + 1])
    highest, place = excess.unflatten(0, (-1, every)).max(1)
    wide = highest > threshold * (images.max() - images.min())
    chosen = highest.masked_fill(~wide, -torch.inf).topk(min(insert, len(highest))).indices
    return sorted(int(g * every + place[g]) for g in chosen if wide[g])


def _denser(band: Band, path: Path, insert: int, threshold: float, between: int) -> Band:
    """The band with images where they are missing; each image keeps its place along the length."""
    losses = next(iter(path.values.values()))
    if not torch.isfinite(losses).all():
        return band
    every = between + 1
    missing = gaps_to_fill(losses, insert, threshold, between)
    rows = sorted({*range(0, len(losses), every), *missing})
    return Band(combine(band.images, path.coefficients[rows]), path.places[rows])


def _note(number: int, heights: Sequence[float]) -> str:
    went = ", ".join(f"{h:.4g}" for h in heights)
    return f"cycle {number} of {len(heights)}; highest loss after each: {went}"
