"""Batch normalisation with everything that its claims vary: statistics, groups, the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.errors import LosslabError, unknown

STATISTICS = ("batch", "frozen")


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a layer is batch normalisation, losslab's or torch's."""
    return isinstance(module, (BatchNorm, nn.modules.batchnorm._BatchNorm))


class BatchNorm(nn.Module):
    """``y = gamma (x - mean) / sqrt(var + eps) + beta``, a mean and a variance a channel.

    Ioffe and Szegedy, Batch Normalization (2015), Alg. 1; section 3.2 for convolutions, whose channels are
    normalised over examples and positions together. In training mode the statistics are those of the batch,
    the variance the biased one (divided by m), and the running statistics advance by
    ``running <- running + momentum (new - running)`` with the unbiased variance (divided by m - 1). In
    evaluation mode the running statistics are used.

    In its plain form, and with ``momentum=None``, the layer equals torch's ``BatchNorm1d/2d/3d`` and the
    state dicts are interchangeable. It differs from torch in this: one class for any number of positions;
    ``momentum=None`` runs in a population; a batch that has no variance, or the wrong number of channels, is
    an error that names the remedy. It draws nothing and keeps nothing but its buffers.

    Args:
        features: Channels C.
        eps: Added to the variance, under the root. Torch's kernel wants it positive; 0 is allowed here, and
            then a constant channel becomes NaN.
        momentum: Weight of the new statistics; None averages all batches seen alike.
        affine: Whether there are gamma (``weight``, starts at 1) and beta (``bias``, starts at 0), ``[C]``.
        statistics: ``"batch"``; or ``"frozen"``, which normalises by the running statistics in training mode
            too and leaves them as they are.
        ghost: Statistics over groups of this many consecutive examples, each group normalised as if it were
            a batch of its own (Hoffer et al., Train longer, generalize better, 2017, Alg. 1). What is left
            over at the end of the batch is a smaller group, and a single value joins the group before it. The
            running statistics advance once a group.
        detach: Whether the batch's statistics are constants in the backward pass. The forward pass is the
            same; the gradient, ``gamma / sigma`` times the incoming one, is no longer that of the loss. For
            counter-experiments (section 2 of the paper).

    Shapes:
        x ``[B, C]`` or ``[B, C, *positions]`` -> the same.

    Raises:
        LosslabError: An argument is out of range; the input has other channels; a batch (or group) in
            training mode has one value a channel.

    Example:
        >>> layer = BatchNorm(3)
        >>> y = layer(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]]))
        >>> y.mean(0).abs().max().item() < 1e-6, layer.running_var.tolist()
        (True, [1.100000023841858, 0.8999999761581421, 1.100000023841858])
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        statistics: str = "batch",
        ghost: int | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(features, eps, momentum, statistics, ghost)
        self.features, self.eps, self.momentum, self.affine = features, eps, momentum, affine
        self.statistics, self.ghost, self.detach = statistics, ghost, detach
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C]`` or ``[B, C, *positions]``."""
        if x.dim() < 2 or x.shape[1] != self.features:
            sequences = x.dim() > 2 and x.shape[-1] == self.features
            remedy = (
                "its features are the second axis, so transpose the last one there and back"
                if sequences
                else "give it as many features as the layer before has outputs"
            )
            raise LosslabError(
                f"BatchNorm({self.features}) got an input of shape {tuple(x.shape)}, wanted "
                f"[batch, {self.features}] or [batch, {self.features}, positions]: {remedy}"
            )
        if not self.training or self.statistics == "frozen":
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        self._check_size(x)
        if self.ghost is None and not self.detach and self.momentum is not None and self.eps > 0:
            # Torch's own kernel, which the engine batches over members.
            self.num_batches_tracked.add_(1)
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        return self._scaled(self._normalised(x))

    def _normalised(self, x: Tensor) -> Tensor:
        """``(x - mean) / sqrt(var + eps)`` group by group, running statistics advanced."""
        batch, size = x.shape[0], self.ghost or x.shape[0]
        left = batch % size
        if 0 < left * math.prod(x.shape[2:]) < 2 and left < batch:
            left += size
        if left in (0, batch):
            return self._groups(x, left or size)
        return torch.cat([self._groups(x[: batch - left], size), self._groups(x[batch - left :], left)])

    def _groups(self, x: Tensor, size: int) -> Tensor:
        """The same for groups of one size: ``[K size, C, ...]``."""
        groups = x.shape[0] // size
        y = x.reshape(groups, size, *x.shape[1:])
        axes = (1, *range(3, y.dim()))
        mean = y.mean(axes, keepdim=True)
        centred = y - (mean.detach() if self.detach else mean)
        var = centred.square().mean(axes, keepdim=True)
        var = var.detach() if self.detach else var
        values = size * math.prod(x.shape[2:])
        self._track(
            mean.detach().reshape(groups, self.features),
            var.detach().reshape(groups, self.features) * (values / (values - 1)),
        )
        return (centred * (var + self.eps).rsqrt()).reshape(*x.shape)

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Advances the running statistics by those of K batches, ``[K, C]``, one after another."""
        groups = mean.shape[0]
        self.num_batches_tracked.add_(groups)
        weights: Any = 1 / self.num_batches_tracked.to(mean.dtype)
        if self.momentum is not None:
            late = torch.arange(groups - 1, -1, -1, dtype=mean.dtype, device=mean.device)
            weights = (self.momentum * (1 - self.momentum) ** late)[:, None]
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.add_(((new - running) * weights).sum(0))

    def _scaled(self, y: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return y
        shape = (self.features, *[1] * (y.dim() - 2))
        return y * self.weight.reshape(*shape) + self.bias.reshape(*shape)

    def _check_size(self, x: Tensor) -> None:
        values = math.prod(x.shape[2:]) * min(x.shape[0], self.ghost or x.shape[0])
        if values > 1:
            return
        what, remedy = (
            f"a batch of {x.shape[0]}",
            "pass two examples or more, leave out the incomplete last batch",
        )
        if self.ghost == 1:
            what, remedy = "groups of one (ghost=1)", "choose ghost=2 or more"
        raise LosslabError(
            f"BatchNorm({self.features}) got {what} in training mode, one value a channel, which has no "
            f'variance: {remedy}, or use the running statistics by .eval() or statistics="frozen"'
        )

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults."""
        given: dict[str, tuple[Any, Any]] = {
            "eps": (self.eps, 1e-5),
            "momentum": (self.momentum, 0.1),
            "affine": (self.affine, True),
            "statistics": (self.statistics, "batch"),
            "ghost": (self.ghost, None),
            "detach": (self.detach, False),
        }
        return ", ".join([str(self.features), *(f"{n}={v!r}" for n, (v, d) in given.items() if v != d)])


def _check_arguments(
    features: int, eps: float, momentum: float | None, statistics: str, ghost: int | None
) -> None:
    if not isinstance(features, int) or features < 1:
        raise LosslabError(f"features is {features!r}, a positive number of channels was wanted")
    if not eps >= 0:
        raise LosslabError(f"eps is {eps}, it is added to a variance: pass eps >= 0")
    if momentum is not None and not 0 <= momentum <= 1:
        raise LosslabError(
            f"momentum is {momentum}, the weight of the new statistics was wanted: pass a number in [0, 1], "
            "or None for the average of all batches"
        )
    if statistics not in STATISTICS:
        raise unknown("kind of statistics", statistics, STATISTICS)
    if ghost is not None and (not isinstance(ghost, int) or ghost < 1):
        raise LosslabError(
            f"ghost is {ghost!r}, a number of examples was wanted: pass a positive number or None"
        )
