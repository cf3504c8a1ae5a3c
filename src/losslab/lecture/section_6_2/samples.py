"""Gradients of single samples and of the whole training loss, at one network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losslab.engine import choose
from losslab.engine.backends import Stand
from losslab.engine.template import Template
from losslab.tasks import Task


def sample_gradients(task: Task, module: nn.Module) -> Tensor:
    """The gradient of each training example's own loss, ``[n, P]``, in the dtype of the module.

    The engine computes them, for n members that share the module's weights and have a batch of one example
    each. Networks with buffers are not meant here: batch norm knows no single example.
    """
    assert task.train is not None
    n = len(task.train)
    weights = {name: w.detach().expand(n, *w.shape) for name, w in module.named_parameters()}
    data = task.train.to(dtype=next(iter(weights.values())).dtype)
    batch = data.take(torch.arange(n)[:, None])
    at = Stand(weights, {}, batch, private=True, keys=torch.zeros(n, dtype=torch.int64))
    _, each = choose("stacked", Template(module), task.loss, at).gradients(task.loss, at)
    return torch.cat([g.flatten(1) for g in each.values()], dim=1)


def batch_gradient(task: Task, module: nn.Module, index: Tensor | None = None) -> Tensor:
    """The gradient of the mean loss over some training examples, all without an index: ``[P]``, by autograd.

    The module is used as it is: in training mode, batch norm normalises with the batch's own statistics.
    """
    assert task.train is not None
    weights = list(module.parameters())
    data = task.train.to(dtype=weights[0].dtype)
    batch = data.all() if index is None else data.take(index)
    return torch.cat([g.flatten() for g in torch.autograd.grad(task.loss(module, batch), weights)])
