"""Dense symmetric matrices of known spectrum."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(values: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix with these eigenvalues in a random basis."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=g)).Q
    return ((q * values.double()) @ q.T).to(dtype)


def _normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


SPECTRA: dict[str, Tensor] = {
    "spread": torch.linspace(-1, 1, 200),
    "outliers": torch.cat([0.01 * _normal(290), torch.tensor([1.0, 2, 3, 4, 5, 5, 5, 9, 9.5, -3])]),
    "repeated": torch.cat([torch.zeros(150), torch.ones(30), 2 * torch.ones(4)]),
    "nine-fold": torch.cat([torch.logspace(-3, 1, 25).repeat_interleave(9), torch.zeros(25)]),
    "clustered": torch.cat([0.1 * _normal(200), 10 + 0.01 * torch.arange(6.0)]),
    "negative": -torch.logspace(-4, 1, 150),
    "identity": torch.ones(60),
    "zero": torch.zeros(40),
    "tiny": torch.tensor([3.0, -2.0, 1.0]),
}
