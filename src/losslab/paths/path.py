"""A path from one place in weight space to another, and what was measured along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths.barriers import Barrier, barrier
from losslab.paths.combinations import combine, joined
from losslab.paths.landscape import WEIGHTS_BYTES, Landscape, Measurements, require

if TYPE_CHECKING:
    import pandas as pd

STATIONS = 61
"""Points at which a path is measured unless told otherwise, as Garipov et al. (2018) do."""


@dataclass(frozen=True)
class Stage:
    """How a path looked on its way to what it became.

    Attributes:
        step: Updates done.
        places: Shares of the length, ``[T]``.
        losses: The first loss there, ``[T]``.
    """

    step: int
    places: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Path:
    """A path and the losses and errors along it; every method gives this.

    Attributes:
        frame: The points that define it: ends, bends, images of a band.
        coefficients: The points along it as combinations of the frame, ``[T, K]``; the first and the last are
            the ends themselves.
        t: Their parameter, from 0 to 1, ``[T]``.
        values: Name -> ``[T]``: ``train_loss``, ``train_error``, ...
        method: How it was found.
        found: Of a method that looks for something that may not be there (a string below a level): whether
            it did; None of the others.
        settled: Of a path that was trained, whether its loss had stopped falling, as `settled` tells; None
            where that is not clear, or nothing was trained.
        note: What else it has to tell, a sentence, or nothing.
        stages: How it settled, where the method tells.
    """

    frame: Points
    coefficients: Tensor
    t: Tensor
    values: Measurements
    method: str
    found: bool | None = None
    settled: bool | None = None
    note: str = ""
    stages: tuple[Stage, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return require(name, self.values)

    @property
    def points(self) -> Points:
        """The points along the path, T of them."""
        return combine(self.frame, self.coefficients)

    @property
    def places(self) -> Tensor:
        """Where the points stand as shares of the path's length, ``[T]``; of t where it has no length."""
        walked = _steps(self.frame, self.coefficients).cumsum(0)
        if not walked[-1] > 0:
            return self.t
        return torch.cat([torch.zeros(1, dtype=torch.float64), walked / walked[-1]])

    @property
    def length(self) -> float:
        """Length in weight space; of a curve, that of the chain through its points."""
        return float(_steps(self.frame, self.coefficients).sum())

    @property
    def normalised_length(self) -> float:
        """Length as a multiple of the distance of the ends, 1 for a straight path; NaN of one place twice."""
        apart = float(_steps(self.frame, self.coefficients[[0, -1]]))
        return self.length / apart if apart else float("nan")

    def barrier(self, name: str | None = None) -> Barrier:
        """The barrier of one measurement along the path's length, by default of the first loss measured."""
        return barrier(self[name or next(iter(self.values))], self.places)

    @property
    def summary(self) -> dict[str, float | str | bool | None]:
        """Method, length, and of each measurement ends, maximum and barriers, as one row of a table."""
        told: dict[str, float | str | bool | None] = {"method": self.method, "found": self.found}
        told["settled"] = self.settled
        told |= {"length": self.length, "normalised_length": self.normalised_length}
        for name, values in self.values.items():
            b = barrier(values, self.places)
            told |= {f"{name}_start": float(values[0]), f"{name}_end": float(values[-1])}
            told |= {f"{name}_highest": float(b.highest), f"{name}_barrier": float(b.over_chord)}
            told |= {f"{name}_over_mean": float(b.over_mean), f"{name}_place": float(b.chord_place)}
        return told

    @property
    def table(self) -> pd.DataFrame:
        """One row a point: t, its place along the length, and what was measured there."""
        import pandas as pd

        columns: dict[str, Any] = {"t": self.t.numpy(), "place": self.places.numpy()}
        return pd.DataFrame(columns | {n: v.numpy() for n, v in self.values.items()})


def walk(
    landscape: Landscape,
    frames: Sequence[Points],
    coefficients: Sequence[Tensor],
    t: Sequence[Tensor],
    method: str,
    loss_only: bool = False,
) -> list[Path]:
    """Measures many paths, each with its own frame and ``[T, K]`` combinations, in one pass over the data.

    Args:
        landscape: What is measured.
        frames: One a path.
        coefficients: One a path.
        t: The parameters, one tensor a path.
        method: How they were found.
        loss_only: Whether to measure the loss on the first data set and nothing else.
    """
    if len(frames) == 1 and not loss_only:
        values = landscape.along(frames[0], coefficients[0])
    else:
        values = _together(landscape, frames, coefficients, loss_only)
    parts = {n: v.split([len(c) for c in coefficients]) for n, v in values.items()}
    return [
        Path(frame, c, s, {n: v[i] for n, v in parts.items()}, method)
        for i, (frame, c, s) in enumerate(zip(frames, coefficients, t, strict=True))
    ]


