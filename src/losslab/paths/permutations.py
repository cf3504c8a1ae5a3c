"""Which units of a network may change places without changing what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import Points, Population, randomness
from losslab.errors import LosslabError, unknown
from losslab.paths import tracing_rules  # noqa: F401  (the rules fill their table)
from losslab.paths.labels import LEAF, SUM, Label
from losslab.paths.tracing import traced
from losslab.tasks import Data, Supervised, Task
from losslab.tasks.nest import leaves, map_nest

Permutations = Mapping[str, Tensor]
"""Group -> order ``[n]``, int64: unit i of the permuted network is unit ``order[i]`` of the network."""

PROBED = 8
"""Examples on which a spec is derived and verified."""

TOLERANCE = 1e-9
"""Relative difference of outputs, in float64, that rounding may cause."""

_HOW = 'give one by hand, Spec.of({"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}, module)'


@dataclass(frozen=True)
class Axis:
    """One axis of a weight: units of a group, entries that stay, or a product or a sum of such parts."""

    size: int
    group: str | None = None
    kind: str = LEAF
    parts: tuple[Axis, ...] = ()

    def groups(self) -> set[str]:
        """The groups that it has units of."""
        own = {self.group} if self.group is not None else set()
        return own.union(*(part.groups() for part in self.parts))

    def order(self, permutations: Permutations) -> Tensor:
        """Where each entry comes from, ``[size]``; groups that are not named stay."""
        if self.kind == LEAF:
            there = None if self.group is None else permutations.get(self.group)
            return torch.arange(self.size) if there is None else there
        found, start = torch.zeros(1, dtype=torch.int64), 0
        if self.kind == SUM:
            rows = []
            for part in self.parts:
                rows.append(part.order(permutations) + start)
                start += part.size
            return torch.cat(rows)
        for part in self.parts:
            found = (found[:, None] * part.size + part.order(permutations)).flatten()
        return found

    def entries(self, group: str) -> Tensor:
        """The entries that belong to each unit of a group, ``[n, R]``; R is 0 if there are none."""
        if self.kind == LEAF:
            return torch.arange(self.size)[:, None] if self.group == group else torch.empty(0, 0).long()
        found, start = [], 0
        for k, part in enumerate(self.parts):
            own = part.entries(group)
            if own.numel() and self.kind == SUM:
                found.append(own + start)
            elif own.numel():
                before, after = (prod(p.size for p in side) for side in (self.parts[:k], self.parts[k + 1 :]))
                outer = torch.arange(before)[:, None] * part.size
                whole = (outer[None] + own[:, None, :]).flatten(1)
                whole = whole[..., None] * after + torch.arange(after)
                found.append(whole.flatten(1))
            start += part.size
        return torch.cat(found, 1) if found else torch.empty(0, 0).long()


@dataclass(frozen=True)
class Spec:
    """The permutation symmetries of an architecture.

    Attributes:
        groups: Name -> number of units that may change places with each other. A group is called after the
            layer that makes its units.
        axes: Weight or buffer -> its axes; only those that some group touches.
        notes: What could have been free and is not, and why.
    """

    groups: dict[str, int]
    axes: dict[str, tuple[Axis, ...]]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[tuple[str, int]]], module: nn.Module) -> Spec:
        """A spec by hand: group -> the (weight, axis) places that are permuted together.

        Raises:
            LosslabError: No such weight or axis, or axes of several sizes in a group.
        """
        shapes = {n: tuple(t.shape) for n, t in [*module.named_parameters(), *module.named_buffers()]}
        axes = {n: [Axis(s) for s in shape] for n, shape in shapes.items()}
        sizes: dict[str, int] = {}
        for group, places in groups.items():
            for name, axis in places:
                if name not in shapes:
                    raise unknown("weight", name, shapes)
                if not 0 <= axis < len(shapes[name]):
                    raise LosslabError(
                        f"{name} has {len(shapes[name])} axes, no axis {axis}: pass one of them"
                    )
                size = shapes[name][axis]
                if sizes.setdefault(group, size) != size:
                    raise LosslabError(f"group {group!r} has {sizes[group]} units, {name} has {size} there")
                axes[name][axis] = Axis(size, group)
        return cls(sizes, {n: tuple(a) for n, a in axes.items() if any(x.group for x in a)})

    def check(self, permutations: Permutations) -> None:
        """Refuses what is no permutation of a group.

        Raises:
            LosslabError: An unknown group, or an order that is none.
        """
        for name, order in permutations.items():
            if name not in self.groups:
                raise unknown("group of units", name, self.groups)
            if not torch.equal(order.sort().values.cpu(), torch.arange(self.groups[name])):
                raise LosslabError(
                    f"the order of {name!r} is no permutation of its {self.groups[name]} units: each number "
                    "from 0 once"
                )

    def permute(self, points: Points, permutations: Permutations) -> Points:
        """The same networks with their units in another order: weights, biases and running statistics."""
        self.check(permutations)

        def moved(name: str, t: Tensor) -> Tensor:
            for k, axis in enumerate(self.axes.get(name, ())):
                if axis.groups() & permutations.keys():
                    t = t.index_select(k + 1, axis.order(permutations).to(t.device))
            return t.clone()

        return Points(
            {n: moved(n, t) for n, t in points.weights.items()},
            {n: moved(n, t) for n, t in points.buffers.items()},
        )

    def random(self, seed: int = 0, groups: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A uniformly random permutation of each group, or of some."""
        chosen = list(self.groups) if groups is None else list(groups)
        for name in chosen:
            if name not in self.groups:
                raise unknown("group of units", name, self.groups)
        return {
            n: torch.randperm(self.groups[n], generator=randomness.generator(seed, "permutation", i))
            for i, n in enumerate(chosen)
        }

    def swap(self, group: str, first: int, second: int) -> dict[str, Tensor]:
        """The permutation that exchanges two units."""
        if group not in self.groups:
            raise unknown("group of units", group, self.groups)
        if first == second or not (0 <= first < self.groups[group] and 0 <= second < self.groups[group]):
            raise LosslabError(
                f"units {first} and {second} of {self.groups[group]} were to be exchanged: pass two of them"
            )
        order = torch.arange(self.groups[group])
        order[first], order[second] = second, first
        return {group: order}


