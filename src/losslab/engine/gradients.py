"""Gradients that are not written out before somebody needs them.

The gradient of a linear layer's weight is a product ``g^T x`` of two small matrices. For a large layer,
writing the product of all members to memory and reading it back for the update costs as much as computing
it; an update that goes member by member can take each product fresh from the cache instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from losslab.engine.products import product


class Factored:
    """The stack ``g_i^T x_i``, kept as factors: g ``[N, B, o]``, x ``[N, B, i]`` -> ``[N, o, i]``.

    With ``scale`` ``[N, o, i]`` each matrix is multiplied by it, entry by entry, when it is computed.
    """

    def __init__(self, g: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
        self.g, self.x, self.scale = g, x, scale

    def times(self, scale: Tensor) -> Factored:
        """The same, multiplied by ``scale`` entry by entry."""
        return Factored(self.g, self.x, scale if self.scale is None else self.scale * scale)

    def tensor(self) -> Tensor:
        """The stack written out."""
        whole = torch.bmm(self.g.transpose(1, 2), self.x)
        return whole if self.scale is None else whole.mul_(self.scale)

    def unbind(self, dim: int = 0) -> Sequence[Tensor]:
        """The members' matrices, each computed when it is asked for (``dim`` is 0)."""
        assert dim == 0
        return _Rows(self.g.transpose(1, 2), self.x.transpose(1, 2), self.scale)

    def __add__(self, other: Tensor | Factored) -> Tensor:
        return self.tensor() + (other.tensor() if isinstance(other, Factored) else other)

    def __radd__(self, other: Tensor) -> Tensor:
        return other + self.tensor()


class _Rows(Sequence[Tensor]):
    def __init__(self, gt: Tensor, xt: Tensor, scale: Tensor | None) -> None:
        self.gt, self.xt = gt.unbind(0), xt.unbind(0)
        self.scale = None if scale is None else scale.unbind(0)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        assert isinstance(index, int)
        whole = product(self.gt[index], self.xt[index])
        return whole if self.scale is None else whole.mul_(self.scale[index])

    def __len__(self) -> int:
        return len(self.gt)


class Gradients(Mapping[str, Tensor]):
    """Gradients by name; what is kept as factors is written out when it is looked at.

    Args:
        parts: Name -> tensor ``[N, ...]`` or its factors.
    """

    def __init__(self, parts: dict[str, Tensor | Factored]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        part = self.parts[name]
        if isinstance(part, Factored):
            part = self.parts[name] = part.tensor()
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