def _together(
    landscape: Landscape, frames: Sequence[Points], coefficients: Sequence[Tensor], loss_only: bool
) -> Measurements:
    """Measurements at the points of all paths, as many paths at a time as fit into memory."""
    each = frames[0].parameters * 8
    groups: list[list[int]] = [[]]
    held = 0
    for i, c in enumerate(coefficients):
        held += len(c) * each
        if groups[-1] and held > WEIGHTS_BYTES:
            groups.append([])
            held = len(c) * each
        groups[-1].append(i)
    found = []
    for group in groups:
        points = joined(*(combine(frames[i], coefficients[i]) for i in group))
        found.append({"loss": landscape.loss(points)} if loss_only else landscape(points))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def settled(course: Tensor, share: float = 0.1) -> bool | None:
    """Whether a loss has stopped falling: its last third is on average less than a tenth below the second.

    Args:
        course: The loss step by step, ``[T]``; noisy or not.
        share: What counts as falling, as a share of the middle third's mean.

    Returns:
        None where twice the standard error of the fall leaves it open, or there are fewer than 6 numbers;
        False where one is not finite.

    Example:
        >>> t = torch.arange(60.0)
        >>> settled(torch.exp(-t)), settled(1 / (1 + t)), settled(torch.ones(3))
        (False, False, None)
        >>> settled(1 + torch.exp(-t))
        True
    """
    third = len(course) // 3
    if len(course) and not bool(torch.isfinite(course).all()):
        return False
    if third < 2:
        return None
    before, after = course[-2 * third : -third].double(), course[-third:].double()
    fall = float(before.mean() - after.mean())
    # What neighbours differ by is noise, whatever the trend.
    noise = before.diff().square().mean() / 2 + after.diff().square().mean() / 2
    error = 2 * float((noise / third).sqrt())
    allowed = share * abs(float(before.mean()))
    if fall + error <= allowed:
        return True
    return False if fall - error > allowed else None


def ends_of(points: Points, pairs: Sequence[tuple[int, int]]) -> list[Points]:
    """The two ends of each pair, as two points.

    Raises:
        LosslabError: No pair, a pair of one and the same member, or one that does not exist.
    """
    if points.members < 2:
        raise LosslabError("a path needs two ends and there is one network: train with seeds=2")
    if not pairs:
        raise LosslabError("no pair was given: pass pairs such as [(0, 1)]")
    for a, b in pairs:
        if a == b or not (0 <= a < points.members and 0 <= b < points.members):
            raise LosslabError(
                f"the pair ({a}, {b}) names no two of {points.members} members: pass two different ones, "
                f"from 0 to {points.members - 1}"
            )
    return [points.select([a, b]) for a, b in pairs]


def packed(paths: Sequence[Path]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Paths as tensors and JSON values, for a file."""
    tensors: dict[str, Tensor] = {}
    told = []
    for i, path in enumerate(paths):
        tensors |= {f"{i}/frame/{n}": t for n, t in path.frame.items()}
        tensors |= {f"{i}/values/{n}": v for n, v in path.values.items()}
        tensors |= {f"{i}/coefficients": path.coefficients, f"{i}/t": path.t}
        for k, stage in enumerate(path.stages):
            tensors |= {f"{i}/stage/{k}/places": stage.places, f"{i}/stage/{k}/losses": stage.losses}
        row = {"method": path.method, "found": path.found, "settled": path.settled, "note": path.note}
        told.append({**row, "values": list(path.values), "steps": [stage.step for stage in path.stages]})
    return tensors, told


def unpacked(tensors: Mapping[str, Tensor], told: Sequence[Mapping[str, Any]], like: Points) -> list[Path]:
    """The paths that `packed` told, between points of the architecture of ``like``."""
    paths = []
    for i, row in enumerate(told):
        frame = ({n: tensors[f"{i}/frame/{n}"] for n in part} for part in (like.weights, like.buffers))
        stages = [
            Stage(step, tensors[f"{i}/stage/{k}/places"], tensors[f"{i}/stage/{k}/losses"])
            for k, step in enumerate(row["steps"])
        ]
        paths.append(
            Path(
                Points(*frame),
                tensors[f"{i}/coefficients"],
                tensors[f"{i}/t"],
                {n: tensors[f"{i}/values/{n}"] for n in row["values"]},
                row["method"],
                row["found"],
                row["settled"],
                row["note"],
                tuple(stages),
            )
        )
    return paths


def stations(count: int) -> Tensor:
    """``count`` even parameters from 0 to 1.

    Raises:
        LosslabError: Fewer than two.
    """
    if count < 2:
        raise LosslabError(f"a path of {count} points was asked for: pass at least its 2 ends")
    return torch.linspace(0, 1, count, dtype=torch.float64)


def _steps(frame: Points, coefficients: Tensor) -> Tensor:
    """Distances between consecutive points, ``[T - 1]``.

    The coefficients of each point add up to one, so only the frame's differences matter, and no point is
    written out.
    """
    moves = coefficients[1:, 1:] - coefficients[:-1, 1:]
    squares = torch.zeros(len(moves), dtype=torch.float64)
    for w in frame.weights.values():
        flat = w.reshape(len(w), -1).double().cpu()
        away = flat[1:] - flat[:1]
        squares += ((moves @ (away @ away.T)) * moves).sum(1)
    return squares.clamp(min=0).sqrt()


__all__ = ["STATIONS", "Path", "Stage", "ends_of", "packed", "settled", "stations", "unpacked", "walk"]
