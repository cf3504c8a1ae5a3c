"""All signals of a network as one table, with what needs attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losslab.engine import Population, train
from losslab.engine.population import NEVER
from losslab.errors import LosslabError
from losslab.signals.capture import Layer
from losslab.signals.describing import describe, finished, update_parts
from losslab.signals.diagnosis import Note, Rows, notes
from losslab.signals.flows import EXAMPLES, Flow, examples_of, flow, source_of
from losslab.signals.jacobians import singular_values
from losslab.signals.prediction import Prediction, predict
from losslab.signals.statistics import (
    PERCENTILES,
    Histogram,
    Statistics,
    histogram,
    moments,
)
from losslab.tasks import Batch, Data, Task
from losslab.tasks.nest import leaves
from losslab.tasks.task import Loss

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class SignalTable:
    """What flows through N networks, as numbers.

    Attributes:
        rows: (layer, direction) -> statistic -> ``[N]``; the directions are ``"forward"``, ``"backward"`` and
            ``"weight"``, and ``"input"`` is a layer of its own. See `losslab.signals.describe`;
            ``jacobian_mean`` and ``jacobian_max`` are of the singular values from the layer before.
        histograms: (layer, direction) -> counts of the values.
        jacobians: (from, to) -> singular values ``[N, examples, K]``.
        prediction: What mean-field theory expects, for plain fully connected networks.
        attention: What needs attention.
        layers: What the layers are.
        losses: Mean loss of each member, ``[N]``.
    """

    rows: Rows
    histograms: dict[tuple[str, str], Histogram]
    jacobians: dict[tuple[str, str], Tensor]
    prediction: Prediction | None
    attention: tuple[Note, ...]
    layers: dict[str, Layer]
    losses: Tensor

    @property
    def by_member(self) -> pd.DataFrame:
        """One row a (layer, direction, member)."""
        import pandas as pd

        members = len(self.losses)
        frames = []
        for (layer, direction), told in self.rows.items():
            place = {"layer": layer, "kind": self._kind(layer), "direction": direction}
            columns = {name: values.double().cpu().numpy() for name, values in told.items()}
            frames.append(pd.DataFrame({**place, "member": range(members), **columns}))
        return pd.concat(frames, ignore_index=True)

    @property
    def table(self) -> pd.DataFrame:
        """One row a (layer, direction): the median over the members that are finite.

        ``expected_std`` is the mean-field prediction, where there is one.
        """
        import pandas as pd

        rows = []
        for (layer, direction), told in self.rows.items():
            row: dict[str, object] = {"layer": layer, "kind": self._kind(layer), "direction": direction}
            row |= {name: _median(values) for name, values in told.items()}
            if self.prediction is not None:
                row["expected_std"] = self.prediction.std.get((layer, direction), float("nan"))
            rows.append(row)
        return pd.DataFrame(rows)

    def _kind(self, layer: str) -> str:
        return self.layers[layer].kind if layer in self.layers else ""

    def __repr__(self) -> str:
        told = "\n".join(f"- {note}" for note in self.attention) or "- nothing needs attention"
        return f"{self.table.to_string(index=False, float_format='{:.3g}'.format)}\n{told}"


def signals(
    network: Task | nn.Module | Population,
    loss: Loss | Task | None = None,
    batch: Batch | Data | None = None,
    layers: Sequence[str] | None = None,
    *,
    seeds: int | Sequence[int] = 1,
    examples: int = EXAMPLES,
    training: bool = True,
    percentiles: Sequence[float] = PERCENTILES,
    bins: int = 50,
    jacobians: int = 2,
    updates: Mapping[str, Tensor] | None = None,
) -> SignalTable:
    """All signals of a network at one moment, forward and backward, and what needs attention.

    Args:
        network: A module, a population, or a task, whose networks are then looked at as they start.
        loss: As for `losslab.signals.flow`.
        batch: As for `losslab.signals.flow`.
        layers: As for `losslab.signals.flow`.
        seeds: For a task: how many networks, or their seeds.
        examples: Training examples looked at where no batch is given.
        training: Whether the network is in training mode.
        percentiles: Which to report.
        bins: Of the histograms.
        jacobians: Examples whose layer Jacobians are decomposed; 0 for none.
        updates: Update-to-weight ratios, as `losslab.signals.update_ratio` or a recorder gives them.

    Raises:
        LosslabError: As `losslab.signals.flow`; all members have diverged, or there is no layer.

    Example:
        >>> from losslab.tasks import mlp, supervised
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> task = supervised(mlp(5, 20, 20, 2, activation="tanh"), (x, (x[:, 0] > 0).long()))
        >>> seen = signals(task, seeds=3)
        >>> seen.table.layer.unique().tolist(), len(seen.by_member) == 3 * len(seen.table)
        (['input', '0', '1', '2', '3', '4'], True)
    """
    if layers is not None and not layers:
        raise LosslabError("no layers were named: name at least one, or pass None for all of them")
    if isinstance(network, Task):
        network = train(network, "sgd", seeds=seeds, steps=0, evaluate=None, progress=False)
    task = network.task if isinstance(network, Population) else loss if isinstance(loss, Task) else None
    if batch is None and task is not None:
        batch = examples_of(task, examples)
    if isinstance(network, Population) and bool((network.diverged != NEVER).all()):
        who = "the one member has" if len(network) == 1 else f"all {len(network)} members have"
        raise LosslabError(
            f"{who} diverged by step {network.step}, so nothing flows: look at an earlier step, or lower the "
            "learning rate"
        )
    seen = flow(network, loss, batch, layers, training)
    if not seen.layers:
        raise LosslabError(
            "the loss calls no layer with an output to look at: pass a network that is made of modules"
        )
    rows = describe(seen, percentiles)
    inputs = _inputs(seen)
    found: dict[tuple[str, str], Tensor] = {}
    if jacobians and len(seen.layers) > 1:
        found = _singular_values(network, loss, batch, layers, jacobians, training)
        for (_, to), values in found.items():
            rows[to, "forward"] |= {
                "jacobian_mean": values.mean((1, 2)),
                "jacobian_max": values.amax(2).mean(1),
            }
    if updates:
        for place, ratio in finished([update_parts(seen.layers, updates)])[0].items():
            rows[place] |= ratio
    told = notes(rows, seen.layers, inputs, _examples(source_of(network, loss, batch)[1]))
    histograms = {(name, "forward"): histogram(values, bins) for name, values in seen.outputs.items()}
    histograms |= {(name, "backward"): histogram(values, bins) for name, values in seen.gradients.items()}
    if inputs is not None:
        rows = {("input", "forward"): inputs, **rows}
    return SignalTable(rows, histograms, found, predict(seen), told, seen.layers, seen.losses)


def _singular_values(
    network: nn.Module | Population,
    loss: Loss | Task | None,
    batch: Batch | Data | None,
    layers: Sequence[str] | None,
    examples: int,
    training: bool,
) -> dict[tuple[str, str], Tensor]:
    try:
        return singular_values(network, loss, batch, layers, examples, training, largest=2**16)
    except LosslabError:  # too few layers to go between
        return {}


def _examples(batch: Batch) -> int | None:
    tensors = [t for t in leaves(batch) if t.dim() > 0]
    return len(tensors[0]) if tensors else None


def _inputs(seen: Flow) -> Statistics | None:
    """Of the input of the first layer that has weights, if it is the first layer at all."""
    first = next(iter(seen.inputs), None)
    if first is None or first != next(iter(seen.outputs)):
        return None
    return moments(seen.inputs[first], seen.layers[first].unit_axis)


def _median(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(torch.quantile(finite.double(), 0.5)) if len(finite) else float("nan")
