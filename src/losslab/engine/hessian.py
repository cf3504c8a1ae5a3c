"""Second derivatives of the batch's loss, for the rules that ask for them."""

from __future__ import annotations

import torch
from torch import Tensor

from losslab.engine.backends import Function, Stand
from losslab.engine.execution import Execution
from losslab.engine.points import Points


class BatchCurvature:
    """The Hessian of each member's loss on one batch, at its own weights."""

    def __init__(self, execution: Execution, fn: Function, at: Stand) -> None:
        self.execution, self.fn, self.at = execution, fn, at

    def hessian(self) -> Tensor:
        """Dense Hessians ``[N, P, P]`` by one backward pass a row, all members at once."""
        points = Points(self.at.weights, {})
        flat = points.matrix().detach().requires_grad_()
        size = flat.shape[1]
        rows = torch.zeros(flat.shape[0], size, size, dtype=flat.dtype, device=flat.device)
        with torch.enable_grad():
            at = self.at.sheltered()
            at.weights = points.at(flat).weights
            losses = self.execution.run(self.fn, at, training=True)
            (gradient,) = torch.autograd.grad(losses.sum(), flat, create_graph=True)
        if not gradient.requires_grad:  # a loss linear in the weights has no second derivative
            return rows
        for k in range(size):
            (row,) = torch.autograd.grad(gradient[:, k].sum(), flat, retain_graph=True, allow_unused=True)
            if row is not None:
                rows[:, k] = row
        return 0.5 * (rows + rows.mT)