def permutation_spec(
    network: nn.Module | Population | Task,
    examples: Any = None,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> Spec:
    """Derives the permutation symmetries from the network's own code, and verifies them.

    The network is run once on labelled axes: where two axes meet they become one, where the code looks at
    single entries they are fixed. What is left free is then tried: the network with randomly permuted units
    must give the same outputs in float64. Linear and convolutional layers (grouped ones too), batch, layer
    and group norm, residual connections, embeddings, concatenations and attention heads are understood;
    around a function that is not, units stay where they are, and a note names it.

    Args:
        network: A module with examples, or a task or population, which know theirs.
        examples: A batch; its first few are used. For a module, its inputs.
        run: ``run(module, batch)``, the results that must not change; by default the outputs, or the loss
            where the task keeps its outputs to itself.

    Raises:
        LosslabError: No examples, or nothing may be permuted; the sentence says how to give a spec.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        >>> spec = permutation_spec(net, torch.randn(5, 4))
        >>> spec.groups, sorted(spec.axes)[-3:]
        ({'0': 8}, ['1.running_var', '1.weight', '3.weight'])
    """
    module, batch, run = _source(network, examples, run)
    module = copy.deepcopy(module).double().eval()
    batch = map_nest(lambda t: t[:PROBED].double() if t.is_floating_point() else t[:PROBED], batch)
    with randomness.spared():
        named, trace = traced(module, run, batch)
    notes = [
        f"{name} is not understood: what it is given keeps its order"
        for name in dict.fromkeys(trace.fixed_by)
    ]
    spec = _resolved(named, notes)
    with randomness.spared():
        bad = [g for g in spec.groups if not _holds(spec, module, run, batch, [g])]
        if bad:
            told = ", ".join(bad)
            spec = _without(spec, bad, f"permuting {told} changes the outputs: these keep their order")
        if spec.groups and not _holds(spec, module, run, batch, list(spec.groups)):
            raise LosslabError(
                f"permuting the units of {type(module).__name__} together changes its outputs: {_HOW}"
            )
    if not spec.groups:
        why = f" ({spec.notes[0]})" if spec.notes else ""
        raise LosslabError(f"no units of {type(module).__name__} may change places{why}: {_HOW}")
    return spec


def verify(spec: Spec, module: nn.Module, examples: Any, run: Any = None) -> float:
    """The largest difference that a random permutation makes to the outputs, relative to the outputs.

    In float64 and evaluation mode; for a right spec it is rounding, about 1e-15.
    """
    module, batch, run = _source(module, examples, run)
    module = copy.deepcopy(module).double().eval()
    batch = map_nest(lambda t: t[:PROBED].double() if t.is_floating_point() else t[:PROBED], batch)
    with randomness.spared():
        return _difference(spec, module, run, batch, list(spec.groups))


def _source(network: Any, examples: Any, run: Any) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], Any]]:
    task = network if isinstance(network, Task) else getattr(network, "task", None)
    if isinstance(network, nn.Module):
        if examples is None:
            raise LosslabError("a module was given without examples: pass inputs to run it on")
        batch = examples.all() if isinstance(examples, Data) else examples
        return network, batch, run or (lambda m, x: m(*x) if isinstance(x, tuple) else m(x))
    if not isinstance(task, Task):
        raise LosslabError(
            f"a {type(network).__name__} has no units: pass a module with examples, a task or a population"
        )
    module = network.template if isinstance(network, Population) else _built(task)
    batch = examples if examples is not None else None if task.train is None else task.train.all()
    if run is None:
        run = task.loss.outputs if isinstance(task.loss, Supervised) else task.loss
    return module, batch, run


