"""Whether the loss is a function of the weights at all, and has second derivatives."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import torch

from losslab.curvature.graphs import Graph, Piece
from losslab.engine.backends import Function
from losslab.engine.measured import without_dropout
from losslab.errors import LosslabError

_EXAMPLES = 64

HELD = "the loss draws random numbers through torch: they are held at one draw, which is what is measured"


def refuse_noise(loss: Function, piece: Piece) -> None:
    """Evaluates the loss twice on a few examples and refuses one that gives two values.

    Dropout is off in every objective, and what the network draws through torch is drawn alike at each call;
    what is left are sources of its own: Python's or numpy's generators, augmentation, counters.

    Raises:
        LosslabError: It names the source where that can be told.
    """
    few = _few(piece)
    before = _states()
    with torch.no_grad():
        first, second = (few.run(loss, few.theta()).double() for _ in range(2))
    moved = [name for name, state in _states().items() if state != before[name]]
    off = _apart(first, second, few)
    if off.any():
        where = f"it draws from {' and '.join(moved)}" if moved else "something in it changes at each call"
        a, b = (float(v[off][0]) for v in (first, second))
        raise LosslabError(
            f"the loss gave {a:.6g} and then {b:.6g} at the same weights on the same examples, {where}: "
            "leave out augmentation and noise, or draw it by torch's functions, so that there is a function"
        )


def draws(loss: Function, piece: Piece) -> bool:
    """Whether the loss changes with the key from which torch's draws in it are made."""
    few = _few(piece)
    other = dataclasses.replace(few, at=dataclasses.replace(few.at, keys=few.at.keys + 1))
    with torch.no_grad():
        first, second = (one.run(loss, one.theta()).double() for one in (few, other))
    return bool(_apart(first, second, few).any())


def dropped(loss: Function, piece: Piece) -> list[str]:
    """What the code drops units by itself with, such as ``F.dropout`` inside of a forward."""
    few, met = _few(piece), set[str]()
    with torch.no_grad():
        few.run(without_dropout(loss, met), few.theta())
    return [f"calls of {name}()" for name in sorted(met)]


def _few(piece: Piece) -> Piece:
    return next(piece.thinned(_EXAMPLES)) if piece.at.batch is not None else piece


def _apart(first: torch.Tensor, second: torch.Tensor, piece: Piece) -> torch.Tensor:
    scale = torch.maximum(first.abs(), second.abs()) * torch.finfo(piece.theta()[0].dtype).eps * 1e3
    return (first - second).abs() > scale


def _states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "Python's random module": hash(random.getstate()),
        "numpy's random module": (kind, np.asarray(keys).tobytes(), *rest),
    }


def refuse_once(graph: Graph) -> None:
    """Refuses a graph whose second derivative has been cut off, which torch would take for zero.

    Raises:
        LosslabError: An operation of the loss is differentiable once only.
    """
    seen: set[Any] = set()
    waiting = [t.grad_fn for t in graph.slopes if t is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            raise LosslabError(
                "the loss cannot be differentiated twice, an autograd function in it is marked "
                "once_differentiable: replace it by one of plain torch"
            )
        waiting += [source for source, _ in node.next_functions]


__all__ = ["HELD", "draws", "dropped", "refuse_noise", "refuse_once"]
