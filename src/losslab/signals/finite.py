"""Whether what flows is finite, and where it stops to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.tasks.nest import leaves
from losslab.tasks.task import Batch

if TYPE_CHECKING:
    from losslab.signals.flows import Flow


def check_finite(seen: Flow, batch: Batch, diverged: Tensor) -> None:
    """Raises where a flow has values that are not finite: in the batch, or where they first appear.

    Args:
        seen: The flow.
        batch: The examples.
        diverged: Members that are known to be lost, ``[N]``.

    Raises:
        LosslabError: What is not finite, and what to do about it.
    """
    for t in leaves(batch):
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise LosslabError(
                f"the batch holds {int((~torch.isfinite(t)).sum())} values that are not finite: mend the data"
            )
    for name, output in seen.outputs.items():
        finite = torch.isfinite(output).flatten(1)
        bad = ~finite.all(1) & ~diverged
        if bool(bad.any()):
            member = int(bad.nonzero()[0])
            entered = seen.inputs.get(name)
            if entered is not None and not bool(torch.isfinite(entered[member]).all()):
                raise LosslabError(
                    f"layer {name!r} is given values that are not finite for member {member}: mend what the "
                    "network does before it (a logarithm or a root of what is not positive, a division by 0)"
                )
            raise LosslabError(
                f"layer {name!r} gives {int((~finite[member]).sum())} of {finite.shape[1]} values that are "
                f"not finite for member {member} (so do {int(bad.sum())} of {len(bad)} members): start from "
                "smaller weights, take a smaller learning rate, or look at an earlier step"
            )
