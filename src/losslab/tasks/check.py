"""What is wrong with a task, found before a long run and told in one sentence."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from losslab.errors import LosslabError
from losslab.tasks.data import Data
from losslab.tasks.nest import Nest, leaves
from losslab.tasks.task import Task

_EXAMPLES = 32


def build(task: Task) -> nn.Module:
    """One network of the task, with weights drawn from the global random state (seed it first).

    Raises:
        LosslabError: If the factory raises, returns something else than a module, or leaves weights unshaped.

    Example:
        >>> build(Task(lambda: nn.Linear(2, 1), lambda model, batch: model(batch).mean(), torch.ones(4, 2)))
        Linear(in_features=2, out_features=1, bias=True)
    """
    try:
        module = task.model()
    except LosslabError:
        raise
    except Exception as error:  # the user's code
        raise LosslabError(f"the model of {task.name!r} raised {_told(error)}: mend the factory") from error
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise LosslabError(f"the model of {task.name!r} built a {kind}: return a torch.nn.Module")
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise LosslabError(
            f"the model of {task.name!r} has lazy layers without weights yet: run a batch through it first"
        )
    return module


def check(task: Task, module: nn.Module) -> None:
    """Evaluate the loss and the metrics once, at the start, and refuse a task that cannot be trained.

    They run on the first 32 training examples and on those that hold the smallest and the largest value of
    each int32 or int64 tensor, so that a label outside of the outputs is met wherever it stands. They run on
    a copy of the module and under a copy of the random state: nothing is left behind.

    Args:
        task: The task.
        module: One network of it, where the data are (see :func:`build`).

    Raises:
        LosslabError: If the loss raises, is not a tensor, not a scalar, not floating, not finite, or does not
            depend on the weights; if a label lies outside of the outputs; if the metrics raise or are not a
            dict of scalars.

    Example:
        >>> task = Task(lambda: nn.Linear(2, 1), lambda model, x: model(x).square(), torch.ones(4, 2))
        >>> check(task, build(task))
        Traceback (most recent call last):
        ...
        losslab.errors.LosslabError: the loss of 'task' has shape (4, 1), not a scalar: take its mean ...
    """
    copied = copy.deepcopy(module)
    batch = None if task.train is None else _probe(task.train)
    widths: list[int] = []
    copied.register_forward_hook(lambda _module, _inputs, output: widths.extend(_width(output)))
    with _same_random_state(copied), torch.enable_grad():
        try:
            loss = task.loss(copied, batch)
        except IndexError as error:
            raise LosslabError(_outside(task, widths, error)) from error
        except Exception as error:  # the user's code
            raise LosslabError(
                f"the loss of {task.name!r} raised {_told(error)}: mend it or the data"
            ) from error
        _judge_loss(f"the loss of {task.name!r}", loss)
        if task.metrics is not None:
            try:
                metrics = task.metrics(copied, batch)
            except Exception as error:  # the user's code
                raise LosslabError(
                    f"the metrics of {task.name!r} raised {_told(error)}: mend them"
                ) from error
            _judge_metrics(f"the metrics of {task.name!r}", metrics)


def _judge_loss(what: str, loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise LosslabError(f"{what} is a {type(loss).__name__}, not a tensor: return it without .item()")
    if loss.ndim != 0:
        raise LosslabError(
            f"{what} has shape {tuple(loss.shape)}, not a scalar: take its mean over the batch's examples"
        )
    if not loss.is_floating_point():
        raise LosslabError(f"{what} is {loss.dtype}, not floating-point: return the mean as a float")
    if not loss.isfinite():
        raise LosslabError(
            f"{what} is {loss.item()} at the start, not a finite number: look for bad values in the data, "
            "or start from smaller weights"
        )
    if not loss.requires_grad:
        raise LosslabError(
            f"{what} does not depend on the weights, so nothing can be learnt: compute it from the model, "
            "without .detach() or no_grad, and leave some weights trainable"
        )


def _judge_metrics(what: str, metrics: object) -> None:
    if not isinstance(metrics, Mapping):
        raise LosslabError(
            f"{what} are a {type(metrics).__name__}: return a dict from names to scalar tensors"
        )
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            )
            raise LosslabError(
                f"{what} hold {name!r} of {got}: return its mean over the batch as a scalar tensor"
            )


def _probe(data: Data) -> Nest:
    """The first examples, and those with the extremes of each tensor of integers."""
    rows = [torch.arange(min(_EXAMPLES, len(data)))]
    for leaf in _integers(data):
        flat = leaf.reshape(len(data), -1)
        rows.append(torch.stack([flat.amin(1).argmin(), flat.amax(1).argmax()]).cpu())
    index = torch.cat(rows)
    return data.take(index.to(leaves(data.examples)[0].device))


def _integers(data: Data) -> list[Tensor]:
    return [
        leaf for leaf in leaves(data.examples) if leaf.dtype in (torch.int64, torch.int32) and leaf.numel()
    ]


def _outside(task: Task, widths: list[int], error: IndexError) -> str:
    """The sentence for an index out of range, with the labels' range and the outputs if they are known."""
    labels = [] if task.train is None else [leaf for leaf in _integers(task.train) if leaf.ndim == 1]
    if "is out of bounds" not in str(error) or not labels or not widths:
        return f"the loss of {task.name!r} raised {_told(error)}: give indices within the range of the model"
    spans = " and ".join(f"{leaf.min().item()} to {leaf.max().item()}" for leaf in labels)
    return (
        f"the labels of {task.name!r} run from {spans} and the model has {widths[-1]} outputs, "
        f"for labels from 0 to {widths[-1] - 1}: give the model more outputs, or renumber the labels"
    )


def _width(output: object) -> list[int]:
    return [output.shape[1]] if isinstance(output, Tensor) and output.ndim > 1 else []


def _told(error: Exception) -> str:
    """The kind of an exception and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextlib.contextmanager
def _same_random_state(module: nn.Module) -> Iterator[None]:
    devices = {tensor.device.index for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield
