"""What flows through a network: each layer's output, and the gradient of the loss with respect to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import Points, Population, tape
from losslab.engine.backends import LoopBackend, Stand, TableBackend, TapeBackend, played
from losslab.engine.points import Stack
from losslab.engine.population import NEVER
from losslab.engine.randomness import fold, generator, member_keys, spared
from losslab.engine.stacked import NotInTable, Stacked
from losslab.engine.template import Template
from losslab.errors import LosslabError
from losslab.signals.capture import Capture, Layer, Value, Watch, raw, sent_back
from losslab.signals.finite import check_finite
from losslab.tasks import Data, Task, check_module, unrecomputed
from losslab.tasks.nest import leaves, map_nest
from losslab.tasks.task import Batch, Loss

EXAMPLES = 256
"""Training examples looked at where no batch is given."""


@dataclass(frozen=True, eq=False)
class Flow:
    """One look at N networks: what each layer gave for each example, and how the loss depends on it.

    Attributes:
        outputs: Layer -> ``[N, B, ...]``, in the order of the calls.
        inputs: The input of every layer that has weights and of every activation, ``[N, B, ...]``.
        gradients: Layer -> d(mean loss) / d(output), in the output's shape; empty if not asked for. A layer
            with several outputs, of which the first is looked at, is left out where the loss uses only others
            (the last state of an LSTM, say).
        weight_gradients: Name -> d(mean loss) / d(weight), ``[N, ...]``; empty if not asked for.
        losses: The mean loss of each member, ``[N]``.
        layers: Layer -> what it is.
        points: Where the members stood.
    """

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weight_gradients: dict[str, Tensor]
    losses: Tensor
    layers: dict[str, Layer]
    points: Points

    @property
    def members(self) -> int:
        """N."""
        return self.losses.shape[0]

    def __repr__(self) -> str:
        return f"Flow({self.members} members, {len(self.outputs)} layers: {', '.join(self.outputs)})"


def flow(
    network: nn.Module | Population,
    loss: Loss | Task | None = None,
    batch: Batch | Data | None = None,
    layers: Sequence[str] | None = None,
    training: bool = True,
    gradients: bool = True,
    private: bool = False,
) -> Flow:
    """Runs a network once, forward and backward, and keeps what flows.

    The network's code runs on a private copy with forward hooks; the module given is not touched: no hook, no
    gradient, no moved running statistics, no drawn random number. What a later operation overwrites in place
    (``nn.ReLU(inplace=True)``, ``F.relu_``, ``x += y``) is reported as it was.

    Args:
        network: A module (N = 1), or a population.
        loss: ``loss(model, batch)``, the mean over the examples, or a task; by default the population's.
        batch: The examples, or `Data`; by default 256 training examples of the task, the same at every call.
        layers: Names of modules, those with children too, and of activations called as functions
            (``"block.relu()"``); by default all modules without children and all such activations, but for
            those whose output has another shape for each member.
        training: Whether the network is in training mode (batch norm by the batch, dropout acts).
        gradients: Whether to run backward.
        private: Whether each member has its own batch: its tensors then have a leading axis N.

    Returns:
        The flow. Members of a population that have diverged are NaN in it.

    Raises:
        LosslabError: No such layer, no loss or batch, a loss that is no scalar, an output that is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
        >>> seen = flow(net, lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1]), (x, y))
        >>> list(seen.outputs), seen.gradients["1"].shape
        (['0', '1', '2'], torch.Size([1, 5, 4]))
    """
    instrument, at = aimed(network, loss, batch, layers, private)
    if at.examples == 0:
        raise LosslabError("the batch is empty: pass at least one example")
    seen = instrument(Points(at.weights, at.buffers), at.batch, at.keys, private, training, gradients)
    diverged = network.diverged != NEVER if isinstance(network, Population) else torch.zeros(1).bool()
    check_finite(seen, at.batch, diverged.to(at.keys.device))
    return seen


def aimed(
    network: nn.Module | Population,
    loss: Loss | Task | None,
    batch: Batch | Data | None,
    layers: Sequence[str] | None,
    private: bool = False,
) -> tuple[Instrument, Stand]:
    """An instrument for a network, and where its members stand; arguments as for `flow`."""
    function, given = source_of(network, loss, batch)
    if isinstance(network, Population):
        points = network.points
        at = Stand(points.weights, points.buffers, placed(given, network), private, keys_of(network))
        return Instrument.of(network, layers, function), at
    check_module(network, "the network")
    points = Points.from_modules([network])
    if not len(points):
        raise LosslabError("the network has neither weights nor buffers to look at: pass one that has some")
    keys = member_keys([0], "forward", next(iter(points.values())).device)
    return Instrument(network, function, layers), Stand(points.weights, points.buffers, given, private, keys)


def source_of(
    network: nn.Module | Population, loss: Loss | Task | None, batch: Batch | Data | None
) -> tuple[Loss, Batch]:
    """The loss and the examples that the arguments of an instrument mean; see `flow`.

    Raises:
        LosslabError: The network is neither a module nor a population, or loss or batch are missing.
    """
    if not isinstance(network, (nn.Module, Population)):
        raise LosslabError(f"the network is a {type(network).__name__}: pass a module or a Population")
    task = loss if isinstance(loss, Task) else network.task if isinstance(network, Population) else None
    function = task.loss if task is not None and loss in (None, task) else loss
    if function is None or isinstance(function, Task) or (task is None and batch is None):
        missing = "loss" if function is None else "batch"
        raise LosslabError(
            f"a module was given without a {missing}: pass loss= and batch=, or a Task as loss"
        )
    if batch is None and task is not None:
        batch = examples_of(task)
    return function, batch.all() if isinstance(batch, Data) else batch


def examples_of(task: Task, count: int = EXAMPLES) -> Batch:
    """Some training examples of a task, the same at every call; None where the task has no data."""
    if task.train is None:
        return None
    if count < 1:
        raise LosslabError(f"{count} examples to look at: pass at least 1")
    order = torch.randperm(len(task.train), generator=generator(0, "signals"))[:count]
    return task.train.take(order.to(leaves(task.train.all())[0].device))


def placed(batch: Batch, population: Population) -> Batch:
    """A batch on the population's device and in its dtype; what is not floating keeps its own."""
    device, dtype = population.plan.device, population.plan.dtype
    return map_nest(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), batch)


