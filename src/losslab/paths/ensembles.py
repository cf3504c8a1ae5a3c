"""What networks along a path are worth together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losslab.engine.measured import without_dropout
from losslab.errors import LosslabError
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path
from losslab.tasks import Batch, Supervised


def ensemble_errors(landscape: Landscape, path: Path) -> dict[str, Tensor]:
    """Errors of ensembles that average the class probabilities of networks on a path.

    Networks that are near each other make the same mistakes; how soon an ensemble of the start and a point
    further on gains anything is a measure of how different the path's networks are (Garipov et al. 2018,
    section 5).

    Args:
        landscape: Of a classification task; its data sets and its batch-norm policy.
        path: The path.

    Returns:
        Name -> ``[T]``: of each data set the error of the start and point t together (``test_with_start``),
        and of all points up to t (``test_so_far``).

    Raises:
        LosslabError: The task is no classification made by `losslab.supervised`.
    """
    loss, metrics = landscape.task.loss, landscape.task.metrics
    if not isinstance(loss, Supervised) or metrics is None:
        raise LosslabError(
            f"the task {landscape.task.name!r} has no classes to vote on: make it with losslab.supervised"
        )

    def fn(module: nn.Module, batch: Batch) -> Tensor:
        return torch.softmax(loss.outputs(module, batch), -1)

    voted = without_dropout(fn)
    points = landscape.train.settled(path.points)
    found: dict[str, Tensor] = {}
    for prefix, objective in landscape.sets.items():
        for execution, at, share in objective.pieces(points):
            with torch.no_grad():
                votes = execution.run(voted, at, training=False).double()
            for name, together in (("with_start", votes[:1] + votes), ("so_far", votes.cumsum(0))):
                wrong = (together.argmax(-1) != at.batch[1]).double().mean(1)
                wrong = wrong.masked_fill(together.isnan().any(-1).any(-1), torch.nan).cpu() * share
                found[prefix + name] = found.get(prefix + name, torch.zeros(len(votes))) + wrong
    return found
