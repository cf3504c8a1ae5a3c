"""Loss and error of a task on all its data sets, at any number of points, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import Objective, Points, Population
from losslab.engine.backends import Function, TableBackend
from losslab.engine.measured import without_dropout
from losslab.engine.objective import POLICIES
from losslab.errors import unknown
from losslab.paths.combinations import combine
from losslab.paths.sharing import Remembering, run_family
from losslab.tasks import Batch, Supervised, Task

WEIGHTS_BYTES = 1 << 28
"""Memory for the weights of the points that are evaluated together."""

Measurements = dict[str, Tensor]
"""``train_loss``, ``train_error``, ``test_loss``, ... -> one number a point, float64."""


class Landscape:
    """What a task's networks are worth, as functions of the weights: losses and errors on its data sets.

    Each chunk of data is read once for all points that fit into memory, and the loss and the metrics share
    one pass through the network. A metric ``accuracy`` is told as ``error = 1 - accuracy``. NaN and infinite
    values are kept. Nothing of the networks given is touched.

    Args:
        task: Model, loss, metrics, data.
        on: Data sets out of ``"train"``, ``"validation"``, ``"test"``; by default training and test data, as
            far as there are any.
        batch_norm: The policy of `Objective`. With ``"re-estimate"``, the default, each point gets
            statistics of the training data, and the other data sets are evaluated with these.
        chunk: Examples evaluated together.
        execution: As for `losslab.train`.
        memory: Bytes to stay within.
        module: A network of the task, for its code.

    Raises:
        LosslabError: An unknown data set or policy.

    Example:
        >>> from losslab.tasks import double_well, function_task
        >>> landscape = Landscape(function_task(double_well))
        >>> landscape(Points({"x": torch.tensor([[0.0, 0.0], [1.0, 0.0]])}, {}))
        {'loss': tensor([1., 0.], dtype=torch.float64)}
    """

    def __init__(
        self,
        task: Task,
        on: Sequence[str] | None = None,
        *,
        batch_norm: str = "re-estimate",
        chunk: int | None = None,
        execution: str = "auto",
        memory: float | None = None,
        module: nn.Module | None = None,
    ) -> None:
        if batch_norm not in POLICIES:
            raise unknown("batch-norm policy", batch_norm, POLICIES)
        names = on if on is not None else [n for n in ("train", "test") if getattr(task, n) is not None]
        self.task, self.batch_norm = task, batch_norm
        self.train = Objective(
            task, batch_norm=batch_norm, chunk=chunk, execution=execution, memory=memory, module=module
        )
        settled = "running" if batch_norm == "re-estimate" else batch_norm
        looks = self.train.under(settled)
        self.sets = {f"{n}_": looks.on(n) for n in names} or {"": looks}
        self._fn = _told(task)
        self._agrees: dict[tuple[torch.dtype, torch.device], bool] = {}

    @classmethod
    def of(cls, population: Population, on: Sequence[str] | None = None, **options: Any) -> Landscape:
        """The landscape in which a population has been trained; options as for the class."""
        return cls(population.task, on, module=population.template, **options)

    def __call__(self, points: Points) -> Measurements:
        """All measurements at N points, name -> ``[N]``."""
        size = max(1, int(WEIGHTS_BYTES / _bytes(points)))
        if points.members <= size:
            return self._together(points)
        pieces = [range(a, min(a + size, points.members)) for a in range(0, points.members, size)]
        return _joined(self._together(points.select(rows)) for rows in pieces)

    def loss(self, points: Points) -> Tensor:
        """The loss on the first data set alone, ``[N]``, float64: what methods that search go by."""
        objective = next(iter(self.sets.values()))
        size = max(1, int(WEIGHTS_BYTES / _bytes(points)))
        pieces = [points]
        if points.members > size:
            whole = range(points.members)
            pieces = [points.select(whole[a : a + size]) for a in whole[::size]]
        return torch.cat([objective.value(self.train.settled(p)) for p in pieces]).double().cpu()

    def along(self, frame: Points, coefficients: Tensor) -> Measurements:
        """All measurements at combinations of a few points, see `combine`: frame K, coefficients ``[M, K]``.

        Where there is no batch norm and all operations are in the engine's table, the first layer is computed
        for the frame alone.
        """
        if self._shares(frame, coefficients):
            return self._family(frame, coefficients)
        size = max(1, int(WEIGHTS_BYTES / _bytes(frame)))
        return _joined(self._together(combine(frame, rows)) for rows in coefficients.split(size))

    # -- how ---------------------------------------------------------------------------------------------

    def _together(self, points: Points) -> Measurements:
        points = self.train.settled(points)
        found: Measurements = {}
        for prefix, objective in self.sets.items():
            for execution, at, share in objective.pieces(points):
                with torch.no_grad():
                    told = execution.run(self._fn, at, training=False)
                _add(found, prefix, told, share)
        return _errors(found)

    def _family(self, frame: Points, coefficients: Tensor) -> Measurements:
        device, dtype = (getattr(next(iter(frame.weights.values())), a) for a in ("device", "dtype"))
        coefficients = coefficients.to(device, dtype)
        found: Measurements = {}
        for prefix, objective in self.sets.items():
            for execution, at, share in objective.pieces(_spread(frame, 8)):
                template = execution.backend.template
                told = run_family(template, self._fn, frame, coefficients, at, _widest(frame))
                _add(found, prefix, told, share)
        return _errors(found)

    def _shares(self, frame: Points, coefficients: Tensor) -> bool:
        """Whether the shared first layer pays, is possible, and gives what the usual way gives."""
        few = frame.members > 8 or len(coefficients) < 2 * frame.members
        if few or self.train.data is None or self.train.normalised or not torch.isfinite(coefficients).all():
            return False
        if not all(bool(torch.isfinite(w).all()) for w in frame.weights.values()):
            return False
        like = next(iter(frame.weights.values()))
        key = (like.dtype, like.device)
        if key not in self._agrees:
            self._agrees[key] = self._tried(frame, coefficients)
        return self._agrees[key]

    def _tried(self, frame: Points, coefficients: Tensor) -> bool:
        execution, at, _ = next(iter(next(iter(self.sets.values())).pieces(_spread(frame, 8))))
        if not isinstance(execution.backend, TableBackend):
            return False
        rows = coefficients[[0, len(coefficients) // 2]]
        points = combine(frame, rows)
        with torch.no_grad():
            wanted = execution.run(
                self._fn, type(at)(points.weights, points.buffers, at.batch, False, at.keys[:2]), False
            )
        like = next(iter(frame.weights.values()))
        try:
            found = run_family(execution.backend.template, self._fn, frame, rows.to(like), at, _widest(frame))
        except Exception:  # whatever the network's code meets that the table does not know
            return False
        tolerance = 1e-9 if like.dtype == torch.float64 else 1e-3
        return all(_near(wanted[n], found[n], tolerance) for n in wanted)


def _told(task: Task) -> Function:
    metrics, once = task.metrics, isinstance(task.loss, Supervised)

    def fn(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        network: Any = Remembering(module) if once else module
        told = {} if metrics is None else dict(metrics(network, batch))
        return {"loss": task.loss(network, batch), **told}

    return without_dropout(fn)


def _add(found: Measurements, prefix: str, told: dict[str, Tensor], share: float) -> None:
    for name, value in told.items():
        part = value.detach().double().cpu() * share
        found[prefix + name] = found[prefix + name] + part if prefix + name in found else part


def _errors(found: Measurements) -> Measurements:
    def wrong(name: str, value: Tensor) -> tuple[str, Tensor]:
        if not name.endswith("accuracy"):
            return name, value
        prefix = name.removesuffix("accuracy")
        # Where the loss is NaN, so is every comparison, and a share of right answers means nothing.
        lost = found[prefix + "loss"].isnan()
        return prefix + "error", (1.0 - value).masked_fill(lost, float("nan"))

    return dict(wrong(name, value) for name, value in found.items())


def _joined(parts: Iterable[Measurements]) -> Measurements:
    found = list(parts)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _spread(frame: Points, count: int) -> Points:
    return frame.map(lambda t: t[:1].expand(count, *t.shape[1:]))


def _bytes(points: Points) -> int:
    return sum(w[0].numel() * w.element_size() for w in points.weights.values())


def _widest(frame: Points) -> int:
    """The largest number of outputs of a layer, as far as the weights' shapes tell."""
    return max((w.shape[1] for w in frame.weights.values() if w.dim() > 2), default=1)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True))


def require(name: str, measured: Measurements) -> Tensor:
    """One measurement by its name.

    Raises:
        LosslabError: There is none of this name.
    """
    if name not in measured:
        raise unknown("measurement", name, measured)
    return measured[name]


__all__ = ["Landscape", "Measurements", "require"]
