"""Batch normalisation followed by noise that makes its outputs' distribution jump at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.layers.batchnorm import BatchNorm


class NoisyBatchNorm(BatchNorm):
    """Batch norm, then in training mode ``a <- a + strength ((s - 1) a + m)`` with random scales and shifts.

    At each step every unit j draws a shift ``mu_j ~ U(-mean_range, mean_range)`` and a scale
    ``sigma_j ~ U(1, scale_range)``; each example then draws ``m ~ U(mu_j - mean_jitter, mu_j + mean_jitter)``
    and ``s ~ N(sigma_j, scale_jitter^2)`` and its activation becomes ``s a + m`` (at strength 1). The noise
    has neither mean zero nor variance one, and another distribution at every step. The algorithm follows the
    noisy batch norm in the appendix of Santurkar et al., How Does Batch Normalization Help Optimization?
    (2018); its default ranges are recalled from there, not read again.

    A channel of a convolution is one unit: it draws once a step and once an example, and all its positions
    share the draw. Draws are `torch.rand_like` and `torch.randn_like`, so that each member of a population
    draws from its own stream. In evaluation mode the layer is plain batch norm.

    Args:
        features: Channels C.
        mean_range: Half-width of the unit's shift.
        scale_range: Largest scale of the unit.
        mean_jitter: Half-width of the example's shift about the unit's.
        scale_jitter: Standard deviation of the example's scale about the unit's.
        strength: Multiplies all noise; 0 is plain batch norm.
        **options: As for `BatchNorm`.

    Raises:
        LosslabError: As for `BatchNorm`; a range is negative, or scale_range below 1.

    Example:
        >>> layer = NoisyBatchNorm(2, strength=0.0)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
        >>> torch.equal(layer(x), BatchNorm(2)(x))
        True
    """

    def __init__(
        self,
        features: int,
        mean_range: float = 0.5,
        scale_range: float = 1.25,
        mean_jitter: float = 0.1,
        scale_jitter: float = 0.1,
        strength: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(features, **options)
        if not scale_range >= 1:
            raise LosslabError(f"scale_range is {scale_range}, the scales start at 1: pass 1 or more")
        for name, value in (
            ("mean_range", mean_range),
            ("mean_jitter", mean_jitter),
            ("scale_jitter", scale_jitter),
            ("strength", strength),
        ):
            if not value >= 0:
                raise LosslabError(f"{name} is {value}, a width was wanted: pass 0 or more")
        self.mean_range, self.scale_range = mean_range, scale_range
        self.mean_jitter, self.scale_jitter, self.strength = mean_jitter, scale_jitter, strength

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C]`` or ``[B, C, *positions]``, and disturb the result in training mode."""
        y = super().forward(x)
        if not self.training or self.strength == 0:
            return y
        positions = y.dim() - 2
        first: Any = (slice(None), slice(None), *[0] * positions)
        example = y[first] if positions else y
        unit = self.running_mean
        shift = _symmetric(unit) * self.mean_range + _symmetric(example) * self.mean_jitter
        scale = torch.rand_like(unit) * (self.scale_range - 1)
        scale = scale + torch.randn_like(example) * self.scale_jitter
        shape = (*example.shape, *[1] * positions)
        return y + self.strength * (y * scale.reshape(*shape) + shift.reshape(*shape))

    def extra_repr(self) -> str:
        """The arguments of the noise after those of batch norm."""
        noise = f"mean_range={self.mean_range}, scale_range={self.scale_range}"
        jitter = f"mean_jitter={self.mean_jitter}, scale_jitter={self.scale_jitter}"
        return f"{super().extra_repr()}, {noise}, {jitter}, strength={self.strength}"


def _symmetric(like: Tensor) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2 * torch.rand_like(like) - 1
