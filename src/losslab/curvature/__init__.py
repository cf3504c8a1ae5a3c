"""Curvature: what the loss looks like around a point.

Second derivatives of an `Objective` as products with vectors (`Hessian`, `GaussNewton`, `EmpiricalFisher`),
their `eigenpairs` with residuals and bounds, the `density` of the spectrum, `trace` and `diagonal` with
intervals, the `condition` number and the table `by_layer`.

Critical points: `minimise`, `flatten`, `refine` and `follow` find them, N searches at once; `examine` says of
each what it is. `CurvatureMonitor` watches sharpness and its relatives through training, at a stated cost.
"""

from __future__ import annotations

from losslab.curvature.critical import Critical, Kind, examine
from losslab.curvature.density import Density, density
from losslab.curvature.eigen import Eigenpairs, NotConverged, eigenpairs
from losslab.curvature.finding import Found, flatten, follow, minimise, refine
from losslab.curvature.monitor import CurvatureMonitor
from losslab.curvature.operator import Operator
from losslab.curvature.probes import Estimate
from losslab.curvature.products import EmpiricalFisher, GaussNewton, Hessian
from losslab.curvature.stability import Limit, Preconditioned, limit_of
from losslab.curvature.summary import Condition, by_layer, condition, stability_sentence
from losslab.curvature.trace import diagonal, trace

__all__ = [
    "Condition",
    "Critical",
    "CurvatureMonitor",
    "Density",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "Found",
    "GaussNewton",
    "Hessian",
    "Kind",
    "Limit",
    "NotConverged",
    "Operator",
    "Preconditioned",
    "by_layer",
    "condition",
    "density",
    "diagonal",
    "eigenpairs",
    "examine",
    "flatten",
    "follow",
    "limit_of",
    "minimise",
    "refine",
    "stability_sentence",
    "trace",
]
