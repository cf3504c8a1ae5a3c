"""How to train: the settings of a run, apart from the task and the rule."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from losslab.engine.batches import Batches
from losslab.engine.history import When
from losslab.errors import LosslabError, unknown

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class EarlyStopping:
    """Stops a member when a measurement has not improved for a while; the others go on.

    Args:
        metric: A column of the history that evaluations fill, e.g. ``"validation_loss"``.
        patience: Evaluations without improvement before the member stops; None never stops it.
        minimise: Whether smaller is better.
        least: An improvement smaller than this does not count.
        restore: Give the member the weights of its best evaluation in the end; ``"keep"`` leaves the last
            ones in place and holds the best in `Population.best`, for `Population.best_points`.
    """

    metric: str = "validation_loss"
    patience: int | None = 5
    minimise: bool = True
    least: float = 0.0
    restore: bool | str = True

    def __post_init__(self) -> None:
        if self.restore not in (True, False, "keep"):
            raise LosslabError(f'restore is {self.restore!r}: pass True, False or "keep"')
        if self.patience is not None and self.patience < 1:
            raise LosslabError(f"patience is {self.patience}: pass at least 1 evaluation")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a training run; see `losslab.train` for what each means."""

    steps: int
    batch_size: int | None
    shared_batches: bool = False
    order_seed: int = 0
    replacement: bool = False
    drop_last: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    execution: str = "auto"
    memory: float | None = None
    record: When = None
    evaluate: When = "epoch"
    evaluate_on: tuple[str, ...] = ()
    stop: EarlyStopping | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and not self.memory > 0:
            raise LosslabError(f"memory is {self.memory:g} bytes: pass a positive number, or None")

    def batches(self, examples: int, seeds: Sequence[int]) -> Batches:
        """The order of the data under this plan."""
        return Batches(
            examples,
            self.batch_size,
            seeds,
            self.shared_batches,
            self.order_seed,
            self.replacement,
            self.drop_last,
        )

    def describe(self) -> dict[str, Any]:
        """Every setting as plain values."""
        told = dataclasses.asdict(self)
        told["dtype"] = str(self.dtype).removeprefix("torch.")
        for name in ("record", "evaluate"):
            value = told[name]
            plain = value is None or isinstance(value, (str, int))
            told[name] = value if plain else repr(value) if callable(value) else [int(s) for s in value]
        told["evaluate_on"] = list(self.evaluate_on)
        return told


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating dtype, given as one or by name."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return DTYPES[dtype]
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LosslabError(f"dtype is {dtype}: pass a floating dtype such as torch.float32")
    return dtype


def as_seeds(seeds: int | Sequence[int], members: int | None) -> list[int]:
    """One seed a member.

    Args:
        seeds: A number of members (their seeds are 0, 1, ...), or the seeds themselves.
        members: How many members the hyperparameters speak of, None if any number will do. ``seeds=1`` with
            8 learning rates means 8 members of seed 0.
    """
    try:
        found = list(range(seeds)) if isinstance(seeds, int) else [operator.index(s) for s in seeds]
    except TypeError:
        found = []
    if not found or isinstance(seeds, bool):
        raise LosslabError(
            f"seeds is {seeds!r}: pass the number of members, at least 1, or a list of whole numbers"
        )
    if len(found) == 1 and members is not None:
        return found * members
    return found


def cross(seeds: int | Sequence[int], **hyper: Sequence[float]) -> tuple[list[int], dict[str, list[float]]]:
    """Every combination of seeds and hyperparameters, one a member; the seed varies fastest.

    Example:
        >>> cross(2, lr=[0.1, 0.2])
        ([0, 1, 0, 1], {'lr': [0.1, 0.1, 0.2, 0.2]})
    """
    import itertools

    own = as_seeds(seeds, None)
    names = list(hyper)
    rows = list(itertools.product(*hyper.values(), own))
    return [int(row[-1]) for row in rows], {n: [row[k] for row in rows] for k, n in enumerate(names)}
