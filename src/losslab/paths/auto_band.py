"""AutoNEB: an elastic band that gets images where the loss between its images is too high."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Points, checkpoints
from losslab.errors import LosslabError
from losslab.paths.bands import BETWEEN, Band, slide, stretched, walk_bands
from losslab.paths.combinations import combine
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path, Stage, settled
from losslab.paths.slopes import Slopes
from losslab.paths.work import Kept, Out, Work
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
    looks: Sequence[int] = (),
    out: Out = None,
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
        looks: Steps before which the images' losses are measured on all data, to show how the bands settle.
        out: Where to keep unfinished work, see `Work`.

    Returns:
        Of each pair, the path of the cycle whose highest loss was lowest, and among those that are no higher
        than an end the one with the lowest mean; its note says which, and how the highest loss went from
        cycle to cycle. Its stages are the looks and the ends of the cycles; it counts as settled by the
        highest losses after the cycles.

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
    asked: dict[str, Any] = {"cycles": list(cycles), "first": first, "insert": insert, "between": between}
    asked |= {"rule": [rule(cycle.lr) for cycle in cycles], "threshold": threshold, "looks": list(looks)}
    asked |= {**slopes.describe(), "pairs": list(pairs), "points": checkpoints.digest(points, "")}
    total = sum(cycle.steps for cycle in cycles)
    with Work.of(out).begin(asked, f"settling {len(pairs)} bands", total, len(pairs)) as kept:
        searches = _restored(kept, points) or [_Search(b) for b in stretched(points, pairs, first + 2)]
        for number in range(kept.meta.get("cycle", 0), len(cycles)):
            done = sum(cycle.steps for cycle in cycles[:number])
            look = _Looking(landscape, searches, kept, number, looks)
            kept.hold(*_told(searches, number))
            bands = slide(
                slopes, [s.band for s in searches], kept, rule=rule(cycles[number].lr),
                steps=cycles[number].steps, start=done, watch=look if looks else None,
            )  # fmt: skip
            kept.forget()
            paths = walk_bands(landscape, bands, between, loss_only=True)
            for search, band, path in zip(searches, bands, paths, strict=True):
                search.after(number + 1, done + cycles[number].steps, band, path)
                search.band = _denser(band, path, insert, threshold, between)
    paths = walk_bands(landscape, [search.best for search in searches], between)
    return [
        replace(
            path, method="AutoNEB", note=search.note, stages=tuple(search.stages),
            settled=settled(torch.tensor(search.heights, dtype=torch.float64)),
        )
        for path, search in zip(paths, searches, strict=True)
    ]  # fmt: skip


@dataclass
class _Search:
    """The search for one pair: the band as it is, the best so far, and how it went."""

    band: Band
    best: Band = field(init=False)
    number: int = 0
    low: tuple[float, float] = (float("nan"), float("nan"))
    heights: list[float] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.best = self.band

    def after(self, number: int, step: int, band: Band, path: Path) -> None:
        """Notes what a cycle came to; NaN is lower than nothing."""
        (losses,) = path.values.values()
        low = float(path.barrier().highest), float(losses.mean())
        self.heights.append(low[0])
        self.stages.append(Stage(step, path.places, losses))
        if not self.number or low[0] < self.low[0] or (self.low[0] != self.low[0] and low[0] == low[0]):
            self.best, self.number, self.low = band, number, low

    @property
    def note(self) -> str:
        """Which cycle was best, and how the highest loss went."""
        went = ", ".join(f"{h:.4g}" for h in self.heights)
        return f"cycle {self.number} of {len(self.heights)}; highest loss after each: {went}"


class _Looking:
    """Measures the images of all bands before the steps asked for."""

    def __init__(
        self, landscape: Landscape, searches: Sequence[_Search], kept: Kept, number: int, looks: Sequence[int]
    ) -> None:
        self._landscape, self._searches, self._kept = landscape, searches, kept
        self._number, self._looks = number, set(looks)

    def __call__(self, step: int, bands: list[Band]) -> None:
        if step not in self._looks:
            return
        paths = walk_bands(self._landscape, bands, 0, loss_only=True)
        for search, path in zip(self._searches, paths, strict=True):
            search.stages.append(Stage(step, path.places, next(iter(path.values.values()))))
        self._kept.hold(*_told(self._searches, self._number))


def _told(searches: Sequence[_Search], number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The searches before a cycle as what a file holds."""
    tensors: dict[str, Tensor] = {}
    meta = []
    for s, search in enumerate(searches):
        for name, band in (("band", search.band), ("best", search.best)):
            tensors |= {f"{s}/{name}/{n}": t for n, t in band.images.items()}
            tensors[f"{s}/{name}/places"] = band.places
        for k, stage in enumerate(search.stages):
            tensors |= {f"{s}/stage/{k}/places": stage.places, f"{s}/stage/{k}/losses": stage.losses}
        told = {"number": search.number, "low": search.low, "heights": [*search.heights]}
        meta.append({**told, "steps": [stage.step for stage in search.stages]})
    return tensors, {"cycle": number, "bands": meta}


def _restored(kept: Kept, points: Points) -> list[_Search]:
    """The searches that `_told` told; none if nothing is kept."""
    found, held = [], kept.tensors
    for s, told in enumerate(kept.meta.get("bands", [])):

        def band(name: str, s: int = s) -> Band:
            parts = ({n: held[f"{s}/{name}/{n}"] for n in part} for part in (points.weights, points.buffers))
            return Band(Points(*parts), held[f"{s}/{name}/places"])

        search = _Search(band("band"))
        search.best, search.number, search.low = band("best"), told["number"], tuple(told["low"])
        search.heights = told["heights"]
        search.stages = [
            Stage(step, held[f"{s}/stage/{k}/places"], held[f"{s}/stage/{k}/losses"])
            for k, step in enumerate(told["steps"])
        ]
        found.append(search)
    return found


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
