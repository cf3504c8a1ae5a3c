"""A matrix in weight space that is known by its products with vectors, and how these are computed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.curvature.graphs import Graph, Piece, Theta, dropouts
from losslab.curvature.noise import HELD, draws, dropped, refuse_noise, refuse_once
from losslab.engine import Objective, Points
from losslab.engine.execution import Execution, ExecutionNotice
from losslab.engine.memory import free_memory
from losslab.errors import LosslabError, unknown

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

STRATEGIES = ("auto", "kept", "recomputed", "forward")

_EXAMPLES = 1024
"""Examples of a chunk: what a product holds beside the graph is that of one chunk."""

_KEPT_GRADIENTS = 3.0
"""The graph of a gradient holds about so many times what one backward pass holds."""

PLAIN_KERNELS = "fast attention or recurrent kernels have no second derivative: plain (math) ones are used"

_NO_SECOND = ("is not implemented", "once_differentiable", "does not support double", "no double backward")


class Operator:
    """A symmetric matrix ``[P, P]`` at each of N points, known by its products with vectors.

    ``operator @ v`` takes ``[P]`` or a block ``[P, K]`` at one point, ``[N, P]`` or ``[N, P, K]`` at N, in
    the coordinates of `Points.matrix`, and returns the same shape. Data are streamed and weighted by their
    examples, under the objective's batch-norm policy; nothing of the caller's is touched.

    How a product is computed is found out once and remembered: on the kept graph of the gradient where it
    fits the objective's memory (about 1.2 gradients a product), else by what was faster on the first chunk:
    differentiating twice anew (about 2.3) or pushing the vector forward through the gradient (about 3).
    Blocks go through vmap where that was found faster than one vector after another.

    Args:
        objective: The loss on its examples.
        points: Where.
        layers: Names of parameters or of modules, to which the matrix is restricted; the others are held.
        strategy: ``"kept"``, ``"recomputed"``, ``"forward"``, or ``"auto"``.

    Attributes:
        names: The parameters, in the order of the coordinates.
        members: N.
        size: P.
        products: Vectors multiplied so far (at each point).
        passes: How often the data went through the network so far.
        notes: What was done that one would want to know.

    Raises:
        LosslabError: No trainable parameters, weights that are not finite at any point, a layer that does not
            exist, a loss that gives two values at the same weights, or one that cannot be differentiated
            twice.
    """

    kind: ClassVar[str] = "operator"

    def __init__(
        self,
        objective: Objective,
        points: Points,
        layers: Sequence[str] | None = None,
        strategy: str = "auto",
    ) -> None:
        if strategy not in STRATEGIES:
            raise unknown("strategy", strategy, STRATEGIES)
        if not points.weights:
            raise LosslabError("the network has no trainable parameters: leave some with requires_grad=True")
        self.objective, self.layers = objective, None if layers is None else tuple(layers)
        self.names = _named(points, self.layers)
        self.notes: list[str] = []
        self._math, self._inspected = False, False
        self._strategy: str | None = None if strategy == "auto" else strategy
        self._batched: bool | None = None
        self._settle(points)

    def _settle(self, points: Points) -> None:
        bad = _unsound(points)
        if bad:
            raise LosslabError(
                f"the weights are not finite in {bad!r}: measure where training was still sound"
            )
        self.points = self.objective.settled(points).clone()  # training may go on with the tensors given
        self._begin()

    def _begin(self) -> None:
        self.sizes = [self.points.weights[n][0].numel() for n in self.names]
        self.members, self.size = self.points.members, sum(self.sizes)
        like = next(iter(self.points.weights.values()))
        self.dtype, self.device = like.dtype, like.device
        self.products, self.passes = 0, 0.0
        self._graphs: list[tuple[Piece, Graph]] | None = None

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, P)`` at one point, ``(N, P, P)`` at more."""
        return (self.size, self.size) if self.members == 1 else (self.members, self.size, self.size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.objective.task.name!r}, {self.shape}, {len(self.names)} tensors)"

    def at(self, points: Points) -> Operator:
        """The same matrix at other points; what was found out about speed is kept, the counts start anew."""
        other = copy.copy(self)
        other.notes = list(self.notes)
        other._settle(points)
        return other

    def restrict(self, layers: Sequence[str] | str) -> Operator:
        """The block of some parameters: names of parameters, or of modules for all of theirs."""
        other = copy.copy(self)
        other.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        other.names = _named(self.points, other.layers)
        other.notes = list(self.notes)
        other._begin()
        return other

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors ``[..., P]`` by parameter, name -> ``[..., *shape]``."""
        parts = vectors.split(self.sizes, dim=-1)
        shapes = [self.points.weights[n].shape[1:] for n in self.names]
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1)
            for n, p, s in zip(self.names, parts, shapes, strict=True)
        }

    def gradient(self) -> Tensor:
        """The gradient of the loss in the operator's coordinates, ``[P]`` or ``[N, P]``."""
        weights = self.objective.gradient(self.points)[1].weights
        flat = torch.cat([weights[n].reshape(self.members, -1) for n in self.names], dim=1)
        return flat[0] if self.members == 1 else flat

    def release(self) -> None:
        """Lets go of the graphs that are kept; the next product builds them again."""
        self._graphs = None

    # -- products --------------------------------------------------------------------------------------

    def __matmul__(self, vectors: Tensor) -> Tensor:
        rows = self._rows(vectors)
        found = self._multiplied(rows.to(self.dtype)).to(vectors.dtype)
        self.products += rows.shape[1]
        if self.members == 1 and not _finite(found) and _finite(rows):
            if not (loss := self.objective.value(self.points)).isfinite().all():
                raise LosslabError(
                    f"the loss is {loss.item():g} at these weights, not a finite number: look for bad values "
                    "in the data, or measure where training was still sound"
                )
            raise LosslabError(
                f"the {self.kind} times a finite vector is not finite though the weights are: the loss "
                "is not twice differentiable there (a root or a norm at zero), or overflows: use a smooth "
                "loss, or float64"
            )
        product = found.mT if self.members > 1 else found[0].mT
        return product.reshape(vectors.shape)

    def dense(self) -> Tensor:
        """The whole matrix, made symmetric: ``[P, P]`` or ``[N, P, P]``, by P products."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        columns = eye if self.members == 1 else eye.expand(self.members, -1, -1)
        matrix = self @ columns
        return 0.5 * (matrix + matrix.mT)

    def linear_operator(self) -> LinearOperator:
        """The matrix at one point for ``scipy.sparse.linalg``.

        Raises:
            LosslabError: There is more than one point.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        if self.members != 1:
            raise LosslabError(f"scipy takes one matrix and there are {self.members} points: select one")
        kind = np.dtype(str(torch.promote_types(self.dtype, torch.float32)).removeprefix("torch."))

        def multiply(v: Any) -> Any:
            vectors = torch.as_tensor(np.ascontiguousarray(v, dtype=kind), device=self.device)
            return (self @ vectors).cpu().numpy()

        return LinearOperator(
            self.shape, matvec=multiply, matmat=multiply, rmatvec=multiply, rmatmat=multiply, dtype=kind
        )

    def _rows(self, vectors: Tensor) -> Tensor:
        """Vectors as ``[N, K, P]``."""
        given, lead = tuple(vectors.shape), () if self.members == 1 else (self.members,)
        if given[: len(lead) + 1] != (*lead, self.size) or len(given) > len(lead) + 2:
            wanted = ", ".join(map(str, (*lead, self.size)))
            raise LosslabError(
                f"vectors of shape {given}, wanted [{wanted}] or [{wanted}, K]: one vector or a block of K, "
                "in the coordinates of Points.matrix()"
            )
        block = vectors if len(given) == len(lead) + 2 else vectors[..., None]
        return block.reshape(self.members, self.size, -1).mT.detach()

    def _multiplied(self, rows: Tensor) -> Tensor:
        while True:
            total = torch.zeros_like(rows, memory_format=torch.contiguous_format)
            try:
                for piece, graph in self._differentiated(rows.shape[1]):
                    self._accumulate(total[piece.rows], piece.share, graph, rows[piece.rows])
                return total
            except (RuntimeError, NotImplementedError) as error:
                self._fallen_back(error)

    def _differentiated(self, count: int) -> Iterator[tuple[Piece, Graph]]:
        """The chunks, ready for ``count`` products each."""
        if self._graphs is not None:
            yield from self._graphs
            return
        if self._strategy is None and self._fits():
            self._strategy = "kept"
        kept: list[tuple[Piece, Graph]] = []
        for piece in self._pieces():
            if self._strategy is None:
                self._strategy = self._faster(piece)
            graph = self._opened(piece, self._strategy)
            if not self._inspected:
                self._inspect(piece, graph)
            if self._strategy == "kept":
                kept.append((piece, graph))
            yield piece, graph
        self.passes += count if self._strategy == "forward" else 1
        if self._strategy == "kept":
            self._graphs = kept

    def _pieces(self) -> Iterator[Piece]:
        for execution, at, share in self.objective.pieces(self.points):
            step = max(1, execution.chunk // 3)  # the graph of a gradient is held as well
            for a in range(0, at.members, step):
                rows = slice(a, min(a + step, at.members))
                piece = Piece(execution, at.rows(rows), share, rows, self.names)
                yield from piece.thinned(_EXAMPLES) if self._divisible(execution) else [piece]

    def _divisible(self, execution: Execution) -> bool:
        """Whether a chunk may be cut further: its examples are independent, and nothing is drawn for it."""
        objective, backend = self.objective, execution.backend
        together = objective.batch_norm == "batch" and objective.normalised
        drawn = backend.draws or backend.global_draws
        return objective.chunk is None and objective.data is not None and not (together or drawn)

    def _fits(self) -> bool:
        """Whether the graphs of all chunks fit the memory."""
        needed = sum(
            _KEPT_GRADIENTS * p.execution.example_bytes * p.at.examples * p.at.members for p in self._pieces()
        )
        budget = self.objective.memory
        return needed <= (0.5 * free_memory(self.device) if budget is None else budget)

    def _faster(self, piece: Piece) -> str:
        """What takes less time for a vector on one chunk."""
        vectors = self._parts(
            torch.ones(piece.at.members, 1, self.size, dtype=self.dtype, device=self.device)
        )
        seconds = {}
        for strategy in ("recomputed", "forward"):
            try:
                start = time.perf_counter()
                self._opened(piece, strategy).products([v[:, 0] for v in vectors])
                self._wait()
                seconds[strategy] = time.perf_counter() - start
            except Exception:  # what forward mode makes of the user's code
                if strategy == "recomputed":
                    raise
        return min(seconds, key=lambda name: seconds[name])

    def _opened(self, piece: Piece, strategy: str) -> Graph:
        make = self._forward if strategy == "forward" else self._graph
        if not self._math:
            return make(piece)
        cudnn = torch.backends.cudnn.flags(enabled=False) if self.device.type == "cuda" else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), cudnn:
            return make(piece)

    def _fallen_back(self, error: Exception) -> None:
        """Turns to plain kernels where fast ones have no second derivative."""
        if not any(text in str(error) for text in _NO_SECOND):
            raise error
        if self._math:
            raise LosslabError(
                f"the loss cannot be differentiated twice ({str(error).splitlines()[0]}): replace that "
                "operation by one of plain torch"
            ) from error
        self._math, self._graphs = True, None
        self.notes.append(PLAIN_KERNELS)
        warnings.warn(PLAIN_KERNELS, ExecutionNotice, stacklevel=4)

    def _inspect(self, piece: Piece, graph: Graph) -> None:
        """Once: is the loss a function of the weights, and what of the network is switched off."""
        refuse_noise(self.objective.loss, piece)
        refuse_once(graph)
        self._inspected = True
        if draws(self.objective.loss, piece):
            self.notes.append(HELD)
        off = [*dropouts(self.objective.module), *dropped(self.objective.task.loss, piece)]
        if off:
            self.notes.append(f"dropout is off in {', '.join(off)}")

    def _accumulate(self, total: Tensor, share: float, graph: Graph, rows: Tensor) -> None:
        """Adds a chunk's share of the products of rows ``[n, K, P]``."""
        parts, count = self._parts(rows), rows.shape[1]

        def one_by_one() -> None:
            for k in range(count):
                self._add(total[:, k], graph.products([p[:, k] for p in parts]), share)

        def together() -> list[Tensor | None]:
            return graph.products([p.movedim(1, 0) for p in parts], batched=True)

        if count < 4 or self._batched is False:
            one_by_one()
        elif self._batched:
            self._add(total.movedim(1, 0), together(), share)
        else:
            start = time.perf_counter()
            one_by_one()
            self._wait()
            middle = time.perf_counter()
            try:
                together()
                self._wait()
                self._batched = time.perf_counter() - middle < middle - start
            except Exception:  # what vmap makes of the user's code, or no memory for it
                self._batched = False

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _parts(self, rows: Tensor) -> Theta:
        return list(self.split(rows).values())

    def _add(self, total: Tensor, found: list[Tensor | None], share: float) -> None:
        """Adds products by name, ``[..., *shape]`` each, to ``[..., P]``."""
        for part, product in zip(total.split(self.sizes, dim=-1), found, strict=True):
            if product is not None:
                part.add_(product.detach().reshape(part.shape), alpha=share)

    # -- what a kind of matrix says --------------------------------------------------------------------

    def _graph(self, piece: Piece) -> Graph:
        raise NotImplementedError

    def _forward(self, piece: Piece) -> Graph:
        raise NotImplementedError


def _named(points: Points, layers: Sequence[str] | None) -> tuple[str, ...]:
    """The parameters that are meant, in the order of the coordinates."""
    if layers is None:
        return tuple(points.weights)
    for layer in layers:
        if not any(n == layer or n.startswith(f"{layer}.") for n in points.weights):
            modules = {n.rpartition(".")[0] for n in points.weights} - {""}
            raise unknown("layer", layer, [*sorted(modules), *points.weights])
    found = [n for n in points.weights if any(n == x or n.startswith(f"{x}.") for x in layers)]
    if not found:
        raise LosslabError("layers is empty: name parameters or modules, or pass None for all")
    return tuple(found)


def _finite(t: Tensor) -> bool:
    """A sum is finite only if all that it adds is, and costs a tenth of asking for each."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def _unsound(points: Points) -> str:
    """A parameter that is not finite, where no point is sound."""
    sound = torch.stack(
        [w.flatten(1).isfinite().all(1) if w.dim() > 1 else w.isfinite() for w in points.weights.values()]
    )
    return "" if sound.all(0).any() else list(points.weights)[int((~sound).any(1).int().argmax())]


__all__ = ["STRATEGIES", "Operator"]
