"""A chain of torch's own layers, run straight through: what the tape records, without recording it.

Calling modules, looking up operations and noting them costs as much as the arithmetic of a network like
64-32-10. Where all code between the weights and the loss is torch's own and known here, it does the same at
every step, and need not be run to find out what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.engine import kernels, operations
from losslab.engine.compiled import Block, Compiled
from losslab.engine.gradients import Gradients
from losslab.engine.points import Stack
from losslab.engine.stacked import NotInTable
from losslab.engine.template import Template
from losslab.tasks import Supervised

ACTIVATIONS: dict[type[nn.Module], operations.Activation] = {
    nn.ReLU: operations.RELU,
    nn.Tanh: operations.TANH,
    nn.Sigmoid: operations.SIGMOID,
    nn.SiLU: operations.SILU,
    nn.Softsign: operations.SOFTSIGN,
}

LOSSES: dict[Any, Callable[[Tensor, Tensor], tuple[Tensor, operations.Vjp]]] = {
    F.cross_entropy: operations.cross_entropy,
    F.mse_loss: operations.mean_square,
}

TRACKED = ("running_mean", "running_var", "num_batches_tracked")
"""Batch norm's buffers."""

Step = Callable[[Tensor, Stack, Stack, bool], tuple[Tensor, Callable[[Tensor], list[Any]]]]
"""Value, weights, buffers, whether the value depends on weights -> the next value, and the way back to the
step's weights and then to its value."""


Visit = Callable[[int, Tensor, bool], None]
"""Number of a step, a value ``[N, B, ...]`` after it, whether that is the gradient."""


@dataclass(frozen=True)
class Chain:
    """Layers in a row, and a loss at their end.

    Args:
        steps: Each with the names of its weights.
        loss: The loss of outputs and targets.
        classes: Whether targets are class indices.
        called: Of each step, the name of its module.
        compiled: The same as machine code, where there is some for these layers.
    """

    steps: tuple[tuple[Step, tuple[str, ...]], ...]
    loss: Callable[[Tensor, Tensor], tuple[Tensor, operations.Vjp]]
    classes: bool
    called: tuple[str, ...]
    compiled: Compiled | None = None

    @classmethod
    def of(cls, template: Template, loss: Any, weights: Stack) -> Chain | None:
        """The chain that a network and a loss are; None if there is code in them that is not known here."""
        if type(loss) is not Supervised or loss.criterion not in LOSSES:
            return None
        names = {(id(table), key): name for table, key, name in template.slots}
        steps: list[tuple[Step, tuple[str, ...]]] = []
        forgotten = False
        for layer in layers(template.module):
            found = None if layer is None else _step(layer, names, template, forgotten)
            if found is None:
                return None
            steps.append(found)
            # The way back through these needs their inputs, not what came out.
            forgotten = isinstance(layer, (nn.Linear, nn.BatchNorm1d))
        used = [name for _, mine in steps for name in mine]
        if not used or sorted(used) != sorted(weights):  # frozen, tied and unused weights are the tape's
            return None
        classes = loss.criterion is F.cross_entropy
        blocks = _blocks(template, names) if classes else None
        flat = any(isinstance(layer, nn.Flatten) for layer in layers(template.module))
        compiled = Compiled.of(blocks, flat)
        known = {id(module): name for name, module in template.module.named_modules()}
        called = tuple(known[id(layer)] for layer in layers(template.module))
        return cls(tuple(steps), LOSSES[loss.criterion], classes, called, compiled)

    def gradients(
        self, weights: Stack, buffers: Stack, batch: Any, private: bool
    ) -> tuple[Tensor, Gradients]:
        """Losses ``[N]`` and gradients of all members.

        Raises:
            NotInTable: A batch of a kind that the chain has no kernels for.
        """
        x, y = self.stacked(weights, batch, private)
        if self.compiled is not None:
            done = self.compiled(weights, buffers, x, y)
            if done is not None:
                return done[0], Gradients(dict(done[1]))
        return self.stepwise(weights, buffers, x, y)

    def stacked(self, weights: Stack, batch: Any, private: bool) -> tuple[Tensor, Tensor]:
        """Examples and targets, ``[N, B, ...]`` both.

        Raises:
            NotInTable: A batch of a kind that the chain has no kernels for.
        """
        x, y = batch
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            raise NotInTable("a batch of anything but two tensors")
        if not private:
            members = next(iter(weights.values())).shape[0]
            x, y = x.expand(members, *x.shape), y.expand(members, *y.shape)
        if self.classes and (y.dim() != 2 or y.is_floating_point()):
            raise NotInTable("this form of cross_entropy")
        if x.shape[:2] != y.shape[:2]:
            raise NotInTable("more examples than targets, or fewer")
        return x, y

    def stepwise(
        self, weights: Stack, buffers: Stack, x: Tensor, y: Tensor, visit: Visit | None = None
    ) -> tuple[Tensor, Gradients]:
        """Operation by operation, all members at once.

        Args:
            weights: Name -> ``[N, ...]``.
            buffers: The same.
            x: ``[N, B, ...]``.
            y: The same.
            visit: Is shown the value after each step, and its gradient on the way back; the next step may
                overwrite them. There is no gradient before the first step with weights.
        """
        notes: list[tuple[int, tuple[str, ...], Callable[[Tensor], list[Any]]]] = []
        for k, (step, names) in enumerate(self.steps):
            x, vjp = step(x, weights, buffers, bool(notes))
            if names or notes:
                notes.append((k, names, vjp))
            if visit is not None:
                visit(k, x, False)
        if x.dim() != 3 or not (self.classes or y.shape == x.shape):
            raise NotInTable("this form of the loss")
        losses, back = self.loss(x, y)
        g = back(torch.ones_like(losses))
        found: dict[str, Any] = {}
        del x, y, back  # memory given free on the way is taken again while it is still in the cache
        while notes:
            k, names, vjp = notes.pop()
            if visit is not None:
                visit(k, g, True)
            sent = vjp(g)
            found.update(zip(names, sent, strict=False))
            g = sent[-1]
            del vjp
        return losses, Gradients({name: found[name] for name in weights})


