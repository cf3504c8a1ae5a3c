"""The loss as a function on weight space: a task and fixed examples, at a stack of points."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.engine import randomness
from losslab.engine.backends import Function, Stand
from losslab.engine.execution import EXECUTIONS, Execution
from losslab.engine.measured import SEED, Mode, common_key, stand, without_dropout
from losslab.engine.points import Points, Stack
from losslab.engine.population import Population
from losslab.errors import LosslabError, unknown
from losslab.tasks import Batch, Data, Task, build
from losslab.tasks.nest import map_nest

POLICIES = ("batch", "running", "re-estimate")


class Objective:
    """``L(theta) = mean over the examples of loss(model at theta, example)``, at N points at once.

    Everything that looks at the loss as a function of the weights asks an objective: values, gradients,
    Hessian-vector products. All points are evaluated as one program where the network allows it, each chunk
    of data is read once for all of them and counts by its number of examples. The network given is copied;
    its weights, gradients, buffers, mode and hooks, and torch's random state, stay as they are. Dropout is
    off. Other noise inside of the network is drawn alike at every point and every call, so the objective is a
    function of the weights alone.

    What batch norm does is a choice, because it decides which function is measured:

    - ``"batch"``: training mode, each chunk is normalised by its own statistics; derivatives go through
      them. By default all examples are one chunk when the network has batch norm. In smaller chunks the
      objective is the mean of the chunks' losses, that of training on batches of this size in this order.
    - ``"running"``: evaluation mode, with the running statistics that each point carries in its buffers.
    - ``"re-estimate"``: evaluation mode, with statistics of these examples at each point: one pass in
      training mode (batch mean and unbiased batch variance, averaged over chunks by their examples) and then
      a second one for the loss. For points that no training run has visited. Derivatives hold the statistics
      fixed, so they are not those of the value.

    Args:
        task: What is minimised.
        data: ``"train"``, ``"validation"`` or ``"test"``, or examples of its own: anything that `Data.of`
            reads.
        batch_norm: One of the above.
        chunk: Examples evaluated together; by default all with batch norm, else as many as are fast.
        execution: As for `losslab.train`.
        memory: Bytes to stay within; half of what is free by default.
        module: A network of the task, for its code; built by the task if None.

    Raises:
        LosslabError: An unknown policy, data set or execution, or a chunk below one.

    Example:
        >>> x = torch.ones(3, 1)
        >>> task = Task(lambda: nn.Linear(1, 1, bias=False), lambda m, x: m(x).square().mean(), x)
        >>> objective = Objective(task)
        >>> points = Points({"weight": torch.tensor([[[1.0]], [[3.0]]])}, {})
        >>> objective.value(points)
        tensor([1., 9.])
        >>> objective.gradient(points)[1].matrix().T
        tensor([[2., 6.]])
    """

    def __init__(
        self,
        task: Task,
        data: Any = "train",
        *,
        batch_norm: str = "batch",
        chunk: int | None = None,
        execution: str = "auto",
        memory: float | None = None,
        module: nn.Module | None = None,
    ) -> None:
        if batch_norm not in POLICIES:
            raise unknown("batch-norm policy", batch_norm, POLICIES)
        if execution not in EXECUTIONS:
            raise unknown("execution", execution, EXECUTIONS)
        if chunk is not None and chunk < 1:
            raise LosslabError(f"chunk is {chunk}: pass at least one example, or None")
        if module is None:
            with randomness.seeded(SEED, "init"):
                module = build(task)
        self.task, self.batch_norm = task, batch_norm
        self.execution, self.memory, self.chunk = execution, memory, chunk
        self.data = _examples(task, data)
        self._module = module
        self._metrics = None if task.metrics is None else without_dropout(task.metrics)
        self._loss = without_dropout(task.loss)
        self._modes: dict[tuple[bool, str], Mode] = {}
        self._moved: dict[tuple[torch.device, torch.dtype], Data] = {}

    @classmethod
    def of(
        cls, where: Population | nn.Module, loss: Any = None, data: Any = "train", **options: Any
    ) -> Objective:
        """The objective of a population's task, or of a module with a loss and data.

        Args:
            where: A population, or any module.
            loss: ``loss(module, batch)``, the mean over the batch's examples; for a module.
            data: As for the class; for a module, its examples.
            **options: As for the class.

        Example:
            >>> Objective.of(nn.Linear(2, 1), lambda m, x: m(x).mean(), torch.ones(4, 2)).batch_norm
            'batch'
        """
        if isinstance(where, Population):
            return cls(where.task, data, module=where.template, **options)
        if not callable(loss) or isinstance(data, str):
            raise LosslabError(
                "a module alone has no objective: pass loss=loss(module, batch) and data= with it"
            )
        task = Task(lambda: copy.deepcopy(where), loss, data, name=type(where).__name__)
        return cls(task, module=where, **options)

    def on(self, data: Any) -> Objective:
        """The same on other examples; what was found out about the network is kept."""
        other = copy.copy(self)
        other.data, other._moved = _examples(self.task, data), {}
        return other

    def under(self, batch_norm: str) -> Objective:
        """The same under another batch-norm policy."""
        if batch_norm not in POLICIES:
            raise unknown("batch-norm policy", batch_norm, POLICIES)
        other = copy.copy(self)
        other.batch_norm = batch_norm
        return other

    @property
    def module(self) -> nn.Module:
        """The network whose code is run, on copies of it: to be looked at only."""
        return self._module

    @property
    def normalised(self) -> bool:
        """Whether the network has batch norm, so that the policy matters."""
        return bool(self._mode(self.batch_norm == "batch").template.norms)

    # -- the function and its derivatives --------------------------------------------------------------

    def value(self, points: Points) -> Tensor:
        """The loss at each point, ``[N]``, in at least single precision."""
        return self._mean(points, self._loss)[""]

    def metrics(self, points: Points) -> dict[str, Tensor]:
        """The task's metrics at each point, name -> ``[N]``.

        Raises:
            LosslabError: The task has none.
        """
        if self._metrics is None:
            raise LosslabError(f"the task {self.task.name!r} has no metrics: give it metrics=")
        return self._mean(points, self._metrics)

    def gradient(self, points: Points) -> tuple[Tensor, Points]:
        """Values ``[N]`` and gradients, in the shapes of the weights and the dtype of the points."""
        values: Tensor | None = None
        total: Stack = {}
        for execution, at, share in self.pieces(self.settled(points)):
            losses, grads = execution.gradients(self._loss, at.sheltered())
            losses = losses.detach().double() * share
            values = losses if values is None else values + losses
            for name, g in grads.items():
                if name in total:
                    total[name].add_(g, alpha=share)
                else:
                    total[name] = g if share == 1.0 else g * share
        assert values is not None
        return _rounded(values, points), Points(total, {})

    def hvp(self, points: Points, vectors: Tensor | Mapping[str, Tensor]) -> Any:
        """Products of each point's Hessian with its own vectors, by differentiating the gradient exactly.

        ``H v = d/d theta <grad L(theta), v>``, under the same batch-norm policy, in the dtype of the points.

        Args:
            points: N of them.
            vectors: ``[N, P]`` in the coordinates of `Points.matrix`; ``[N, K, P]`` for K vectors a point,
                which share one differentiated graph; or name -> ``[N, ...]`` in the shapes of the weights.

        Returns:
            The products in the form of the vectors.

        Raises:
            LosslabError: Vectors of other shapes.
        """
        flat = _coordinates(points, vectors)
        points = self.settled(points)
        total = torch.zeros_like(flat)
        for execution, at, share in self.pieces(points):
            size = max(1, execution.chunk // 3)  # the graph of a gradient is held as well
            for a in range(0, at.members, size):
                rows = slice(a, min(a + size, at.members))
                total[rows].add_(self._products(execution, at.rows(rows), flat[rows]), alpha=share)
        if isinstance(vectors, Tensor):
            return total.reshape(vectors.shape)
        return Points(points.at(total[:, 0]).weights, {})

    def per_example(self, points: Points) -> Tensor:
        """The loss of each example alone, ``[N, n]``.

        Its mean over examples is the value wherever the loss is a plain mean; a loss that weighs examples
        within the batch, or penalises the weights, is what it is for a batch of one.

        Raises:
            LosslabError: Batch norm uses the batch's statistics, so that no example has a loss of its own.
        """
        if self.data is None:
            raise LosslabError(f"the task {self.task.name!r} has no data, so no examples: use value()")
        mode, points = self._mode(self.batch_norm == "batch"), self.settled(points)
        if mode.training and mode.template.norms:
            raise LosslabError(
                "with batch_norm='batch' an example's loss depends on the others: pass batch_norm='running' "
                "or 're-estimate'"
            )
        data, total = self._data(points), len(self.data)
        device = next(iter(points.weights.values())).device
        rows = []
        for i in range(points.members):
            one, parts = points.select([i]), []
            for a in range(0, total, 512):
                index = torch.arange(a, min(a + 512, total), device=device)
                spread = _repeated(one, len(index))
                at = stand(spread, data.take(index[:, None]), common_key(0, device), private=True)
                with torch.no_grad():
                    parts.append(mode.executed(at).run(self._loss, at, training=False))
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    # -- for instruments that differentiate for themselves ---------------------------------------------

    @property
    def loss(self) -> Function:
        """The task's loss with dropout off, as it is measured."""
        return self._loss

    def pieces(self, points: Points) -> Iterator[tuple[Execution, Stand, float]]:
        """Each chunk of the data once: how to run it, the points on it, and its share of the examples.

        Args:
            points: What `settled` gave.
        """
        mode = self._mode(self.batch_norm == "batch")
        mode.check(points, self.data)
        for batch, share, keys in self._chunks(mode, points):
            at = stand(points, batch, keys)
            yield mode.executed(at), at, share

    def settled(self, points: Points) -> Points:
        """The points with the buffers that the policy wants, for `pieces`; checked.

        Raises:
            LosslabError: Points of another network, or a loss that is none (see `losslab.tasks.check`).
        """
        mode = self._mode(self.batch_norm == "batch")
        mode.check(points, self.data)
        if self.batch_norm != "re-estimate" or not mode.template.norms:
            return points
        trained = self._estimator()
        moving = Points(points.weights, {n: b.clone() for n, b in points.buffers.items()})
        seen = 0.0
        for batch, share, keys in self._chunks(trained, points):
            at = stand(moving, batch, keys)
            execution = trained.executed(at)
            seen += share
            trained.template.weigh(share / seen)
            with torch.no_grad():
                execution.run(self._loss, at, training=True)
        return moving

    # -- how ---------------------------------------------------------------------------------------------

    def _mean(self, points: Points, fn: Function) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for execution, at, share in self.pieces(self.settled(points)):
            with torch.no_grad():
                found = execution.run(fn, at, training=False)
            for name, value in (found if isinstance(found, dict) else {"": found}).items():
                part = value.double() * share
                sums[name] = sums[name] + part if name in sums else part
        return {name: _rounded(value, points) for name, value in sums.items()}

    def _products(self, execution: Execution, at: Stand, vectors: Tensor) -> Tensor:
        """Hessian times vectors ``[N, K, P]`` for one chunk of data."""
        points = Points(at.weights, {})
        theta = points.matrix().detach().requires_grad_()
        found = torch.zeros_like(vectors)
        # The fast kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            here = dataclasses.replace(at, weights=points.at(theta).weights)
            losses = dataclasses.replace(execution, chunk=at.members).run(self._loss, here, training=False)
            (gradient,) = torch.autograd.grad(losses.sum(), theta, create_graph=True, allow_unused=True)
        if gradient is None or not gradient.requires_grad:  # the loss is linear in the weights
            return found
        count = vectors.shape[1]
        for k in range(count):
            (product,) = torch.autograd.grad(
                gradient, theta, vectors[:, k], retain_graph=k + 1 < count, allow_unused=True
            )
            if product is not None:
                found[:, k] = product
        return found

    def _mode(self, training: bool, kind: str = "") -> Mode:
        if (training, kind) not in self._modes:
            how = (training, self._loss, self.execution, self.memory)
            self._modes[training, kind] = Mode(self.task, self._module, *how)
        return self._modes[training, kind]

    def _estimator(self) -> Mode:
        """Training mode with statistics of whole chunks; under the policy "batch" ghost batches stay."""
        if not any(getattr(norm, "ghost", None) for norm in self._mode(True).template.norms):
            return self._mode(True)
        made = self._mode(True, "whole")
        for norm in made.template.norms:
            if getattr(norm, "ghost", None):
                norm.ghost = None  # type: ignore[assignment]
        return made

    def _data(self, points: Points) -> Data:
        assert self.data is not None
        like = next(iter(points.weights.values()))
        place = (like.device, like.dtype)
        if place not in self._moved:
            self._moved[place] = self.data.to(*place)
        return self._moved[place]

    def _chunks(self, mode: Mode, points: Points) -> Iterator[tuple[Batch, float, Tensor]]:
        """Batches with their share of the examples and the key of their random draws."""
        device = next(iter(points.weights.values())).device
        if self.data is None:
            yield None, 1.0, common_key(0, device)
            return
        data, total = self._data(points), len(self.data)
        size = self.chunk
        if size is None:
            whole = bool(mode.training and mode.template.norms)
            size = total if whole else mode.stream_size(points, data)
        if size >= total:
            yield data.all(), 1.0, common_key(0, device)
            return
        for number, a in enumerate(range(0, total, size)):
            rows = slice(a, min(a + size, total))
            batch = map_nest(lambda t, rows=rows: t[rows], data.examples)  # views
            yield batch, (rows.stop - rows.start) / total, common_key(number, device)


