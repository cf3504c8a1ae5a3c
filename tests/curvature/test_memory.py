"""Peak memory by resident size, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
from pathlib import Path
from losslab import supervised
from losslab.curvature import Hessian, eigenpairs
from losslab.engine import Objective, Points
from losslab.engine.memory import release_freed_memory
from losslab.tasks import mlp

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
x, y = torch.randn(4096, 784, generator=g), torch.randint(10, (4096,), generator=g)
module = mlp(784, 300, 100, 10, activation="tanh")()
points = Points.from_modules([module])
weights = list(module.parameters())


def status(name):
    with open("/proc/self/status") as told:
        return next(int(line.split()[1]) / 1024 for line in told if line.startswith(name))


def peak(call):
    release_freed_memory()  # else a call would fill what the one before it left
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def gradient():
    torch.autograd.grad(torch.nn.functional.cross_entropy(module(x), y), weights)


def pairs(n, strategy):
    task = supervised(lambda: module, (x[:n], y[:n]))
    eigenpairs(Hessian(Objective(task), points, strategy=strategy), 3, basis=20, tol=0.05)


gradient(), pairs(64, "kept")
print(peak(gradient), peak(lambda: pairs(4096, "recomputed")), peak(lambda: pairs(4096, "kept")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eigenpairs_stay_within_three_gradients_and_the_basis():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    gradient, recomputed, kept = map(float, done.stdout.split())
    assert gradient > 4  # MiB; the activations alone are more
    basis = 20 * 266_610 * 4 / 2**20
    assert kept - basis <= 3 * gradient
    assert recomputed - basis <= 2.2 * gradient
