"""What is wrong with a task, found before a long run and told in one sentence."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from losslab.errors import LosslabError, first_line
from losslab.tasks.data import Data
from losslab.tasks.nest import leaves, walk
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
        raise LosslabError(
            f"the model of {task.name!r} raised {first_line(error)}: mend the factory"
        ) from error
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise LosslabError(f"the model of {task.name!r} built a {kind}: return a torch.nn.Module")
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise LosslabError(
            f"the model of {task.name!r} has lazy layers without weights yet: run a batch through it first"
        )
    return module


def check(task: Task, module: nn.Module) -> None:
    """Evaluate the loss and the metrics at the start, and refuse a task that cannot be trained.

    They run on the first 32 training examples, on those that hold the smallest and the largest value of each
    int32 or int64 tensor, and on the first that holds a value which is not finite, so that a label outside of
    the outputs or a NaN is met wherever it stands. They run on a copy of the module and under a copy of the
    random state: nothing is left behind. A loss that doubles when each example is given twice is a sum.

    Args:
        task: The task.
        module: One network of it, where the data are (see :func:`build`).

    Raises:
        LosslabError: If the loss raises, is not a tensor, not a scalar, not floating, not finite, or does not
            depend on the weights, or is a sum over the examples; if a label lies outside of the outputs; if
            the metrics raise or are not a dict of scalars.

    Example:
        >>> task = Task(lambda: nn.Linear(2, 1), lambda model, x: model(x).square(), torch.ones(4, 2))
        >>> check(task, build(task))
        Traceback (most recent call last):
        ...
        losslab.errors.LosslabError: the loss of 'task' has shape (4, 1), not a scalar: take its mean ...
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise LosslabError(
            f"the model of {task.name!r} has no trainable weights: leave some parameters with requires_grad"
        )
    copied = copy.deepcopy(module)
    data = task.train
    rows = torch.empty(0) if data is None else _probe(data)
    batch = None if data is None else data.take(rows)
    widths: list[int] = []
    copied.register_forward_hook(lambda _module, _inputs, output: widths.extend(_width(output)))
    with _same_random_state(copied), torch.enable_grad():
        try:
            loss = task.loss(copied, batch)
        except LosslabError:
            raise
        except IndexError as error:
            raise LosslabError(_outside(task, widths, error)) from error
        except Exception as error:  # the user's code
            raise LosslabError(
                f"the loss of {task.name!r} raised {first_line(error)}: mend it or the data"
            ) from error
        _judge_loss(f"the loss of {task.name!r}", loss, data)
        if task.metrics is not None:
            try:
                metrics = task.metrics(copied, batch)
            except Exception as error:  # the user's code
                raise LosslabError(
                    f"the metrics of {task.name!r} raised {first_line(error)}: mend them"
                ) from error
            _judge_metrics(f"the metrics of {task.name!r}", metrics)
        if data is not None:
            _judge_mean(task, copied.eval(), data, rows)  # dropout would draw other masks each time


def _judge_loss(what: str, loss: object, train: Data | None) -> None:
    if not isinstance(loss, Tensor):
        number = isinstance(loss, (int, float))
        todo = "return it without .item()" if number else "return the loss alone, as a scalar tensor"
        raise LosslabError(f"{what} is a {type(loss).__name__}, not a tensor: {todo}")
    if loss.ndim != 0:
        raise LosslabError(
            f"{what} has shape {tuple(loss.shape)}, not a scalar: take its mean over the batch's examples"
        )
    if not loss.is_floating_point():
        raise LosslabError(f"{what} is {loss.dtype}, not floating-point: return the mean as a float")
    if not loss.isfinite():
        bad = [] if train is None else _not_finite(train)
        told = "; ".join(
            f"data{place} holds {leaf[row].sum().item()} in example {row}" for place, leaf, row in bad
        )
        raise LosslabError(
            f"{what} is {loss.item()} at the start, not a finite number: "
            + (f"{told}; mend the data" if bad else "start from smaller weights, or mend the loss")
        )
    if not loss.requires_grad:
        raise LosslabError(
            f"{what} does not depend on the weights, so nothing can be learnt: compute it from the model, "
            "without .detach() or no_grad, and leave some weights trainable"
        )


def _judge_mean(task: Task, module: nn.Module, data: Data, rows: Tensor) -> None:
    """Refuses a loss that doubles with the examples; a mean does not, nor with batch norm or penalties."""
    try:
        with torch.no_grad():
            once, twice = (float(task.loss(module, data.take(r))) for r in (rows, torch.cat([rows, rows])))
    except Exception:  # the user's code may want training mode, or this number of examples
        return
    if once and abs(twice - 2 * once) <= 1e-4 * abs(once):
        raise LosslabError(
            f"the loss of {task.name!r} doubles ({once:.4g}, {twice:.4g}) when each example is given twice, "
            "so it is a sum: return the mean over the batch's examples"
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


def _probe(data: Data) -> Tensor:
    """Rows: the first, the extremes of each tensor of integers, the first that are not finite."""
    rows = [torch.arange(min(_EXAMPLES, len(data)))]
    for leaf in _integers(data):
        flat = leaf.reshape(len(data), -1)
        rows.append(torch.stack([flat.amin(1).argmin(), flat.amax(1).argmax()]).cpu())
    rows += [torch.tensor([row]) for _, _, row in _not_finite(data)]
    return torch.cat(rows).to(leaves(data.examples)[0].device)


def _not_finite(data: Data) -> list[tuple[str, Tensor, int]]:
    """Each tensor with values that are not finite: its place, itself, and the first such example."""
    found = []
    for place, leaf in walk(data.examples):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.sum().isfinite():
            bad = ~leaf.reshape(len(data), -1).isfinite().all(1)
            if bad.any():  # a sum may overflow
                found.append((place, leaf, int(bad.nonzero()[0])))
    return found


def _integers(data: Data) -> list[Tensor]:
    return [
        leaf for leaf in leaves(data.examples) if leaf.dtype in (torch.int64, torch.int32) and leaf.numel()
    ]


def _outside(task: Task, widths: list[int], error: IndexError) -> str:
    """The sentence for an index out of range, with the labels' range and the outputs if they are known."""
    labels = [] if task.train is None else [leaf for leaf in _integers(task.train) if leaf.ndim == 1]
    if "is out of bounds" not in str(error) or not labels or not widths:
        told = first_line(error)
        return f"the loss of {task.name!r} raised {told}: give indices within the range of the model"
    spans = " and ".join(f"{leaf.min().item()} to {leaf.max().item()}" for leaf in labels)
    return (
        f"the labels of {task.name!r} run from {spans} and the model has {widths[-1]} outputs, "
        f"for labels from 0 to {widths[-1] - 1}: give the model more outputs, or renumber the labels"
    )


def _width(output: object) -> list[int]:
    return [output.shape[1]] if isinstance(output, Tensor) and output.ndim > 1 else []


@contextlib.contextmanager
def _same_random_state(module: nn.Module) -> Iterator[None]:
    devices = {tensor.device.index for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield
