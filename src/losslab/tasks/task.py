"""Task: what is minimised, a model, a loss and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from losslab.errors import LosslabError
from losslab.tasks.data import Data
from losslab.tasks.nest import Nest, leaves

#: A nest of tensors, the examples of one batch; None where the loss is of the weights alone.
Batch = Nest

Loss = Callable[[nn.Module, Batch], Tensor]
Metrics = Callable[[nn.Module, Batch], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Task:
    """What is minimised: ``mean over the training examples of loss(model, example)``.

    The loss and the metrics run stacked over many networks at once, so they are plain torch: no ``.item()``,
    no Python branch on a value.

    Attributes:
        model: Builds the network, with fresh weights each time: a class, a function, a losslab model factory.
        loss: ``loss(model, batch)``, the mean over the batch's examples, a scalar.
        train: The training examples, or anything :meth:`Data.of` reads; None if the loss is of the weights
            alone (the loss then gets None as its batch).
        test: The test examples.
        validation: The validation examples.
        metrics: ``metrics(model, batch)``, further means over the batch's examples by name, each a scalar.
        name: How tables and reports call the task.

    Raises:
        LosslabError: If the model is not a function, the loss not a function, or the data not readable.

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3)
        >>> autoencoder = Task(
        ...     model=lambda: nn.Linear(3, 3),
        ...     loss=lambda model, batch: (model(batch) - batch).square().mean(),
        ...     train=x,
        ... )
        >>> len(autoencoder.train)
        8
    """

    model: Callable[[], nn.Module]
    loss: Loss
    train: Data | None
    test: Data | None = None
    validation: Data | None = None
    metrics: Metrics | None = None
    name: str = "task"

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):
            kind = type(self.model).__name__
            raise LosslabError(
                f"model is one {kind}, and each seed needs its own: give a function that builds it, "
                f"lambda: {kind}(...)"
            )
        for field in ("model", "loss", "metrics"):
            value = getattr(self, field)
            if not callable(value) and not (field == "metrics" and value is None):
                raise LosslabError(
                    f"{field} is a {type(value).__name__}, a function was wanted: give a callable"
                )
        for field in ("train", "test", "validation"):
            source = getattr(self, field)
            object.__setattr__(self, field, None if source is None else Data.of(source))

    def replace(self, **changes: Any) -> Task:
        """The same task with some attributes changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Supervised:
    """The loss ``criterion(model(x), y)`` of a batch ``(x, y)``, whose two steps can be had one by one.

    Attributes:
        criterion: ``criterion(output, y)``, the mean over the examples.
    """

    criterion: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The loss."""
        return self.criterion(network(batch[0]), batch[1])

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """The first step: what the network predicts, ``[B, ...]``."""
        return network(batch[0])

    def compared(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The second step: the loss of the predictions."""
        return self.criterion(outputs, batch[1])


def supervised(
    model: Callable[[], nn.Module],
    train: Any,
    test: Any = None,
    validation: Any = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    name: str = "task",
) -> Task:
    """The task of predicting y from x: ``loss = criterion(model(x), y)``.

    Args:
        model: As in :class:`Task`.
        train: Examples ``(x, y)``: anything :meth:`Data.of` reads as a pair.
        test: The same for testing.
        validation: The same for validation.
        criterion: ``criterion(output, y)``, the mean over the examples.
        name: As in :class:`Task`.

    Returns:
        The task; where y is one class index an example (an integer vector), with the metric ``accuracy``, the
        share of examples whose largest output is the label's.

    Raises:
        LosslabError: If the data are not pairs.

    Example:
        >>> import torch
        >>> task = supervised(lambda: nn.Linear(2, 3), (torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])))
        >>> batch = task.train.all()
        >>> sorted(task.metrics(task.model(), batch))
        ['accuracy']
    """
    data = Data.of(train)
    examples = data.examples
    if not (isinstance(examples, (tuple, list)) and len(examples) == 2):
        kind = f"a {type(examples).__name__} of {len(leaves(examples))} tensors"
        raise LosslabError(
            f"supervised data are pairs (x, y), these are {kind}: give (x, y), or a Task of your own"
        )

    def accuracy(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (network(batch[0]).argmax(-1) == batch[1]).float().mean()}

    y = examples[1]
    classes = isinstance(y, Tensor) and y.ndim == 1 and not (y.is_floating_point() or y.is_complex())
    metrics = accuracy if classes else None
    return Task(model, Supervised(criterion), data, test, validation, metrics, name)