def _examples(task: Task, data: Any) -> Data | None:
    if not isinstance(data, str):
        return Data.of(data)
    known = ("train", "validation", "test")
    if data not in known:
        raise unknown("data set", data, known)
    found: Data | None = getattr(task, data)
    if found is None and not (data == "train" and task.test is None):
        raise LosslabError(f"the task {task.name!r} has no {data} data: name another set, or pass examples")
    return found


def _repeated(points: Points, count: int) -> Points:
    """One point so many times, in the memory of one."""
    return points.map(lambda t: t.expand(count, *t.shape[1:]))


def _rounded(values: Tensor, points: Points) -> Tensor:
    dtype = next(iter(points.weights.values())).dtype
    return values.to(torch.promote_types(dtype, torch.float32))


def _coordinates(points: Points, vectors: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Vectors as ``[N, K, P]``."""
    if not isinstance(vectors, Tensor):
        shapes, wanted = ({n: tuple(t.shape) for n, t in s.items()} for s in (vectors, points.weights))
        if shapes != wanted:
            odd = min(set(shapes.items()) ^ set(wanted.items()))[0]
            raise LosslabError(
                f"the vectors differ from the weights at {odd!r}: give them the weights' shapes"
            )
        return Points({n: vectors[n] for n in points.weights}, {}).matrix()[:, None]
    size = (points.members, points.parameters)
    if vectors.dim() not in (2, 3) or (vectors.shape[0], vectors.shape[-1]) != size:
        raise LosslabError(
            f"vectors of shape {tuple(vectors.shape)}, wanted [{size[0]}, {size[1]}] or "
            f"[{size[0]}, K, {size[1]}]: one or K vectors a point, in the coordinates of Points.matrix()"
        )
    return vectors[:, None] if vectors.dim() == 2 else vectors


__all__ = ["POLICIES", "Objective"]
