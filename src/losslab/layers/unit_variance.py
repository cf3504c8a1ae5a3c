"""LSUV: an initialisation that looks at data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from losslab.errors import LosslabError
from losslab.layers.initialisation import (
    Initialisation,
    call,
    check_scale,
    orthogonal,
    weight_of,
    weighted_layers,
)
from losslab.tasks.nest import Nest, leaves, map_nest


class InitialisationNotice(UserWarning):
    """Told when a data-dependent initialisation did not reach what it aims at."""


def lsuv(
    x: Nest,
    gain: float = 1.0,
    tolerance: float = 1e-3,
    rounds: int = 10,
    start: Initialisation | None = None,
) -> Initialisation:
    """Layer-sequential unit variance: each layer's weights divided until its output has the wanted spread.

    Layer after layer in the order in which the network uses them, the weights are multiplied by
    ``gain / std(output)``, the standard deviation taken over examples and units together, until it is
    ``gain`` to within the tolerance. Mishkin & Matas, All you need is a good init (2016).

    The module is measured on a private copy in training mode, without dropout: batch norm uses the batch's
    statistics, and its running ones stay as they are.

    Args:
        x: The batch that the network is called with.
        gain: The standard deviation wanted.
        tolerance: The largest relative error of it.
        rounds: How often a layer may be rescaled; a layer that is used once needs one round.
        start: How the weights are drawn first; `orthogonal` by default.

    Returns:
        The initialisation. Its ``apply`` warns with an `InitialisationNotice` that names the layers which did
        not get there: those whose output is constant, or that are used in several places.

    Raises:
        LosslabError: A bad tolerance or number of rounds, or an empty batch; on ``apply``, outputs that are
            not finite, or a network that cannot be called with the batch.

    Example:
        >>> from losslab.tasks import mlp
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> network = lsuv(x).on(mlp(8, 30, 30, 3, activation="tanh"))()
        >>> round(network(x).std(correction=0).item(), 3)
        1.0
    """
    check_scale("gain", gain)
    if not 0 < tolerance < 1 or rounds < 1:
        raise LosslabError(
            f"tolerance is {tolerance} and rounds {rounds}: pass a tolerance between 0 and 1, and 1 round or "
            "more"
        )
    if any(not len(tensor) for tensor in leaves(x) if tensor.dim()):
        raise LosslabError("lsuv's batch is empty: pass at least one example")
    first = orthogonal() if start is None else start
    return Initialisation(
        call("lsuv", gain, 1.0, "x"), first.draw, lambda module: _rescale(module, x, gain, tolerance, rounds)
    )


def _rescale(module: nn.Module, x: Nest, gain: float, tolerance: float, rounds: int) -> None:
    probe, layers = _Probe(module, x), weighted_layers(module)

    def missed(std: float) -> bool:
        return abs(std - gain) > tolerance * gain

    with torch.no_grad():
        for name in probe.order:
            for _ in range(rounds):
                std = probe.measure()[name]
                if std == 0 or not missed(std):
                    break
                for layer in (layers[name], probe.layers[name]):
                    weight_of(name, layer).mul_(gain / std)
    told = [f"the output of {name!r} has {std:.3g}" for name, std in probe.measure().items() if missed(std)]
    told += [f"{name!r} is not used" for name in layers if name not in probe.order]
    if told:
        warnings.warn(
            f"lsuv wanted outputs of standard deviation {gain:g}, but {', '.join(told)}: constant outputs "
            "and weights used in several places cannot be rescaled; give more rounds or another batch",
            InitialisationNotice,
            stacklevel=4,
        )


class _Probe:
    """A private copy of a network, and what its weighted layers give on a batch."""

    def __init__(self, module: nn.Module, x: Nest) -> None:
        self.module = copy.deepcopy(module).train()
        for part in self.module.modules():
            if isinstance(part, _DropoutNd):
                part.eval()
        like = next(self.module.parameters())
        self.x = map_nest(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None), x)
        self.layers = weighted_layers(self.module)
        self.moments: dict[str, list[tuple[int, float, float]]] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._keep(name))
        self.order = list(self.measure())

    def measure(self) -> dict[str, float]:
        """The standard deviation of each used layer's outputs, over examples and units, in order of use."""
        self.moments = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                self.module(self.x)
            except LosslabError:
                raise
            except Exception as error:  # the user's network on the user's batch
                told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise LosslabError(
                    f"the network cannot be called with lsuv's batch ({told}): pass what its forward takes"
                ) from error
        return {name: _pooled(moments) for name, moments in self.moments.items()}

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        # Moments at once, not the output: the next layer may change it in place.
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            values = output.detach().double()
            lost = int((~torch.isfinite(values)).sum())
            if lost:
                raise LosslabError(
                    f"{lost} of {values.numel()} outputs of layer {name!r} are not finite: give lsuv a batch "
                    "of finite numbers"
                )
            seen = (values.numel(), float(values.mean()), float(values.var(correction=0)))
            self.moments.setdefault(name, []).append(seen)

        return keep


def _pooled(moments: list[tuple[int, float, float]]) -> float:
    """The standard deviation of several samples taken together, from their sizes, means and variances."""
    total = sum(n for n, _, _ in moments)
    mean = sum(n * m for n, m, _ in moments) / total
    return float(sum(n * (v + (m - mean) ** 2) for n, m, v in moments) / total) ** 0.5
