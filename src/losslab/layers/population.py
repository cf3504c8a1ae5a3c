"""Population statistics: what batch normalisation uses at test time, computed from the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from losslab.errors import LosslabError
from losslab.layers.batchnorm import is_batchnorm
from losslab.tasks.nest import Nest, leaves, map_nest

Run = Callable[[Nest], Any]
Watch = Callable[[Any, Tensor], None]


def population_statistics(
    model: nn.Module,
    inputs: Nest,
    batch_size: int | None = None,
    exact: bool = False,
    call: Callable[[nn.Module, Nest], Any] = lambda model, batch: model(batch),
) -> nn.Module:
    """A copy of the network whose running statistics are those of the data.

    By default as Ioffe and Szegedy (2015), Alg. 2: the data pass in batches of m examples, each normalised by
    its own statistics, and each norm gets ``E_B[mean]`` and ``m / (m - 1) E_B[var]`` (m the values a channel
    in a batch). A last batch that is smaller is left out.

    With ``exact=True`` a norm gets the mean and the unbiased variance of its inputs over all the data,
    computed with the norms before it at their own final statistics: the numbers then belong to the network
    that uses them. This takes one pass if the data fit into one batch, otherwise one a norm, ``batch_size``
    examples at a time.

    The network's mode does not matter and is kept: batch norm acts as described, all else (dropout, noise) as
    in evaluation.

    Args:
        model: The network; it stays as it is.
        inputs: The examples ``[n, ...]``, or a nest of tensors.
        batch_size: m; all the data by default.
        exact: See above.
        call: How the network is called on a batch, for other inputs than one tensor.

    Raises:
        LosslabError: There is no complete batch; the input of a norm has one value a channel, or values that
            are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [4.0], [10.0]])
        >>> layer = population_statistics(nn.BatchNorm1d(1), x, batch_size=2)
        >>> layer.running_mean, layer.running_var  # (2 + 18) / 2, where all the data have 18.7
        (tensor([4.]), tensor([10.]))
    """
    model = copy.deepcopy(model)
    norms = {m: name for name, m in model.named_modules() if is_batchnorm(m) and _has_statistics(m)}
    modes = [(m, m.training) for m in model.modules()]
    batches = _batches(inputs, batch_size, exact)
    model.eval()
    with torch.no_grad():
        if exact and len(batches) > 1:
            _one_norm_a_pass(norms, batches, lambda batch: call(model, batch))
        else:
            _one_pass(norms, batches, lambda batch: call(model, batch), exact)
    for module, training in modes:
        module.training = training
    return model


def _one_pass(norms: dict[Any, str], batches: list[Nest], run: Run, exact: bool) -> None:
    """Every norm uses the statistics of the batch it is given, and ends with their means."""
    found: dict[Any, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms}

    def watch(norm: Any, x: Tensor) -> None:
        values, mean, var = _moments(x, norms[norm])
        unbiased = _unbiased(var * values, values, norms[norm])
        found[norm].append((mean, unbiased))
        _put(norm, mean, unbiased if exact else var)

    with _watching(norms, watch):
        for batch in batches:
            run(batch)
    for norm, moments in found.items():
        if moments:
            means, variances = zip(*moments, strict=True)
            _put(norm, torch.stack(means).mean(0), torch.stack(variances).mean(0))
            norm.num_batches_tracked.fill_(len(moments))


def _one_norm_a_pass(norms: dict[Any, str], batches: list[Nest], run: Run) -> None:
    """The first norm that the network calls is settled by the first pass, the second by the next..."""
    settled: set[Any] = set()
    for _ in norms:
        target: Any = None
        total, mean, squares = 0, torch.zeros(()), torch.zeros(())

        def watch(norm: Any, x: Tensor) -> None:
            nonlocal target, total, mean, squares
            if target is None and norm not in settled:
                target = norm
            if norm is target:
                values, new, var = _moments(x, norms[norm])
                share = values / (total + values)
                squares = squares + var * values + (new - mean).square() * (total * share)
                mean, total = mean + (new - mean) * share, total + values

        with _watching(norms, watch):
            for batch in batches:
                run(batch)
        if target is None:  # what is left is never called
            return
        _put(target, mean, _unbiased(squares, total, norms[target]))
        target.num_batches_tracked.fill_(len(batches))
        settled.add(target)


@contextmanager
def _watching(norms: dict[Any, str], watch: Watch) -> Iterator[None]:
    """Tells ``watch(norm, input)`` before each call of a norm."""
    handles = [norm.register_forward_pre_hook(lambda norm, args: watch(norm, args[0])) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor, name: str) -> tuple[int, Tensor, Tensor]:
    """Values a channel, their mean and biased variance, float64 ``[C]``."""
    values = x.numel() // max(1, x.shape[1])
    var, mean = torch.var_mean(x.double(), (0, *range(2, x.dim())), correction=0)
    if not torch.isfinite(var).all():
        wrong = int((~torch.isfinite(x)).sum())
        raise LosslabError(
            f"{_called(name)} got {wrong} values that are not finite, of {x.numel()}, and has no statistics: "
            "look for them in the data, or train with a lower learning rate"
        )
    return values, mean, var


def _unbiased(squares: Tensor, values: int, name: str) -> Tensor:
    """The unbiased variance from a sum of squared deviations."""
    if values < 2:
        raise LosslabError(f"{_called(name)} got one value a channel, without a variance: give more examples")
    return squares / (values - 1)


def _called(name: str) -> str:
    return f"the batch norm {name!r}" if name else "batch norm"


def _put(norm: Any, mean: Tensor, var: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def _has_statistics(norm: Any) -> bool:
    return norm.running_mean is not None


def _batches(inputs: Nest, size: int | None, exact: bool) -> list[Nest]:
    examples = min((len(t) for t in leaves(inputs)), default=0)
    size = examples if size is None else size
    if not 0 < size <= examples:
        raise LosslabError(
            f"{examples} examples and a batch_size of {size}, population statistics need one complete batch: "
            "pass examples, and a batch_size of at most as many"
        )
    starts = range(0, examples if exact else examples - size + 1, size)
    return [_rows(inputs, start, start + size) for start in starts]


def _rows(inputs: Nest, start: int, stop: int) -> Nest:
    return map_nest(lambda t: t[start:stop], inputs)
