"""What is wrong with a task, found before a long run and told in one sentence."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from losslab.errors import LosslabError, first_line
from losslab.tasks.data import Data
from losslab.tasks.nest import leaves, walk
from losslab.tasks.task import Batch, Task

_EXAMPLES = 32

_RECOMPUTES = (
    "the network runs parts of its forward pass again in the backward one (torch.utils.checkpoint), when "
    "other weights stand in it: switch activation checkpointing off"
)


def build(task: Task) -> nn.Module:
    """One network of the task, with weights drawn from the global random state (seed it first).

    Raises:
        LosslabError: If the factory raises, returns something else than a module, or one of torch.jit, or
            leaves weights unshaped.

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
    check_module(module, f"the model of {task.name!r}")
    return module


def check_module(module: object, what: str) -> None:
    """Refuse what is no network, or one whose weights cannot be taken out and put back.

    Args:
        module: Any object.
        what: What it is called in the sentence.

    Raises:
        LosslabError: It is no module, is compiled by torch.jit, or has lazy layers without weights.

    Example:
        >>> check_module(nn.LazyLinear(3), "the network")
        Traceback (most recent call last):
        ...
        losslab.errors.LosslabError: the network has lazy layers without weights yet: run ...
    """
    if not isinstance(module, nn.Module):
        raise LosslabError(f"{what} is a {type(module).__name__}: pass a torch.nn.Module")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise LosslabError(
            f"{what} has parts compiled by torch.jit, whose code cannot be run on other weights: give it as "
            "it was before torch.jit.script or trace"
        )
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise LosslabError(f"{what} has lazy layers without weights yet: run a batch through it first")


def check(task: Task, module: nn.Module, *, finite: bool = True, held_out: Sequence[str] = ()) -> None:
    """Evaluate the loss and the metrics at the start, and refuse a task that cannot be trained.

    They run on the first 32 training examples, on those that hold the smallest and the largest value of each
    int32 or int64 tensor, and on the first that holds a value which is not finite, so that a label outside of
    the outputs or a NaN is met wherever it stands. They run on a copy of the module and under a copy of the
    random state: nothing is left behind. A loss that doubles when each example is given twice is a sum.

    Args:
        task: The task.
        module: One network of it, where the data are (see :func:`build`).
        finite: Refuse a loss that is not finite or has no backward pass too; what is only measured may be so.
        held_out: Other data sets that training will look at, ``"validation"`` or ``"test"``: loss and metrics
            run on their examples too, in evaluation mode.

    Raises:
        LosslabError: If the loss or its backward pass raises; if the loss is not a tensor, not a scalar, not
            floating, not finite, or does not depend on the weights, or is a sum over the examples; if a label
            lies outside of the outputs; if the metrics raise or are not a dict of scalars.

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
        loss = _judged(task, copied, data, batch, widths, finite)
        _judge_backward(f"the loss of {task.name!r}", loss, copied, data, finite)
        copied.eval()  # dropout would draw other masks each time
        if data is not None:
            _judge_mean(task, copied, data, rows)
        for name in held_out:
            other = getattr(task, name)
            like = next(p for p in module.parameters() if p.is_floating_point())
            held = Data(other.take(_probe(other))).to(like.device, like.dtype).all()
            _judged(task, copied, other, held, widths, bool(_not_finite(other)), f" on its {name} data")


def _judged(
    task: Task,
    module: nn.Module,
    data: Data | None,
    batch: Batch,
    widths: list[int],
    finite: bool,
    where: str = "",
) -> Tensor:
    """The loss of a batch, once it and the metrics are found to be sound."""
    what = f"the loss of {task.name!r}{where}"
    try:
        with unrecomputed():
            loss = task.loss(module, batch)
    except LosslabError:
        raise
    except IndexError as error:
        raise LosslabError(_outside(f"{task.name!r}{where}", data, widths, error)) from error
    except Exception as error:  # the user's code
        raise LosslabError(f"{what} raised {first_line(error)}: mend it or the data") from error
    _judge_loss(what, loss, data, finite)
    if task.metrics is not None:
        what = f"the metrics of {task.name!r}{where}"
        try:
            metrics = task.metrics(module, batch)
        except Exception as error:  # the user's code
            raise LosslabError(f"{what} raised {first_line(error)}: mend them") from error
        _judge_metrics(what, metrics)
    return loss


def _judge_loss(what: str, loss: object, train: Data | None, finite: bool) -> None:
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
    if finite and not loss.isfinite():
        told = "" if train is None else _told_of(train)
        raise LosslabError(
            f"{what} is {loss.item()} at the start, not a finite number: "
            + (f"{told}; mend the data" if told else "start from smaller weights, or mend the loss")
        )


def _judge_backward(what: str, loss: Tensor, module: nn.Module, data: Data | None, finite: bool) -> None:
    """Refuses a loss that no weight has a gradient of, and, where it is to be finite, one without any."""
    weights = [p for p in module.parameters() if p.requires_grad]
    found: Sequence[Tensor | None] = ()
    if loss.requires_grad:
        try:
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        except LosslabError:
            raise
        except Exception as error:  # the user's code
            if not finite:
                return
            raise LosslabError(
                f"the backward pass of {what} raised {first_line(error)}: mend the model or the loss"
            ) from error
    if all(g is None for g in found):
        raise LosslabError(
            f"{what} does not depend on the weights, so nothing can be learnt: compute it from the model, "
            "without .detach() or no_grad, and leave some weights trainable"
        )
    sound = all(g is None or bool(g.isfinite().all()) for g in found)
    if finite and not sound and data is not None and (told := _told_of(data)):
        raise LosslabError(f"the gradient of {what} is not finite at the start: {told}; mend the data")


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


def _told_of(data: Data) -> str:
    """Where values of the data are not finite; nothing where all are."""
    return "; ".join(
        f"data{place} holds {leaf[row].sum().item()} in example {row}"
        for place, leaf, row in _not_finite(data)
    )


def _integers(data: Data) -> list[Tensor]:
    return [
        leaf for leaf in leaves(data.examples) if leaf.dtype in (torch.int64, torch.int32) and leaf.numel()
    ]


def _outside(whose: str, data: Data | None, widths: list[int], error: IndexError) -> str:
    """The sentence for an index out of range, with the labels' range and the outputs if they are known."""
    labels = [] if data is None else [leaf for leaf in _integers(data) if leaf.ndim == 1]
    if "is out of bounds" not in str(error) or not labels or not widths:
        told = first_line(error)
        return f"the loss of {whose} raised {told}: give indices within the range of the model"
    spans = " and ".join(f"{leaf.min().item()} to {leaf.max().item()}" for leaf in labels)
    return (
        f"the labels of {whose} run from {spans} and the model has {widths[-1]} outputs, "
        f"for labels from 0 to {widths[-1] - 1}: give the model more outputs, or renumber the labels"
    )


def _width(output: object) -> list[int]:
    return [output.shape[1]] if isinstance(output, Tensor) and output.ndim > 1 else []


@contextlib.contextmanager
def unrecomputed() -> Iterator[None]:
    """Inside of the block a forward pass that saves activations in another way than autograd's is refused.

    Weights are put into a network for its forward pass, and are others when it is run again.

    Raises:
        LosslabError: The code in the block uses activation checkpointing, or hooks on saved tensors.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES):
            yield
    except RuntimeError as error:
        if str(error) != _RECOMPUTES:
            raise
        raise LosslabError(_RECOMPUTES) from error


@contextlib.contextmanager
def _same_random_state(module: nn.Module) -> Iterator[None]:
    devices = {tensor.device.index for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield
