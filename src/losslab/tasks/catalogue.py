"""Tasks ready to train, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from losslab.tasks.functions import double_well, function_task, octopus, rosenbrock, saddle
from losslab.tasks.models import conv2, lenet_300_100, mlp
from losslab.tasks.sources import Splits, cifar10, digits, mnist
from losslab.tasks.task import Task, supervised

Model = Callable[[], nn.Module]


def digits_task(model: Model | None = None) -> Task:
    """Classify scikit-learn's digits (see :func:`digits`), with 64-32-10 unless another model is given.

    Example:
        >>> task = digits_task()
        >>> task.model, task.train
        (mlp(64, 32, 10, ...), Data(1000 examples of float32 [64], int64 []))
    """
    return _classify("digits", mlp(64, 32, 10) if model is None else model, digits())


def mnist_task(model: Model | None = None, folder: str | Path | None = None) -> Task:
    """Classify MNIST (see :func:`mnist`), flat images, with LeNet-300-100 unless another model is given."""
    return _classify("mnist", lenet_300_100() if model is None else model, mnist(folder))


def cifar10_task(model: Model | None = None, folder: str | Path | None = None) -> Task:
    """Classify CIFAR-10 (see :func:`cifar10`), with Conv-2 unless another model is given."""
    return _classify("cifar10", conv2() if model is None else model, cifar10(folder))


def _classify(name: str, model: Model, splits: Splits) -> Task:
    return supervised(model, splits.train, splits.test, splits.validation, name=name)


#: The tasks that the command line knows by name. Those read from a folder or the hub take ``folder``.
CATALOGUE: dict[str, Callable[..., Task]] = {
    "digits": digits_task,
    "mnist": mnist_task,
    "cifar10": cifar10_task,
    "saddle": functools.partial(function_task, saddle),
    "rosenbrock": functools.partial(function_task, rosenbrock),
    "double_well": functools.partial(function_task, double_well),
    "octopus": functools.partial(function_task, octopus(10)),
}
