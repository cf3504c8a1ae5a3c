"""What in a network's signals needs attention: what is seen, what it does, what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.signals.capture import Layer
from losslab.signals.statistics import Statistics

SATURATED = 0.5
"""Share of a layer's values that may be saturated."""
DEAD = 0.2
"""Share of a layer's units that may pass no gradient for any example."""
CONSTANT = 0.2
"""Share of a layer's units that may give the same for every example."""
FADED = 1e-3
"""What signals or gradients may shrink to between the two ends of the network; the inverse for growth."""
STEPS = (1e-5, 3e-2)
"""Smallest and largest sound update-to-weight ratio; around 1e-3 is usual."""
INPUTS = (0.1, 10.0)
"""Smallest and largest sound root mean square of the inputs."""
DRIFT = 10.0
"""By what factor a layer's scale may change through training."""

Rows = dict[tuple[str, str], Statistics]


@dataclass(frozen=True)
class Note:
    """One thing that needs attention.

    Attributes:
        layer: Where; empty for the network as a whole.
        kind: ``"saturated"``, ``"dead"``, ``"constant"``, ``"vanishing"``, ``"exploding"``, ``"update"``,
            ``"inputs"``, ``"drift"``, ``"diverged"`` or ``"examples"``.
        text: What is seen, what it does, what to try.
    """

    layer: str
    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def notes(
    rows: Rows, layers: dict[str, Layer], inputs: Statistics | None = None, examples: int | None = None
) -> tuple[Note, ...]:
    """Goes through the statistics of a network, from its input to its output.

    Args:
        rows: As `losslab.signals.describe` gives them, ``update_ratio`` added where it is known.
        layers: What the layers are.
        inputs: `losslab.signals.moments` of the network's input, if it has a floating one.
        examples: How many were looked at, where it is known; one tells nothing of dead and constant units.

    Returns:
        The notes. A problem that only some members have is told with their number.
    """
    found: list[Note] = [*_diverged(rows)]
    if examples == 1:
        found.append(Note("", "examples", _ONE_EXAMPLE))
        rows = {
            place: {
                n: torch.full_like(v, torch.nan) if n in ("dead", "constant") else v for n, v in told.items()
            }
            for place, told in rows.items()
        }
        inputs = None
    if inputs is not None:
        found += _of_inputs(inputs)
    for (name, direction), told in rows.items():
        layer = layers[name]
        if direction == "forward":
            found += _of_outputs(layer, told)
        elif "update_ratio" in told:
            found += _of_updates(layer, told["update_ratio"])
    found += _by_depth(rows, layers, "forward")
    found += _by_depth(rows, layers, "backward")
    return tuple(found)


def drifted(first: Rows, last: Rows, layers: dict[str, Layer]) -> tuple[Note, ...]:
    """Layers whose scale has moved far between two moments of training."""
    found = []
    for (name, direction), told in last.items():
        if direction != "forward" or (name, direction) not in first:
            continue
        growth = told["std"] / first[name, direction]["std"]
        off = (growth > DRIFT) | (growth < 1 / DRIFT)
        if (who := _who(off)) is not None:
            text = (
                f"{_title(layers[name])}: the standard deviation of its outputs has changed by a factor of "
                f"{_number(growth, off)} through training{who}, so the layers behind it work on another "
                "scale than they started on: normalise (batch norm), add weight decay, or lower the rate."
            )
            found.append(Note(name, "drift", text))
    return tuple(found)


def _diverged(rows: Rows) -> Iterator[Note]:
    forward = [told["mean"] for (_, direction), told in rows.items() if direction == "forward"]
    if not forward:
        return
    gone = torch.stack([~t.isfinite() for t in forward]).any(0)
    if bool(gone.any()):
        yield Note(
            "",
            "diverged",
            f"{int(gone.sum())} of {len(gone)} members have outputs that are not finite and are left out "
            "below: lower the learning rate, or clip the gradient.",
        )


def _of_inputs(told: Statistics) -> Iterator[Note]:
    mean, std = told["mean"], told["std"]
    rms = (mean.square() + std.square()).sqrt()
    off = (rms > INPUTS[1]) | (rms < INPUTS[0])
    if _who(off) is not None:
        yield Note(
            "input",
            "inputs",
            f"The inputs have mean {_number(mean, off)} and standard deviation {_number(std, off)}, so the "
            "first layer starts far from unit scale: standardise them.",
        )
    empty = told["constant"] > CONSTANT
    if _who(empty) is not None:
        yield Note(
            "input",
            "constant",
            f"{_percent(told['constant'], empty)} of the input features are the same for every example, so "
            "the weights behind them learn nothing: leave them out, or keep them from a division by 0.",
        )