def _built(task: Task) -> nn.Module:
    with randomness.seeded(0, "init"):
        return task.model()


def _resolved(named: dict[str, list[Label]], notes: Sequence[str]) -> Spec:
    """The labels of a run as a spec: groups with more than one place, called after where they are made."""
    places: dict[int, list[tuple[str, int]]] = {}
    roots: dict[int, Label] = {}

    def visit(label: Label, name: str, axis: int) -> None:
        here = label.root
        for part in here.parts:
            visit(part, name, axis)
        if not here.parts and here.free:
            roots[id(here)] = here
            places.setdefault(id(here), []).append((name, axis))

    for name, labels in named.items():
        for axis, label in enumerate(labels):
            visit(label, name, axis)
    called: dict[int, str] = {}
    for key, found in places.items():
        if len(found) > 1:
            first = next((n for n, axis in found if axis == 0), found[0][0])
            base = first.rpartition(".")[0] or first
            count = sum(n == base or n.startswith(f"{base}#") for n in called.values())
            called[key] = f"{base}#{count + 1}" if count else base

    axes = {n: tuple(axis_of_label(label, called) for label in labels) for n, labels in named.items()}
    axes = {n: found for n, found in axes.items() if any(a.groups() for a in found)}
    return Spec({called[k]: roots[k].size for k in called}, axes, tuple(notes))


def axis_of_label(label: Label, called: Mapping[int, str]) -> Axis:
    """A label as an axis, given the names of the leaves by the ids of their roots."""
    here = label.root
    if here.parts:
        return Axis(here.size, None, here.kind, tuple(axis_of_label(p, called) for p in here.parts))
    return Axis(here.size, called.get(id(here)))


def names_of_labels(spec: Spec, named: Mapping[str, Sequence[Label]]) -> dict[int, str]:
    """The names that a spec has for the leaves of another run of the same network."""
    called: dict[int, str] = {}

    def visit(label: Label, axis: Axis) -> None:
        here = label.root
        if axis.group is not None:
            called[id(here)] = axis.group
        for part, own in zip(here.parts, axis.parts, strict=False):
            visit(part, own)

    for name, axes in spec.axes.items():
        for label, axis in zip(named[name], axes, strict=True):
            visit(label, axis)
    return called


def _without(spec: Spec, groups: Sequence[str], note: str) -> Spec:
    def stripped(axis: Axis) -> Axis:
        group = None if axis.group in groups else axis.group
        return Axis(axis.size, group, axis.kind, tuple(stripped(p) for p in axis.parts))

    axes = {n: tuple(stripped(a) for a in found) for n, found in spec.axes.items()}
    kept = {g: n for g, n in spec.groups.items() if g not in groups}
    return Spec(kept, {n: a for n, a in axes.items() if any(x.groups() for x in a)}, (*spec.notes, note))


def _holds(spec: Spec, module: nn.Module, run: Any, batch: Any, groups: Sequence[str]) -> bool:
    return _difference(spec, module, run, batch, groups) <= TOLERANCE


def _difference(spec: Spec, module: nn.Module, run: Any, batch: Any, groups: Sequence[str]) -> float:
    points = Points.from_modules([module])
    # One that moves something in each group: of two units, half of the random orders move none.
    order = {
        g: o if (o != torch.arange(len(o))).any() else o.roll(1) for g, o in spec.random(1, groups).items()
    }
    other = spec.permute(points, order).load_into(copy.deepcopy(module), 0)
    with torch.no_grad():
        wanted, found = (leaves([run(m, batch)]) for m in (module, other))
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        a, b = a.double(), b.double()
        worst = max(worst, float((a - b).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny)))
    return worst


__all__ = ["Axis", "Permutations", "Spec", "permutation_spec", "verify"]
