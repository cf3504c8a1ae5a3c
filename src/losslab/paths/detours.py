"""An exact way between a network and its copy with two units exchanged, by way of a unit that is not used."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths.combinations import joined
from losslab.paths.curves import Curve
from losslab.paths.permutations import Spec


def detour(spec: Spec, points: Points, group: str, first: int, second: int, idle: int) -> Curve:
    """A polychain of constant loss from a network to the same with two units exchanged.

    A unit whose outgoing weights are zero can take on any incoming weights for nothing, and between two units
    of equal incoming weights outgoing weights can be shifted for nothing. So the idle unit becomes the first,
    takes over its part, the first becomes the second, takes over, and so on round: seven straight pieces
    along which the network computes the same function throughout. With one unit to spare, no order of the
    units is cut off from any other.

    A unit's incoming weights are its entries on the first axis of weights and buffers, its outgoing weights
    those on later axes. Layers that mix the units of a group, such as layer norm, are not kept constant:
    measure the curve (`walk_curves`).

    Args:
        spec: The symmetries of the architecture, see `permutation_spec`.
        points: One network.
        group: The group of units, by its name in the spec.
        first: A unit.
        second: Another.
        idle: A third, whose outgoing weights are all zero.

    Source: the argument of Brea et al. (2019) and of Kuditipudi et al. (2019), lemma on dropped units.

    Raises:
        LosslabError: Several networks, units that do not exist or are the same, or an idle unit that is used.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from losslab.paths import permutation_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> net[2].weight.data[:, 2] = 0.0
        >>> curve = detour(permutation_spec(net, torch.ones(4, 2)), Points.from_modules([net]), "0", 0, 1, 2)
        >>> curve.control.members
        8
    """
    if points.members != 1:
        raise LosslabError(f"{points.members} networks were given: pass one, points.select([0])")
    swap = spec.swap(group, first, second)
    if idle in (first, second) or not 0 <= idle < spec.groups[group]:
        raise LosslabError(f"unit {idle} was to be idle: pass a third of the {spec.groups[group]} units")
    if any(bool(t.any()) for t in _touched(spec, points, group, idle, outgoing=True)):
        raise LosslabError(
            f"unit {idle} of {group!r} has outgoing weights that are not zero: pass one that is not in use"
        )
    ways = [points]
    for become, source, giver in ((idle, first, first), (first, second, second), (second, idle, idle)):
        ways.append(_changed(spec, ways[-1], group, become, source, outgoing=False))
        ways.append(_changed(spec, ways[-1], group, become, giver, outgoing=True))
    return Curve("polychain", joined(*ways, spec.permute(points, swap)))


def _places(spec: Spec, group: str, outgoing: bool) -> dict[str, list[tuple[int, Tensor]]]:
    """Weight or buffer -> its axes that belong to the group, with the entries of each unit."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for name, axes in spec.axes.items():
        for k, axis in enumerate(axes):
            entries = axis.entries(group)
            if entries.numel() and outgoing == (k > 0):
                found.setdefault(name, []).append((k + 1, entries))
    return found


def _touched(spec: Spec, points: Points, group: str, unit: int, outgoing: bool) -> list[Tensor]:
    places = _places(spec, group, outgoing)
    return [
        points[name].index_select(k, entries[unit].to(points[name].device))
        for name, some in places.items()
        for k, entries in some
    ]


def _changed(spec: Spec, points: Points, group: str, to: int, source: int, outgoing: bool) -> Points:
    """Incoming weights copied from a unit to another, or outgoing ones handed over."""
    places = _places(spec, group, outgoing)

    def moved(name: str, t: Tensor) -> Tensor:
        t = t.clone()
        for k, entries in places.get(name, ()):
            here, there = entries[to].to(t.device), entries[source].to(t.device)
            rows = t.index_select(k, there)
            if outgoing:
                t.index_fill_(k, there, 0.0)
            t.index_copy_(k, here, rows)
        return t

    return _mapped(points, moved)


def _mapped(points: Points, fn: Callable[[str, Tensor], Tensor]) -> Points:
    weights = {n: fn(n, t) for n, t in points.weights.items()}
    return Points(weights, {n: fn(n, t) for n, t in points.buffers.items()})