def _of_outputs(layer: Layer, told: Statistics) -> Iterator[Note]:
    title = _title(layer)
    for kind, limit, text in (
        (
            "saturated",
            SATURATED,
            "of its values lie where the function is flat{who}, so little gradient passes: start from "
            "smaller weights (Xavier), normalise its input (batch norm), or lower the learning rate.",
        ),
        ("dead", DEAD, _DEAD_UNITS if layer.activation and layer.activation.gates else _STUCK_UNITS),
    ):
        off = told[kind] > limit
        if kind == "dead":
            off &= ~(told["saturated"] > SATURATED)  # told already
        if (who := _who(off)) is not None:
            yield Note(layer.name, kind, f"{title}: {_percent(told[kind], off)} {text.format(who=who)}")
    off = (told["constant"] > CONSTANT) & ~(told["dead"] > 0)
    if layer.activation is None and (who := _who(off)) is not None:
        yield Note(
            layer.name,
            "constant",
            f"{title}: {_percent(told['constant'], off)} of its units give the same for every example{who}, "
            "so they carry no information: look for dead units before it, or zero weights.",
        )


_ONE_EXAMPLE = (
    "One example was looked at, so nothing varies over examples: which units are dead or constant, and "
    "whether the inputs are scaled well, cannot be told. Look at more of them (--examples, a larger batch)."
)
_DEAD_UNITS = (
    "of its units are at zero for every example{who}, so they pass no gradient and cannot recover: lower the "
    "learning rate, start from He's weights and zero biases, or use a leaky ReLU or batch norm."
)
_STUCK_UNITS = (
    "of its units are saturated for every example{who}, so they pass hardly any gradient: start from smaller "
    "weights, or normalise their input (batch norm)."
)


def _of_updates(layer: Layer, ratio: Tensor) -> Iterator[Note]:
    for off, size, text in (
        (ratio < STEPS[0], "only ", "so it hardly learns: raise the rate, or look why its gradient is small"),
        (ratio > STEPS[1], "", "so a few steps overwrite it: lower the learning rate, or warm it up"),
    ):  # fmt: skip
        if (who := _who(off)) is not None:
            told = f"an update moves its weights by {size}{_number(ratio, off)} of their size{who}"
            yield Note(layer.name, "update", f"{_title(layer)}: {told} (about 0.001 is usual), {text}.")


def _by_depth(rows: Rows, layers: dict[str, Layer], direction: str) -> Iterator[Note]:
    """Growth or decay between the first and the last layer that has a matrix of weights."""
    names = [n for n, layer in layers.items() if _is_matrix(layer, rows) and (n, direction) in rows]
    if len(names) < 3:
        return
    # Forward what counts is the variation over examples: an offset that all share carries nothing.
    which = "unit_std" if direction == "forward" else "std"
    scales = torch.stack([rows[name, direction][which] for name in names])
    ends = (0, -1) if direction == "forward" else (-1, 0)
    factor = scales[ends[1]] / scales[ends[0]]
    each = factor ** (1 / (len(names) - 1))
    where = [_title(layers[names[end]]) for end in ends]
    what = "signal" if direction == "forward" else "gradient"
    does = {
        ("forward", "vanishing"): "so the last layers see hardly any difference between examples",
        ("forward", "exploding"): "so outputs and loss are huge and steps must be tiny",
        ("backward", "vanishing"): "so the first layers hardly learn",
        ("backward", "exploding"): "so steps that suit the last layers wreck the first",
    }
    for kind, off, told in (
        ("vanishing", factor < FADED, "shrinks to {0} of its size"),
        ("exploding", factor > 1 / FADED, "grows {0} times"),
    ):
        if (who := _who(off)) is not None:
            yield Note(
                "",
                kind,
                f"The {what} {told.format(_number(factor, off))} from {where[0]} to {where[1]}{who}, "
                f"by {_number(each, off)} a layer, {does[direction, kind]}: choose initial weights that keep "
                "its variance (He for ReLU, Xavier for tanh), add batch norm, or add skip connections.",
            )


def _is_matrix(layer: Layer, rows: Rows) -> bool:
    return (layer.name, "weight") in rows and "Norm" not in layer.kind


def _who(off: Tensor) -> str | None:
    """Which share of the members has the problem: None for none, nothing to say for all."""
    count = int(off.sum())
    if not count:
        return None
    return "" if count == len(off) else f" in {count} of {len(off)} members"


def _title(layer: Layer) -> str:
    return layer.name if layer.kind == layer.name.rstrip("()") else f"{layer.name} ({layer.kind})"


def _middle(values: Tensor, off: Tensor) -> float:
    return float(values[off].median())


def _percent(values: Tensor, off: Tensor) -> str:
    return f"{100 * _middle(values, off):.0f} %"


def _number(values: Tensor, off: Tensor) -> str:
    value = _middle(values, off)
    return "0" if value == 0 else f"{value:.2g}" if math.isfinite(value) else str(value)
