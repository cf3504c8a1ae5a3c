"""Second derivatives of the batch's loss, for the rules that ask for them."""

from __future__ import annotations

import torch
from torch import Tensor

from losslab.engine.backends import Function
from losslab.engine.execution import Execution
from losslab.engine.points import Points, Stack
from losslab.tasks import Batch


class BatchCurvature:
    """The Hessian of each member's loss on one batch, at its own weights."""

    def __init__(
        self, execution: Execution, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor
    ) -> None:
        self.execution, self.fn = execution, fn
        self.points = Points(weights, buffers)
        self.batch, self.private, self.keys = batch, private, keys

    def hessian(self) -> Tensor:
        """Dense Hessians ``[N, P, P]`` by one backward pass a row, all members at once."""
        flat = self.points.matrix().detach().requires_grad_()
        buffers = {n: b.clone() for n, b in self.points.buffers.items()}
        with torch.enable_grad():
            losses = self.execution.run(
                self.fn, self.points.at(flat).weights, buffers, self.batch, self.private, self.keys, training=True
            )
            (gradient,) = torch.autograd.grad(losses.sum(), flat, create_graph=True)
        size = flat.shape[1]
        rows = torch.empty(flat.shape[0], size, size, dtype=flat.dtype, device=flat.device)
        for k in range(size):
            if not gradient.requires_grad:  # a loss linear in the weights has no second derivative
                return rows.zero_()
            (row,) = torch.autograd.grad(gradient[:, k].sum(), flat, retain_graph=True, allow_unused=True)
            rows[:, k] = 0.0 if row is None else row
        return 0.5 * (rows + rows.mT)
