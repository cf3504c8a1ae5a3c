"""REPAIR (Jordan et al. 2023): averages of networks get back the variance that averaging has taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import Objective, Points
from losslab.engine.measured import normalisers
from losslab.errors import LosslabError
from losslab.paths.permutations import Spec
from losslab.tasks import Task
from losslab.tasks.nest import map_nest

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Run = Callable[[nn.Module, Any], Any]


def reset_batch_norm(task: Task, points: Points, module: nn.Module | None = None) -> Points:
    """The same weights with running statistics of the training data at each point.

    Raises:
        LosslabError: The network has no batch norm.
    """
    objective = Objective(task, batch_norm="re-estimate", module=module)
    if not objective.normalised:
        raise LosslabError("the network has no batch norm to reset: use repair")
    return objective.settled(points)


def repair(
    spec: Spec,
    first: Points,
    second: Points,
    between: Points,
    module: nn.Module,
    examples: Any,
    *,
    share: float = 0.5,
    run: Run = lambda module, x: module(x),
) -> Points:
    """Rescales the layers of a network between two others so that its units vary as theirs do.

    The average of two aligned networks has units whose variance is too small, the more so the deeper. Layer
    by layer, in the order in which the layers run, each unit's output is brought to

        mean = (1 - share) mean_A + share mean_B,    std = (1 - share) std_A + share std_B

    over the examples and positions, by an affine map that is folded into the layer's weight and bias. Layers
    without a bias are only rescaled. Layers whose outputs may not be permuted, the last above all, stay.

    Args:
        spec: The symmetries; they tell which layers make units.
        first: Network A, one point.
        second: Network B, one point, aligned with A.
        between: The network to repair, one point.
        module: A network of the architecture, for its code; without batch norm.
        examples: A batch of inputs, some hundred or more.
        share: Where the network lies between A and B.
        run: ``run(module, batch)``.

    Returns:
        The repaired network, one point.

    Raises:
        LosslabError: The network has batch norm, or no layer to repair.
    """
    if normalisers(module):
        raise LosslabError("the network has batch norm, which does this by itself: use reset_batch_norm")
    layers = [
        name
        for name, m in module.named_modules()
        if isinstance(m, LAYERS) and f"{name}.weight" in spec.axes and spec.axes[f"{name}.weight"][0].groups()
    ]
    if not layers:
        raise LosslabError(
            "no linear or convolutional layer makes units of the spec: derive it from this module"
        )
    like = next(iter(between.weights.values())).dtype
    batch = map_nest(lambda t: t.to(like) if t.is_floating_point() else t, examples)
    ends = [_observed(points, module, run, batch, layers) for points in (first, second)]
    found = between.clone()
    for name in ends[0]:
        (mean_a, std_a), (mean_b, std_b) = (end[name] for end in ends)
        mean, std = _observed(found, module, run, batch, [name])[name]
        goal = (1 - share) * std_a + share * std_b
        # A unit that never varies cannot be rescaled, and one that should not is set still.
        scale = torch.where(std > 0, goal / std.where(std > 0, torch.ones_like(std)), torch.ones_like(std))
        w = found.weights[f"{name}.weight"]
        w.mul_(scale.reshape(1, -1, *[1] * (w.dim() - 2)))
        if f"{name}.bias" in found.weights:
            bias = found.weights[f"{name}.bias"]
            bias.copy_((bias - mean) * scale + (1 - share) * mean_a + share * mean_b)
    return found


def _observed(
    points: Points, module: nn.Module, run: Run, batch: Any, layers: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the units of some layers, in the order in which the layers run."""
    network = copy.deepcopy(module)
    network = points.load_into(network, 0).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, linear: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: Any, y: Tensor) -> None:
            axis = y.dim() - 1 if linear else 1
            flat = y.movedim(axis, 0).flatten(1)
            seen[name] = (flat.mean(1), flat.std(1, unbiased=False))

        return hook

    for name in layers:
        layer = network.get_submodule(name)
        layer.register_forward_hook(look(name, isinstance(layer, nn.Linear)))
    with torch.no_grad():
        run(network, batch)
    missing = [name for name in layers if name not in seen]
    if missing:
        raise LosslabError(f"layer {missing[0]!r} did not run on the examples: pass a run that uses it")
    return seen
