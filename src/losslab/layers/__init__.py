"""Layers: how a network is normalised, and where its weights start.

Batch normalisation in the forms that its claims compare (`BatchNorm`, `NoisyBatchNorm`), and functions that
put it into any model, take it out, or fold it away. They are ordinary torch modules: alone they act as
torch's, in a population each member keeps its own statistics. Where weights start is a value too
(`xavier`, `he`, `lsuv`, ...), applied to a module or put on a task's model; `standardise` and `whiten` scale
the inputs.
"""

from losslab.layers.batchnorm import BatchNorm
from losslab.layers.folding import fold
from losslab.layers.initialisation import (
    Initialisation,
    gain_of,
    gaussian,
    he,
    he_uniform,
    lecun,
    lecun_uniform,
    orthogonal,
    standard,
    xavier,
    xavier_uniform,
)
from losslab.layers.noisy import NoisyBatchNorm
from losslab.layers.population import population_statistics
from losslab.layers.scaling import Affine, standardise, whiten
from losslab.layers.switching import with_batchnorm, without_batchnorm
from losslab.layers.unit_variance import InitialisationNotice, lsuv

__all__ = [
    "Affine",
    "BatchNorm",
    "Initialisation",
    "InitialisationNotice",
    "NoisyBatchNorm",
    "fold",
    "gain_of",
    "gaussian",
    "he",
    "he_uniform",
    "lecun",
    "lecun_uniform",
    "lsuv",
    "orthogonal",
    "population_statistics",
    "standard",
    "standardise",
    "whiten",
    "with_batchnorm",
    "without_batchnorm",
    "xavier",
    "xavier_uniform",
]