def keys_of(population: Population) -> Tensor:
    """The members' keys for the random draws of their next step, ``[N]``."""
    return fold(member_keys(population.seeds, "forward", population.plan.device), population.step)


class Instrument:
    """Looks at networks of one architecture again and again; see `flow` for one look.

    Args:
        module: The network; a copy of it is made, with hooks.
        loss: ``loss(model, batch)``.
        layers: Names of layers; all by default.
        alone: Whether to run the members one by one: for code that cannot be batched.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, layers: Sequence[str] | None = None, alone: bool = False
    ) -> None:
        self.template = Template(module)
        self.watch = Watch(self.template.module, layers)
        self.loss, self.alone, self.trusted, self.cloning = loss, alone, False, False
        self.taping, self.drawing = False, True

    @classmethod
    def of(
        cls, population: Population, layers: Sequence[str] | None = None, loss: Loss | None = None
    ) -> Instrument:
        """The instrument for a population's networks, run as its training was."""
        backend = None if population.execution is None else population.execution.backend
        how = "" if backend is None else backend.name
        # Where training took vmap, the hand-batched operations were tried and did not do.
        made = cls(population.template, loss or population.task.loss, layers, alone=how == "vmap")
        if backend is not None and loss in (None, population.task.loss):
            made.trusted, made.taping = how in ("tape", "table"), how == "tape"
            made.drawing = backend.draws or backend.global_draws
        return made

    def __call__(
        self,
        points: Points,
        batch: Batch,
        keys: Tensor,
        private: bool = False,
        training: bool = True,
        gradients: bool = True,
    ) -> Flow:
        """One look.

        Args:
            points: Where the members stand; buffers stay as they are.
            batch: The examples, on the points' device.
            keys: One key a member for its random draws, ``[N]``.
            private: As in `flow`.
            training: As in `flow`.
            gradients: As in `flow`.
        """
        at = Stand(points.weights, points.buffers, batch, private, keys)
        if gradients and self.taping and at.members > 1:
            try:
                return self._taped(at, training)
            except LosslabError:
                raise
            except Exception:  # a layer before all weights, say, whose gradient the tape does not hold
                self.taping = False
        return _flow(self.look(at, training, gradients), at)

    def look(self, at: Stand, training: bool, gradients: bool) -> Look:
        """One look, with the graph of the forward pass."""
        if at.members > 1 and not self.alone:
            try:
                with spared() as moved:
                    seen = self._run(at, training, gradients, together=True)
                    # Draws from the global generator would be the same for all members.
                    if not moved() and (self.trusted or self._agrees(seen, at, training)):
                        self.trusted = True
                        return seen
            except LosslabError:
                raise
            except Exception:  # the user's code does not like stacked values; alone it tells what is wrong
                pass
            self.alone = True
        return self._run(at, training, gradients, together=False)

    def _run(self, at: Stand, training: bool, gradients: bool, together: bool) -> Look:
        table = TableBackend(self.template, self.drawing)
        backend = table if together else LoopBackend(self.template, True, True)
        leaf = {n: w.detach().requires_grad_(gradients) for n, w in at.weights.items()}
        for cloning in (True,) if self.cloning else (False, True):
            stand = dataclasses.replace(at, weights=leaf).sheltered()
            members = at.members if together else None
            with self.watch.watching(members, cloning) as captures, torch.set_grad_enabled(gradients):
                try:
                    with unrecomputed():
                        losses = backend.run(self._watched, stand, training)
                except LosslabError:
                    raise
                except Exception as error:
                    if together:
                        raise
                    raise LosslabError(self.watch.blame(error)) from error
            if not any(capture.changed() for capture in captures):
                self.watch.check_called(captures)
                return Look(captures, losses, leaf, together)
            self.cloning = True
        raise LosslabError(
            "a layer's output is changed in place where it cannot be copied: return a new tensor instead"
        )

    def _taped(self, at: Stand, training: bool) -> Flow:
        """A look by the way that training takes, which is the fastest for small layers."""
        backend = TapeBackend(self.template, self.drawing)
        with self.watch.watching(at.members, False) as captures:
            loss, leaf = backend.taped(self._watched, at.sheltered(), training)
        (capture,) = captures
        nodes = capture.outputs
        if capture.changed() or not all(isinstance(node, tape.Node) for node in nodes.values()):
            raise NotInTable("a layer that is off the tape")
        self.watch.check_called(captures)
        with torch.no_grad():
            sent = tape.backward(loss, [*nodes.values()])
        silent = {name: node.data for name, node in nodes.items() if id(node) not in sent}
        return Flow(
            {name: node.data for name, node in nodes.items()},
            {name: _of_all(value, at.members) for name, value in capture.inputs.items()},
            {
                n: torch.zeros_like(silent[n]) if n in silent else sent[id(node)]
                for n, node in nodes.items()
                if not (n in silent and n in capture.several)
            },
            dict(played(leaf)),
            loss.data,
            capture.layers,
            Points(at.weights, at.buffers),
        )

    def _agrees(self, seen: Look, at: Stand, training: bool) -> bool:
        """Whether the first and the last member give the same outputs alone."""
        ends = self._run(at.ends(), training, False, together=False)
        places = slice(None, None, max(1, at.members - 1))
        pairs = [(seen.losses[places], ends.losses)]
        for name in ends.captures[0].outputs:
            (together,) = seen.outputs(name)
            mine = together[places] if isinstance(seen.captures[0].outputs[name], Stacked) else together
            pairs += [(mine, torch.stack(ends.outputs(name)))]
        rounding = max((torch.finfo(b.dtype).eps for _, b in pairs), default=0.0) ** 0.5
        return all(torch.allclose(*pair, rtol=rounding, atol=rounding, equal_nan=True) for pair in pairs)

    def _watched(self, module: nn.Module, batch: Batch) -> Any:
        self.watch.begin()
        return self.loss(module, batch)


