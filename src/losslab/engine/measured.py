"""A network made ready to be measured: its mode fixed, dropout off, batch norm open to re-estimation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from losslab.engine import randomness
from losslab.engine.backends import Function, Stand
from losslab.engine.execution import Execution, choose, members_that_fit
from losslab.engine.points import Points
from losslab.engine.template import Template
from losslab.errors import LosslabError
from losslab.tasks import Batch, Data, Task
from losslab.tasks.check import check
from losslab.tasks.nest import map_nest

SEED = 0
"""Of the draws inside of a network that is measured."""

_PROBED_EXAMPLES = 256
_PROBED_MEMBERS = 8

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}


class Measured(Template):
    """A template that stays in one mode, whatever mode it is asked for.

    Args:
        module: The network; copied.
        training: Whether it stays in training mode, in which batch norm normalises by the batch.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        super().__init__(module)
        self.training = training
        self.norms = normalisers(self.module)
        for layer in self.module.modules():
            if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
                layer.dropout = 0.0
            elif isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.p = 0.0
        for norm in self.norms:
            if getattr(norm, "momentum", None) is None:
                # The cumulative average asks for a number in mid-program, which vmap has not; what the
                # statistics move to in a measurement is nobody's concern, or set by `weigh`.
                norm.momentum = 0.1  # type: ignore[assignment]

    def mode(self, training: bool) -> bool:
        """This template's own mode, whatever is asked for."""
        return self.training

    def weigh(self, share: float) -> None:
        """Gives the next batch this weight in the running statistics; the statistics so far keep the rest."""
        for norm in self.norms:
            norm.momentum = share  # type: ignore[assignment]


def normalisers(module: nn.Module) -> list[nn.Module]:
    """The layers that normalise by statistics of the batch: batch norm, torch's and losslab's."""
    instance = nn.modules.instancenorm._InstanceNorm
    return [m for m in module.modules() if hasattr(m, "running_mean") and not isinstance(m, instance)]


def without_dropout(fn: Function, met: set[str] | None = None) -> Function:
    """``fn`` with every dropout inside of it passing its input on; ``met`` takes the names of those met."""

    def quiet(module: nn.Module, batch: Batch) -> Any:
        with _NoDropout(met):
            return fn(module, batch)

    return quiet


class _NoDropout(TorchFunctionMode):
    def __init__(self, met: set[str] | None = None) -> None:
        super().__init__()
        self.met = met

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            self._meet(func, given.get("p", 0.5) if given.get("training", given.get("train", True)) else 0.0)
            return given["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = dict(kwargs)
            self._meet(func, args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)

    def _meet(self, func: Callable[..., Any], p: float) -> None:
        if self.met is not None and p > 0:
            self.met.add(func.__name__)


class Mode:
    """A network in one mode, and how stacks of it are run.

    Args:
        task: Of the network.
        module: The network; copied.
        training: The mode.
        loss: What is measured first, and decides how everything is run.
        execution: As for `choose`.
        memory: As for `choose`.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        training: bool,
        loss: Function,
        execution: str,
        memory: float | None,
    ) -> None:
        self.task, self.module, self.judged = task, module, False
        self.training, self.loss, self.execution, self.memory = training, loss, execution, memory
        self.template = Measured(module, training)
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
        self.found: dict[tuple[Any, ...], Execution] = {}

    def check(self, points: Points, data: Data | None) -> None:
        """Refuses points of another network, and, once, a loss that is no mean of examples."""
        shapes = {n: tuple(w.shape[1:]) for n, w in points.weights.items()}
        if shapes != self.shapes:
            odd = min(set(shapes.items()) ^ set(self.shapes.items()))[0]
            raise LosslabError(
                f"the points differ from the objective's network at {odd!r}: pass points of that network"
            )
        if not self.judged:
            like = next(self.module.parameters(), torch.empty(0))
            here = self.task.replace(train=None if data is None else data.to(like.device, like.dtype))
            check(here, copy.deepcopy(self.module).train(self.training), finite=False)
            self.judged = True

    def executed(self, at: Stand) -> Execution:
        """How to run these members: found out once a dtype, on a few members and examples."""
        like = next(iter(at.weights.values()))
        key = (like.dtype, like.device, at.private, at.members == 1)
        if key not in self.found:
            few = _headed(at.rows(slice(0, _PROBED_MEMBERS)))
            with torch.enable_grad():
                self.found[key] = choose(self.execution, self.template, self.loss, few, self.memory)
        execution = self.found[key]
        if execution.backend.name == "loop":
            return execution
        return dataclasses.replace(
            execution, chunk=members_that_fit(at, execution.example_bytes, self.memory)
        )

    def stream_size(self, points: Points, data: Data) -> int:
        """Examples to evaluate at a time where the batch has no say in the loss."""
        device = next(iter(points.weights.values())).device
        batch = data.take(torch.arange(min(len(data), _PROBED_EXAMPLES), device=device))
        execution = self.executed(stand(points, batch, common_key(0, device)))
        return execution.stream_size(len(data), points.members)


def stand(points: Points, batch: Batch, key: Tensor, private: bool = False) -> Stand:
    """Points on a batch, all with the same key ``[1]``."""
    return Stand(points.weights, points.buffers, batch, private, key.expand(points.members))


def common_key(number: int, device: torch.device) -> Tensor:
    """The key ``[1]`` of a chunk's draws, for every point: noise in the network must not tell them apart."""
    return randomness.fold(randomness.member_keys([SEED], "objective", device), number)


def _headed(at: Stand) -> Stand:
    """On the first examples only."""
    first = slice(0, _PROBED_EXAMPLES)
    take: Callable[[Tensor], Tensor] = (lambda t: t[:, first]) if at.private else (lambda t: t[first])
    return dataclasses.replace(at, batch=map_nest(take, at.batch))
