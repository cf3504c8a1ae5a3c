"""Tasks: what is minimised, and on what.

A :class:`Task` is a model factory, a loss that is the mean over a batch's examples, and :class:`Data` in
memory. This room makes tasks from the user's tensors, data sets and files, checks them before a run, and
holds the ready ones: digits, MNIST and CIFAR-10, synthetic problems of known curvature, functions of a few
variables, and the networks.
"""

from losslab.tasks.catalogue import CATALOGUE, cifar10_task, digits_task, mnist_task
from losslab.tasks.check import build, check, check_module, unrecomputed
from losslab.tasks.data import Data
from losslab.tasks.functions import (
    Function,
    double_well,
    function_task,
    octopus,
    rosenbrock,
    saddle,
)
from losslab.tasks.load import load_task
from losslab.tasks.models import (
    ACTIVATIONS,
    MODELS,
    Factory,
    conv2,
    conv4,
    conv6,
    lenet_300_100,
    linear_net,
    linear_resnet,
    logistic_regression,
    mlp,
    resnet20,
    vgg,
    vgg11,
    vgg13,
)
from losslab.tasks.nest import Nest, leaves, map_nest
from losslab.tasks.problems import (
    Quadratic,
    half_mse,
    linear_regression,
    quadratic,
    sparse_classification,
    teacher_student,
)
from losslab.tasks.sources import Splits, cifar10, digits, mnist
from losslab.tasks.task import Batch, Supervised, Task, supervised

__all__ = [
    "ACTIVATIONS",
    "CATALOGUE",
    "MODELS",
    "Batch",
    "Data",
    "Factory",
    "Function",
    "Nest",
    "Quadratic",
    "Splits",
    "Supervised",
    "Task",
    "build",
    "check",
    "check_module",
    "cifar10",
    "cifar10_task",
    "conv2",
    "conv4",
    "conv6",
    "digits",
    "digits_task",
    "double_well",
    "function_task",
    "half_mse",
    "leaves",
    "lenet_300_100",
    "linear_net",
    "linear_regression",
    "linear_resnet",
    "load_task",
    "logistic_regression",
    "map_nest",
    "mlp",
    "mnist",
    "mnist_task",
    "octopus",
    "quadratic",
    "resnet20",
    "rosenbrock",
    "saddle",
    "sparse_classification",
    "supervised",
    "teacher_student",
    "unrecomputed",
    "vgg",
    "vgg11",
    "vgg13",
]