@dataclass(frozen=True, eq=False)
class Look:
    """What a look saw, the graph of the forward pass included.

    Attributes:
        captures: One for all members together, or one a member.
        losses: ``[N]``.
        weights: The leaves of the graph.
        together: Which of the two.
    """

    captures: list[Capture]
    losses: Tensor
    weights: Stack
    together: bool

    def outputs(self, layer: str) -> list[Tensor]:
        """The layer's outputs in the graph: one tensor ``[N, B, ...]``, or ``[B, ...]`` for each member."""
        return [raw(capture.outputs[layer]) for capture in self.captures]

    def gathered(self, values: Sequence[Tensor]) -> Tensor:
        """What there is one of a capture, as one tensor ``[N, ...]``."""
        return values[0] if self.together else torch.stack([*values])


def _flow(seen: Look, at: Stand) -> Flow:
    losses = seen.losses
    if losses.dim() != 1:
        raise LosslabError(f"the loss has shape {list(losses.shape[1:])}, a scalar was wanted: take its mean")
    layers = dict(seen.captures[0].layers)
    for member, capture in enumerate(seen.captures):
        if list(capture.layers) != list(layers):
            raise LosslabError(
                f"member {member} calls other layers than member 0: look at one member at a time"
            )
    for name in [n for n in layers if len({t.shape for t in seen.outputs(n)}) > 1]:
        del layers[name]  # a boolean mask: the members' values cannot be held together

    def values(which: Sequence[Value]) -> Tensor:
        if seen.together:
            return _of_all(which[0], at.members)
        return torch.stack([raw(v).detach() for v in which])

    leaf = seen.weights
    sources = [*leaf.values(), *(t for name in layers for t in seen.outputs(name))]
    found: list[Tensor] = []
    flowing: dict[str, list[Tensor]] = {}
    if leaf and losses.requires_grad:
        sent = sent_back(losses.sum(), sources)
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(sources, sent, strict=True)]
        back = iter(zip(sent[len(leaf) :], found[len(leaf) :], strict=True))
        for name in layers:
            mine = [next(back) for _ in seen.captures]
            if name not in seen.captures[0].several or any(g is not None for g, _ in mine):
                flowing[name] = [g for _, g in mine]
    entered = [name for name in layers if name in seen.captures[0].inputs]
    return Flow(
        {name: values([c.outputs[name] for c in seen.captures]) for name in layers},
        {name: values([c.inputs[name] for c in seen.captures]) for name in entered},
        {name: seen.gathered(row) for name, row in flowing.items()},
        dict(zip(leaf, found, strict=False)),
        losses.detach(),
        layers,
        Points(at.weights, at.buffers),
    )


def _of_all(value: Value, members: int) -> Tensor:
    """``[N, B, ...]`` of a value of members that run together; what all share is expanded."""
    data = raw(value).detach()
    return data if isinstance(value, Stacked) else data.expand(members, *data.shape)
