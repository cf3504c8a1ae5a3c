"""What mean-field theory expects of a given fully connected network, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from losslab.signals.capture import Layer
from losslab.signals.flows import Flow
from losslab.signals.mean_field import recursion


@dataclass(frozen=True)
class Prediction:
    """Expected standard deviations, (layer, direction) -> number.

    Attributes:
        std: Forward of all values of a layer; backward of the gradients with respect to them, starting from
            what was measured at the last layer.
        activation: The network's one activation.
    """

    std: dict[tuple[str, str], float]
    activation: str


def predict(seen: Flow) -> Prediction | None:
    """The mean-field recursion for a flow's own widths, weight variances and inputs, averaged over members.

    It speaks of networks whose weights are independent draws with these variances: at initialisation of this
    very network, later of a network that has unlearned everything but its scale.

    Returns:
        None unless the network is linear layers with one known activation between them and nothing else.
    """
    steps = _alternating([*seen.layers.values()])
    if steps is None:
        return None
    linear, between = steps
    activation = between[0].activation
    assert activation is not None
    forward, backward, bias = [], [], []
    for layer in linear:
        weight = seen.points[layer.weights[0]]
        variance = _mean_square(weight)
        forward.append(variance * weight.shape[2])
        backward.append(variance * weight.shape[1])
        bias.append(_mean_square(seen.points[layer.weights[1]]) if len(layer.weights) > 1 else 0.0)
    inputs = _mean_square(seen.inputs[linear[0].name])
    expected = recursion(lambda s: activation.apply(s), len(linear), forward, backward, bias, inputs)
    std = {(layer.name, "forward"): q**0.5 for layer, q in zip(linear, expected.variance, strict=True)}
    std |= {(layer.name, "forward"): s for layer, s in zip(between, expected.std, strict=False)}
    if seen.gradients:
        top = _mean_square(seen.gradients[linear[-1].name])
        variances = [top * g for g in expected.gradient]
        std |= {(layer.name, "backward"): v**0.5 for layer, v in zip(linear, variances, strict=True)}
        for layer, factor, v in zip(between, backward[1:], variances[1:], strict=True):
            std[layer.name, "backward"] = (factor * v) ** 0.5
    return Prediction(std, activation.name)


def _mean_square(values: torch.Tensor) -> float:
    """Over the members that are finite."""
    squares = values.detach().double().flatten(1).square().mean(1)
    return float(squares[squares.isfinite()].mean())


def _alternating(layers: list[Layer]) -> tuple[list[Layer], list[Layer]] | None:
    """The linear layers and the activations between them, if that is all that there is."""
    linear, between = layers[::2], layers[1::2]
    names = {layer.activation.name if layer.activation else "" for layer in between}
    kinds = {layer.kind for layer in linear}
    plain = kinds == {"Linear"} and all(
        "parametrizations" not in w for layer in linear for w in layer.weights
    )
    if len(linear) != len(between) + 1 or not between or len(names) != 1 or names == {""} or not plain:
        return None
    return linear, between
