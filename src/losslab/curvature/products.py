"""Hessian, Gauss-Newton and empirical Fisher matrices, by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from losslab.curvature.graphs import (
    ForwardHessian,
    ForwardThereAndBack,
    Graph,
    Middle,
    Piece,
    ThereAndBack,
    Theta,
    TwiceDifferentiated,
    averaged,
    curved,
    example_losses,
)
from losslab.curvature.operator import Operator
from losslab.engine import Objective, Points
from losslab.engine.measured import without_dropout
from losslab.errors import LosslabError
from losslab.tasks import Batch, Supervised

Outputs = Callable[[nn.Module, Batch], Tensor]
Criterion = Callable[[Tensor, Batch], Tensor]


class Hessian(Operator):
    """The Hessian of the loss, ``H = d^2 L / d theta^2``, exact.

    With ReLU it is the Hessian within the linear region of the weights; what bends at the kinks is not in it.

    Example:
        >>> import torch
        >>> from losslab.tasks import function_task, quadratic
        >>> task = function_task(quadratic([1.0, 3.0], rotate=False))
        >>> hessian = Hessian(Objective(task), Points.from_modules([task.model()]))
        >>> hessian @ torch.ones(2, dtype=torch.float64)
        tensor([1., 3.], dtype=torch.float64)
    """

    kind: ClassVar[str] = "Hessian"

    def _graph(self, piece: Piece) -> Graph:
        return TwiceDifferentiated(piece, self.objective.loss)

    def _forward(self, piece: Piece) -> Graph:
        return ForwardHessian(piece, self.objective.loss)


class GaussNewton(Operator):
    """The generalised Gauss-Newton matrix, ``G = J^T H_out J``.

    J is the derivative of the network's outputs in the weights and ``H_out`` the Hessian of the criterion in
    the outputs: the Hessian without the curvature of the network, positive semidefinite for a convex
    criterion. For cross-entropy it is the Fisher matrix. Source: Schraudolph, Fast Curvature Matrix-Vector
    Products (2002); Martens, New Insights and Perspectives on the Natural Gradient Method (2020).

    Args:
        objective: The loss on its examples; of a task made by `losslab.supervised`, or with the two below.
        points: Where.
        layers: As for `Operator`.
        outputs: ``outputs(module, batch)``, ``[B, ...]``.
        criterion: ``criterion(outputs, batch)``, the mean over the examples.
        strategy: As for `Operator`.

    Example:
        >>> import torch
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> from losslab.tasks import supervised
        >>> task = supervised(lambda: nn.Linear(2, 1, bias=False), (x, y), criterion=nn.MSELoss())
        >>> points = Points.from_modules([task.model()])
        >>> GaussNewton(Objective(task), points) @ torch.tensor([1.0, 3.0])
        tensor([1., 3.])
    """

    kind: ClassVar[str] = "Gauss-Newton matrix"

    def __init__(
        self,
        objective: Objective,
        points: Points,
        layers: Sequence[str] | None = None,
        *,
        outputs: Outputs | None = None,
        criterion: Criterion | None = None,
        strategy: str = "auto",
    ) -> None:
        steps = _steps(objective, outputs, criterion)
        if steps is None:
            raise LosslabError(
                f"the loss of {objective.task.name!r} hides what the network puts out: make the task by "
                "losslab.supervised, or pass outputs=outputs(module, batch) and "
                "criterion=criterion(outputs, batch)"
            )
        self._outputs, self._criterion = steps
        super().__init__(objective, points, layers, strategy)

    def _middle(self) -> Middle:
        return curved(self._criterion)

    def _out(self, piece: Piece) -> Callable[[Theta], Tensor]:
        return lambda theta: piece.run(self._outputs, theta)

    def _graph(self, piece: Piece) -> Graph:
        return ThereAndBack(piece, self._out(piece), self._middle())

    def _forward(self, piece: Piece) -> Graph:
        return ForwardThereAndBack(piece, self._out(piece), self._middle())


class EmpiricalFisher(Operator):
    """The mean over the examples of ``g_i g_i^T``, the empirical Fisher matrix.

    ``g_i`` is the gradient of example i's own loss. It is no approximation of the Hessian away from a good
    fit (Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation, 2019); it is the second
    moment of the gradient noise. Example losses are those of `Objective.per_example`.

    Args:
        objective: The loss on its examples. Where it is of a task made by `losslab.supervised`, or given by
            the two below, all examples share one pass; else each has its own copy of the weights, which costs
            memory.
        points: Where.
        layers: As for `Operator`.
        outputs: As for `GaussNewton`.
        criterion: As for `GaussNewton`.
        strategy: As for `Operator`.

    Raises:
        LosslabError: Batch norm uses the batch's statistics, so that no example has a gradient of its own; or
            the task has no examples.

    Example:
        >>> from losslab.tasks import Task
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> task = Task(lambda: nn.Linear(1, 1, bias=False), lambda m, x: m(x).mean(), x)
        >>> EmpiricalFisher(Objective(task), Points.from_modules([task.model()])) @ torch.ones(1)
        tensor([5.])
    """

    kind: ClassVar[str] = "empirical Fisher matrix"

    def __init__(
        self,
        objective: Objective,
        points: Points,
        layers: Sequence[str] | None = None,
        *,
        outputs: Outputs | None = None,
        criterion: Criterion | None = None,
        strategy: str = "auto",
    ) -> None:
        if objective.data is None:
            raise LosslabError(
                f"the task {objective.task.name!r} has no data, so no examples: take the Hessian"
            )
        if objective.batch_norm == "batch" and objective.normalised:
            raise LosslabError(
                "with batch_norm='batch' an example's gradient depends on the others: pass "
                "batch_norm='running' or 're-estimate'"
            )
        self._steps = _steps(objective, outputs, criterion)
        super().__init__(objective, points, layers, strategy)

    def _losses(self, piece: Piece) -> Callable[[Theta], Tensor]:
        if self._steps is None:
            return lambda theta: piece.each(self.objective.loss, theta)
        outputs, criterion = self._steps
        return lambda theta: example_losses(criterion, piece.run(outputs, theta), piece.at.batch)

    def _pieces(self) -> Any:
        pieces = super()._pieces()
        if self._steps is not None:
            return pieces
        return (part for piece in pieces for part in piece.thinned(_COPIES // self.size))

    def _graph(self, piece: Piece) -> Graph:
        return ThereAndBack(piece, self._losses(piece), averaged)

    def _forward(self, piece: Piece) -> Graph:
        return ForwardThereAndBack(piece, self._losses(piece), averaged)


_COPIES = 1 << 25
"""Weights in the copies that examples get, at a time."""


def _steps(
    objective: Objective, outputs: Outputs | None, criterion: Criterion | None
) -> tuple[Outputs, Criterion] | None:
    """What the network puts out and what becomes of it, if they are known."""
    if (outputs is None) != (criterion is None):
        raise LosslabError("outputs and criterion belong together and one was given: pass both, or none")
    if outputs is not None and criterion is not None:
        return without_dropout(outputs), criterion
    loss = objective.task.loss
    return (without_dropout(loss.outputs), loss.compared) if isinstance(loss, Supervised) else None


__all__ = ["EmpiricalFisher", "GaussNewton", "Hessian"]