def layers(module: nn.Module) -> Iterator[nn.Module | None]:
    """The layers in their order; None stands for what is no plain layer."""
    hooked = any(getattr(module, table) for table in _HOOKS)
    if hooked or "forward" in module.__dict__:
        yield None
    elif type(module) is nn.Sequential:
        for inner in module:
            yield from layers(inner)
    else:
        yield module


def _blocks(template: Template, names: dict[tuple[int, str], str]) -> tuple[Block, ...] | None:
    """The chain as blocks that there is machine code for; None if there is none for some layer."""
    found: list[Block] = []
    before: Any = None
    normed = template.mode(True)  # a measured network may stay in evaluation mode
    called = {id(module): name for name, module in template.module.named_modules()}
    for layer in layers(template.module):
        kind = type(layer)
        if isinstance(layer, nn.Linear):
            bias = None if layer.bias is None else names[id(layer._parameters), "bias"]
            weight = names[id(layer._parameters), "weight"]
            found.append(Block(weight, bias, layers=(called[id(layer)], "", "")))
        elif isinstance(layer, nn.BatchNorm1d) and layer.affine and before is nn.Linear and normed:
            affine = [names[id(layer._parameters), key] for key in ("weight", "bias")]
            tracked = [names[id(layer._buffers), key] for key in TRACKED]
            norm, known = (*affine, *tracked), (found[-1].layers[0], called[id(layer)], "")
            found[-1] = replace(
                found[-1], norm=norm, momentum=layer.momentum or 0.0, eps=layer.eps, layers=known
            )
        elif kind is nn.ReLU and before in (nn.Linear, nn.BatchNorm1d):
            known = (*found[-1].layers[:2], called[id(layer)])
            found[-1] = replace(found[-1], gated=True, layers=known)
        elif kind is not nn.Flatten or found:
            return None
        before = kind
    return tuple(found)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _step(
    layer: nn.Module, names: dict[tuple[int, str], str], template: Template, forgotten: bool
) -> tuple[Step, tuple[str, ...]] | None:
    held = {key: names[id(layer._parameters), key] for key, p in layer._parameters.items() if p is not None}
    mine = tuple(held[key] for key in ("weight", "bias") if key in held)
    kind = type(layer)
    if kind is nn.Linear:
        return _linear(*mine), mine
    if kind in ACTIVATIONS:
        return _activation(ACTIVATIONS[kind], forgotten), ()
    if kind is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        return _flatten, ()
    if type(layer) is nn.BatchNorm1d and layer.track_running_stats and layer.momentum is not None:
        kept = [names[id(layer._buffers), key] for key in TRACKED]
        return _batch_norm(mine, kept, layer.momentum, layer.eps, template), mine
    return None


def _linear(weight: str, bias: str | None = None) -> Step:
    def run(x: Tensor, weights: Stack, buffers: Stack, inner: bool) -> tuple[Tensor, Any]:
        if x.dim() != 3:
            raise NotInTable("linear of anything but a batch of vectors")
        return operations.linear(x, weights[weight], None if bias is None else weights[bias], inner)

    return run


def _activation(activation: operations.Activation, forgotten: bool) -> Step:
    def run(x: Tensor, weights: Stack, buffers: Stack, inner: bool) -> tuple[Tensor, Any]:
        y, vjp = activation(x, forgotten)
        return y, lambda g: [vjp(g)]

    return run


def _flatten(x: Tensor, weights: Stack, buffers: Stack, inner: bool) -> tuple[Tensor, Any]:
    shape = x.shape
    return x.flatten(2), lambda g: [g.reshape(shape)]


def _batch_norm(
    mine: tuple[str, ...], kept: list[str], momentum: float, eps: float, template: Template
) -> Step:
    def run(x: Tensor, weights: Stack, buffers: Stack, inner: bool) -> tuple[Tensor, Any]:
        if x.dim() != 3:
            raise NotInTable("batch norm of anything but a batch of vectors")
        mean, var, count = (buffers[name] for name in kept)
        training = template.mode(True)
        if training:
            count.add_(1)
        scale, shift = (weights[name] for name in mine) if mine else (None, None)
        y, vjp = kernels.batch_norm_with_vjp(x, mean, var, scale, shift, training, momentum, eps)

        def back(g: Tensor) -> list[Any]:
            gx, gw, gb = vjp(g)
            return [gw, gb, gx] if mine else [gx]

        return y, back

    return run
