"""Paths: what the loss looks like between places in weight space, and how to get from one to another.

A `Landscape` tells losses and errors at any stack of points. A `Slice` is a line, a plane or more, through
checkpoints or along directions; `measure_slice` measures it on a grid. `connect` finds paths between minima:
segments, trained curves, elastic bands, strings of beads; `explore` builds the tree of the lowest passes.
`permutation_spec` derives which units may change places, `match_weights` and its kin align networks, `repair`
mends their averages.
"""

from __future__ import annotations

from losslab.paths.auto_band import DRAXLER, SHORT, Cycle, auto_bands
from losslab.paths.bands import Band, relax, stretched, walk_bands
from losslab.paths.barriers import Barrier, barrier
from losslab.paths.combinations import as_points, combine, joined, lengths
from losslab.paths.connecting import METHODS, align, connect
from losslab.paths.curves import Curve, straight, train_curves, walk_curves
from losslab.paths.detours import detour
from losslab.paths.ensembles import ensemble_errors
from losslab.paths.grids import Grid, measure_slice
from losslab.paths.landscape import Landscape
from losslab.paths.levels import walk_level
from losslab.paths.matching import Alignment, match_activations, match_straight_through, match_weights
from losslab.paths.path import Path, Stage, walk
from losslab.paths.permutations import Axis, Spec, permutation_spec, verify
from losslab.paths.repair import repair, reset_batch_norm
from losslab.paths.slices import Slice, Trajectory, along, member_label, principal, random_slice, through
from losslab.paths.slopes import Slopes
from losslab.paths.strings import strings
from losslab.paths.trees import Tree, explore
from losslab.paths.work import Work

__all__ = [
    "DRAXLER",
    "METHODS",
    "SHORT",
    "Alignment",
    "Axis",
    "Band",
    "Barrier",
    "Curve",
    "Cycle",
    "Grid",
    "Landscape",
    "Path",
    "Slice",
    "Slopes",
    "Spec",
    "Stage",
    "Trajectory",
    "Tree",
    "Work",
    "align",
    "along",
    "as_points",
    "auto_bands",
    "barrier",
    "combine",
    "connect",
    "detour",
    "ensemble_errors",
    "explore",
    "joined",
    "lengths",
    "match_activations",
    "match_straight_through",
    "match_weights",
    "measure_slice",
    "member_label",
    "permutation_spec",
    "principal",
    "random_slice",
    "relax",
    "repair",
    "reset_batch_norm",
    "straight",
    "stretched",
    "strings",
    "through",
    "train_curves",
    "verify",
    "walk",
    "walk_bands",
    "walk_curves",
    "walk_level",
]
