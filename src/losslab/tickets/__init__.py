"""Lottery tickets: which weights a network can do without, and whether what is left trains as well.

`lottery` runs a `Plan`: prune by a criterion (`CRITERIA`) within a `Scope`, go back to earlier weights, and
train again beside controls (`CONTROLS`); all arms and replicates of a level are one population, and tickets
are judged by paired intervals. `instability` asks whether training is stable to the order of its batches.
`with_torch_masks`, `compact` and `speed` turn a ticket into an ordinary, or a smaller, network.
"""

from __future__ import annotations

from losslab.tickets.controls import CONTROLS, smaller
from losslab.tickets.criteria import CRITERIA, Criterion, Evidence, criterion
from losslab.tickets.experiment import lottery, reopened
from losslab.tickets.extracting import Compacted, Speed, compact, speed, with_torch_masks
from losslab.tickets.outcome import Lottery, Outcome
from losslab.tickets.plan import Plan, held_out
from losslab.tickets.prunable import Layers, kept, prunable
from losslab.tickets.scopes import Scope
from losslab.tickets.stability import instability, stability_sentences, stability_summary

__all__ = [
    "CONTROLS",
    "CRITERIA",
    "Compacted",
    "Criterion",
    "Evidence",
    "Layers",
    "Lottery",
    "Outcome",
    "Plan",
    "Scope",
    "Speed",
    "compact",
    "criterion",
    "held_out",
    "instability",
    "kept",
    "lottery",
    "prunable",
    "reopened",
    "smaller",
    "speed",
    "stability_sentences",
    "stability_summary",
    "with_torch_masks",
]
