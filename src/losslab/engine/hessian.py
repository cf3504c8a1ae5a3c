"""The loss of a batch around the weights, for the rules that ask about its curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from losslab.engine.backends import Function, Stand
from losslab.engine.execution import Execution
from losslab.engine.points import Points
from losslab.errors import LosslabError
from losslab.tasks import Batch
from losslab.tasks.nest import map_nest


class BatchCurvature:
    """Each member's loss on one batch around its own weights: all that a rule may ask (`rules.Landscape`).

    Args:
        execution: How the members are run.
        fn: The loss.
        at: Where they stand, and on which batch; buffers stay as they are.
    """

    def __init__(self, execution: Execution, fn: Function, at: Stand) -> None:
        self.execution, self.fn, self.at = execution, fn, at

    def hessian(self) -> Tensor:
        """Dense Hessians ``[N, P, P]`` by one backward pass a row, all members at once."""
        flat, gradient = self._differentiated
        size = flat.shape[1]
        rows = torch.zeros(flat.shape[0], size, size, dtype=flat.dtype, device=flat.device)
        if not gradient.requires_grad:  # a loss linear in the weights has no second derivative
            return rows
        for k in range(size):
            (row,) = torch.autograd.grad(gradient[:, k].sum(), flat, retain_graph=True, allow_unused=True)
            if row is not None:
                rows[:, k] = row
        return 0.5 * (rows + rows.mT)

    def products(self, vectors: Tensor) -> Tensor:
        """Hessians times one vector a member, ``[N, P] -> [N, P]``; the gradient's graph is kept."""
        flat, gradient = self._differentiated
        if not gradient.requires_grad:
            return torch.zeros_like(vectors)
        (found,) = torch.autograd.grad(gradient, flat, vectors, retain_graph=True, allow_unused=True)
        return torch.zeros_like(vectors) if found is None else found

    def gauss_newton(self) -> Tensor:
        """Gauss-Newton matrices ``[N, P, P]``: there and back through the network for each column.

        Raises:
            LosslabError: The loss is no criterion of the network's outputs, or is of the weights alone.
        """
        outputs_of, compared = _steps(self.fn)
        flat = self._flat()
        with torch.enable_grad():
            outputs = self._run(outputs_of, flat)
            pull = torch.zeros_like(outputs, requires_grad=True)
            (pulled,) = torch.autograd.grad(outputs, flat, pull, create_graph=True)
            seen = outputs.detach().requires_grad_()
            losses = torch.stack([compared(z, self._batch(i)) for i, z in enumerate(seen.unbind(0))])
            (slope,) = torch.autograd.grad(losses.sum(), seen, create_graph=True)
        columns = []
        for k in range(flat.shape[1]):
            (moved,) = torch.autograd.grad(pulled[:, k].sum(), pull, retain_graph=True)
            if slope.requires_grad:
                (moved,) = torch.autograd.grad(slope, seen, moved, retain_graph=True)
            else:  # a criterion linear in the outputs
                moved = torch.zeros_like(moved)
            columns.append(torch.autograd.grad(outputs, flat, moved, retain_graph=True)[0])
        rows = torch.stack(columns, dim=1)
        return 0.5 * (rows + rows.mT)

    def value(self, weights: Tensor) -> Tensor:
        """The loss at other weights, ``[N, P] -> [N]``."""
        with torch.no_grad():
            losses: Tensor = self._run(self.fn, weights)
        return losses

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient at other weights, ``[N, P] -> [N, P]``."""
        flat = weights.detach().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self._run(self.fn, flat).sum(), flat)
        return found

    @cached_property
    def _differentiated(self) -> tuple[Tensor, Tensor]:
        """The weights ``[N, P]`` and the gradient with its graph."""
        flat = self._flat()
        with torch.enable_grad():
            losses = self._run(self.fn, flat)
            (gradient,) = torch.autograd.grad(losses.sum(), flat, create_graph=True)
        return flat, gradient

    def _batch(self, member: int) -> Batch:
        return map_nest(lambda t: t[member], self.at.batch) if self.at.private else self.at.batch

    def _flat(self) -> Tensor:
        return Points(self.at.weights, {}).matrix().detach().requires_grad_()

    def _run(self, fn: Function, flat: Tensor) -> Tensor:
        at = dataclasses.replace(self.at.sheltered(), weights=Points(self.at.weights, {}).at(flat).weights)
        result: Tensor = self.execution.run(fn, at, training=True)
        return result


def _steps(loss: Function) -> tuple[Function, Callable[[Tensor, Batch], Tensor]]:
    """The two steps of a loss: the network's outputs, and what is made of them."""
    outputs, compared = (getattr(loss, name, None) for name in ("outputs", "compared"))
    if outputs is None or compared is None:
        raise LosslabError(
            "the Gauss-Newton matrix needs the network's outputs, and this loss gives none: make the task "
            "with losslab.supervised, or give the loss the methods outputs(model, batch) and "
            "compared(outputs, batch)"
        )
    return outputs, compared
