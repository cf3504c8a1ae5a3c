"""Gradients of single samples and of the whole training loss, at one network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from losslab.tasks import Batch, Task
from losslab.tasks.nest import map_nest


def sample_gradients(task: Task, module: nn.Module) -> Tensor:
    """The gradient of each training example's own loss, ``[n, P]``, in the dtype of the module."""
    weights = {name: w.detach() for name, w in module.named_parameters()}
    dtype = next(iter(weights.values())).dtype

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, batch: Batch) -> Tensor:
            return task.loss(self.network, batch)

    def of_one(held: dict[str, Tensor], example: Batch) -> Tensor:
        alone = map_nest(lambda leaf: leaf.unsqueeze(0), example)
        return functional_call(loss, {f"network.{name}": w for name, w in held.items()}, (alone,))

    loss = Loss()
    assert task.train is not None
    each = vmap(grad(of_one), in_dims=(None, 0))(weights, task.train.to(dtype=dtype).all())
    return torch.cat([g.flatten(1) for g in each.values()], dim=1)


def batch_gradient(task: Task, module: nn.Module, index: Tensor | None = None) -> Tensor:
    """The gradient of the mean loss over some training examples, all without an index: ``[P]``.

    The module is used as it is: in training mode, batch norm normalises with the batch's own statistics.
    """
    weights = list(module.parameters())
    assert task.train is not None
    data = task.train.to(dtype=weights[0].dtype)
    batch = data.all() if index is None else data.take(index)
    return torch.cat([g.flatten() for g in torch.autograd.grad(task.loss(module, batch), weights)])
