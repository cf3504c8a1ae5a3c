"""Signals: what flows through a network, forward and backward.

`flow` runs N networks once on a private copy and gives every layer's output and the loss's gradient with
respect to it; the other instruments are functions of flows. Nothing here touches the network it is given.
"""

from __future__ import annotations

from losslab.signals import mean_field
from losslab.signals.along_gradient import Smoothness, SmoothnessRecorder, smoothness
from losslab.signals.describing import describe
from losslab.signals.diagnosis import Note, drifted, notes
from losslab.signals.distances import drift, histogram_distance, shift_in_distribution, wasserstein
from losslab.signals.flows import Flow, Instrument, flow
from losslab.signals.jacobians import singular_values
from losslab.signals.recorder import Recorder
from losslab.signals.shift import GradientShift, gradient_shift
from losslab.signals.statistics import (
    Histogram,
    dead,
    histogram,
    moments,
    percentiles,
    saturated,
    update_ratio,
)
from losslab.signals.table import SignalTable, signals

__all__ = [
    "Flow",
    "GradientShift",
    "Histogram",
    "Instrument",
    "Note",
    "Recorder",
    "SignalTable",
    "Smoothness",
    "SmoothnessRecorder",
    "dead",
    "describe",
    "drift",
    "drifted",
    "flow",
    "gradient_shift",
    "histogram",
    "histogram_distance",
    "mean_field",
    "moments",
    "notes",
    "percentiles",
    "saturated",
    "shift_in_distribution",
    "signals",
    "singular_values",
    "smoothness",
    "update_ratio",
    "wasserstein",
]
