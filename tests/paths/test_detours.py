"""Exact ways by an idle unit: constant loss, the right end, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losslab.engine import Objective, Points
from losslab.errors import LosslabError
from losslab.paths import detour, permutation_spec


class Residual(nn.Module):
    """A stream of four units with batch norm: each unit is written twice and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.block, self.out = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.into(x))
        return self.out(x + self.block(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


def silenced(network: nn.Module, unit: int) -> nn.Module:
    with torch.no_grad():
        if isinstance(network, Residual):
            network.block[0].weight[:, unit] = network.out.weight[:, unit] = 0.0
        elif isinstance(network[0], nn.Conv1d):
            network[3].weight[:, 2 * unit : 2 * unit + 2] = 0.0
        else:
            network[2].weight[:, unit] = 0.0
    return network


@pytest.mark.parametrize("make", [plain, convolutional, Residual])
def test_nothing_changes_on_the_way_and_the_units_have_changed_places(make):
    torch.manual_seed(0)
    network = silenced(make().double().eval(), 3)
    x = torch.randn(6, 1, 3) if make is convolutional else torch.randn(6, 3)
    x = x.double()
    spec = permutation_spec(network, x)
    group = max(spec.groups, key=lambda name: spec.groups[name] == 4)
    points = Points.from_modules([network])
    curve = detour(spec, points, group, 0, 2, 3)
    t = torch.linspace(0, 1, 71, dtype=torch.float64)
    for k in range(len(t)):
        there = curve.at(t[k : k + 1]).load_into(make().double().eval(), 0)
        torch.testing.assert_close(there(x), network(x), rtol=1e-12, atol=1e-12)
    end = curve.control.select([7])
    swapped = spec.permute(points, spec.swap(group, 0, 2))
    assert all(torch.equal(end[name], swapped[name]) for name in end)
    assert len(curve.control.matrix().unique(dim=0)) == 8


def test_the_loss_at_its_corners_is_one_number():
    from losslab.tasks import teacher_student

    task = teacher_student(2, 2, 3, 20, dtype=torch.float64)
    points = Points.from_modules([silenced_last(task.model())])
    curve = detour(permutation_spec(task), points, "0", 0, 1, 2)
    losses = Objective(task).value(curve.control)
    torch.testing.assert_close(losses, losses[:1].expand(8), rtol=1e-12, atol=0)


def silenced_last(network):
    with torch.no_grad():
        network[2].weight[:, -1] = 0.0
    return network


@pytest.mark.parametrize(
    ("units", "members", "told"),
    [
        ((0, 1, 2), 1, "in use"),
        ((0, 1, 1), 1, "idle"),
        ((0, 1, 9), 1, "idle"),
        ((0, 0, 3), 1, "exchanged"),
        ((0, 1, 3), 2, "one"),
    ],
)
def test_bad_input(units, members, told):
    network = silenced(plain(), 3)
    points = Points.from_modules([network] * members)
    with pytest.raises(LosslabError, match=told):
        detour(permutation_spec(network, torch.randn(4, 3)), points, "0", *units)
