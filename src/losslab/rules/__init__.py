"""The update rules: optimizers as values.

A `Rule` holds hyperparameters and no state. ``rule.init(weights)`` makes the state and
``rule.update(gradients, state, weights, step)`` returns new weights and new state for N networks at once:
weights are name -> tensor ``[N, ...]``, and any hyperparameter is one number, one number a member, or a
function of the step (`schedules`). Each family writes its equation once, from its source, with every form of
it that goes by the same name as a variant. `make` finds a rule by name, `stepper` gives the in-place update
through torch's fused kernels, and ``rule.as_torch(parameters)`` is a `torch.optim.Optimizer`.
"""

from __future__ import annotations

from losslab.rules import schedules
from losslab.rules.adagrad import AdaGrad, FullAdaGrad
from losslab.rules.adam import Adam, AdaMax, AdamNC, AMSGrad
from losslab.rules.adapter import TorchOptimizer
from losslab.rules.auto_rate import AutoRate
from losslab.rules.cubic import CubicNewton
from losslab.rules.curvature import Curvature, Landscape
from losslab.rules.descent import GD, SGD
from losslab.rules.fused import Stepper, stepper
from losslab.rules.gauss_newton import DiagonalLM, GaussNewton
from losslab.rules.momentum import Momentum, Nesterov
from losslab.rules.newton import Newton, SaddleFree
from losslab.rules.newton_cg import NewtonCG
from losslab.rules.perturbed import PerturbedGD
from losslab.rules.registry import RULES, Page, make, page, table
from losslab.rules.rmsprop import RMSProp
from losslab.rules.rule import Hyper, Rule, Schedule, State, Weights, member_norm

__all__ = [
    "GD",
    "RULES",
    "SGD",
    "AMSGrad",
    "AdaGrad",
    "AdaMax",
    "Adam",
    "AdamNC",
    "AutoRate",
    "CubicNewton",
    "Curvature",
    "DiagonalLM",
    "FullAdaGrad",
    "GaussNewton",
    "Hyper",
    "Landscape",
    "Momentum",
    "Nesterov",
    "Newton",
    "NewtonCG",
    "Page",
    "PerturbedGD",
    "RMSProp",
    "Rule",
    "SaddleFree",
    "Schedule",
    "State",
    "Stepper",
    "TorchOptimizer",
    "Weights",
    "make",
    "member_norm",
    "page",
    "schedules",
    "stepper",
    "table",
]
