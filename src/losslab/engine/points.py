"""Points: the weights and buffers of N networks as one stack of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losslab.errors import LosslabError

Stack = dict[str, Tensor]
"""Name -> tensor ``[N, *shape]``."""


@dataclass(frozen=True)
class Points(Mapping[str, Tensor]):
    """Weights and buffers of N networks: a mapping name -> tensor with a leading member axis.

    A point is a place in weight space; one network is N = 1. The names are those of
    ``module.named_parameters()`` and ``module.named_buffers()``; tied weights appear once.

    Args:
        weights: Trainable tensors, name -> ``[N, *shape]``.
        buffers: The rest of the module's state (batch-norm statistics, frozen parameters), name ->
            ``[N, *shape]``.

    Example:
        >>> points = Points.from_modules([nn.Linear(3, 2), nn.Linear(3, 2)])
        >>> points["weight"].shape, points.members, points.parameters
        (torch.Size([2, 2, 3]), 2, 8)
        >>> points.matrix().shape
        torch.Size([2, 8])
    """

    weights: Stack
    buffers: Stack

    @classmethod
    def from_modules(cls, modules: Sequence[nn.Module]) -> Points:
        """Stacks the weights and buffers of modules of one architecture (copies; the modules stay free)."""
        if not modules:
            raise LosslabError("no module was given: pass at least one")
        weights = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in modules]
        frozen = [{n: p for n, p in m.named_parameters() if not p.requires_grad} for m in modules]
        buffers = [f | dict(m.named_buffers()) for f, m in zip(frozen, modules, strict=True)]
        for i, (w, b) in enumerate(zip(weights, buffers, strict=True)):
            shapes = {n: tuple(t.shape) for n, t in {**w, **b}.items()}
            first = {n: tuple(t.shape) for n, t in {**weights[0], **buffers[0]}.items()}
            if shapes != first:
                odd = sorted(set(shapes.items()) ^ set(first.items()))[0][0]
                raise LosslabError(
                    f"module {i} differs from module 0 at {odd!r}: stack modules of one architecture"
                )
        return cls(
            {n: torch.stack([w[n].detach() for w in weights]) for n in weights[0]},
            {n: torch.stack([b[n].detach() for b in buffers]) for n in buffers[0]},
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name] if name in self.weights else self.buffers[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.weights
        yield from self.buffers

    def __len__(self) -> int:
        return len(self.weights) + len(self.buffers)

    @property
    def members(self) -> int:
        """How many networks."""
        return next(iter(self.weights.values())).shape[0]

    @property
    def parameters(self) -> int:
        """Trainable weights of one network."""
        return sum(w[0].numel() for w in self.weights.values())

    def map(self, fn: object) -> Points:
        """The same names with ``fn`` applied to every tensor."""
        assert callable(fn)
        return Points(
            {n: fn(w) for n, w in self.weights.items()}, {n: fn(b) for n, b in self.buffers.items()}
        )

    def select(self, index: Sequence[int] | Tensor) -> Points:
        """Some members, in the order asked for (copies)."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return self.map(lambda t: t.detach()[rows.to(t.device)])

    def clone(self) -> Points:
        """A copy that shares no memory."""
        return self.map(lambda t: t.detach().clone())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Points:
        """On another device or in another dtype; integer buffers keep theirs."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def matrix(self) -> Tensor:
        """The weights as ``[N, P]``, in the order of the names; buffers are not coordinates."""
        return torch.cat([w.reshape(w.shape[0], -1) for w in self.weights.values()], dim=1)

    def at(self, matrix: Tensor) -> Points:
        """Points of this architecture at coordinates ``[M, P]``; buffers are those of member 0.

        The weights are views into ``matrix``.
        """
        if matrix.dim() != 2 or matrix.shape[1] != self.parameters:
            raise LosslabError(
                f"coordinates of shape {tuple(matrix.shape)}, wanted [points, {self.parameters}]: "
                "one row a point, as Points.matrix() gives"
            )
        sizes = [w[0].numel() for w in self.weights.values()]
        parts = matrix.split(sizes, dim=1)
        rows = matrix.shape[0]
        weights = {
            n: p.reshape(rows, *w.shape[1:]) for p, (n, w) in zip(parts, self.weights.items(), strict=True)
        }
        return Points(weights, {n: b[:1].expand(rows, *b.shape[1:]).clone() for n, b in self.buffers.items()})

    def load_into(self, module: nn.Module, member: int) -> nn.Module:
        """Copies one member's weights and buffers into a module of this architecture; returns the module."""
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                tensor.data = self[name][member].detach().clone()
        return module
