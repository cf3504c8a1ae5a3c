"""Specs derived from the code: the groups they find, and that a permuted network is the network."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.paths.cases import blobs, trained
from tests.paths.networks import NETWORKS
from torch import nn

from losslab.engine import Points
from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.paths import Axis, Spec, permutation_spec, verify
from losslab.tasks import Task, mlp


def built(network) -> nn.Module:
    with seeded(3, "permutations"):
        module = network.make().double()
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)))
    return module


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_permuted_network_is_the_network(network):
    module, x = built(network), network.inputs()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    spec = permutation_spec(module, x)
    assert sorted(spec.groups.values()) == sorted(network.groups)
    assert verify(spec, module, x) < 1e-12
    points = Points.from_modules([module])
    for training in (False, True):  # in both modes, on inputs that the derivation has not seen
        fresh = network.inputs(9)
        for seed in range(3):
            moved = spec.permute(points, spec.random(seed)).load_into(copy.deepcopy(module), 0)
            outputs = [copy.deepcopy(m).train(training) for m in (module, moved)]
            for m in outputs:
                for layer in m.modules():
                    if isinstance(layer, (nn.Dropout, nn.MultiheadAttention)):
                        layer.train(False)
            a, b = (m(fresh) for m in outputs)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    moved = spec.permute(points, spec.random(0))
    for name, size in spec.groups.items():  # every group does move something
        only = spec.permute(points, {name: torch.arange(size).roll(1)})
        assert any(not torch.equal(only[n], points[n]) for n in points)
    assert not torch.equal(moved.matrix(), points.matrix())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_permuting_the_incoming_rows_alone_changes_the_outputs():
    module = mlp(4, 8, 3)().double()
    wrong = Spec.of({"hidden": [("0.weight", 0), ("0.bias", 0)]}, module)
    right = Spec.of({"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}, module)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert verify(wrong, module, x) > 1e-2
    assert verify(right, module, x) < 1e-14
    derived = permutation_spec(module, x)
    assert derived.axes == {
        n: tuple(Axis(a.size, a.group and "0") for a in axes) for n, axes in right.axes.items()
    }


def test_what_is_not_understood_is_named_and_stays():
    spec = permutation_spec(built(NETWORKS[11]), NETWORKS[11].inputs())
    assert "cumsum" in spec.notes[0]
    with pytest.raises(LosslabError, match=r"lstm is not understood.*give one by hand"):
        permutation_spec(nn.LSTM(4, 5), torch.randn(2, 3, 4))
    with pytest.raises(LosslabError, match="no units of Linear"):
        permutation_spec(nn.Linear(3, 2), torch.randn(2, 3))


class Lying(nn.Module):
    """Its code asks about values, which no trace of shapes can see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x).relu()
        scale = torch.arange(1.0, 6.0, dtype=h.dtype).tolist()
        weighted = sum(s * column for s, column in zip(scale, h.numpy(force=True).T, strict=True))
        return self.c(self.b(h).relu()) + torch.as_tensor(weighted)[:, None]


def test_a_group_that_changes_the_outputs_is_found_out():
    spec = permutation_spec(Lying(), torch.randn(5, 4))
    assert list(spec.groups) == ["b"]
    assert "permuting a changes the outputs" in spec.notes[0]


def test_a_task_and_a_population_know_their_examples():
    for source in (blobs(), trained(), trained(True)):
        assert sorted(permutation_spec(source).groups.values()) == [12, 12]
    x = torch.randn(8, 4)
    auto = Task(mlp(4, 6, 4), lambda m, b: (m(b) - b).square().mean(), x)  # only its loss can be asked
    assert permutation_spec(auto).groups == {"0": 6}


def test_axes_of_products_and_sums():
    heads, units = Axis(2, "h"), Axis(3, "d")
    axis = Axis(6, kind="product", parts=(heads, units))
    order = axis.order({"h": torch.tensor([1, 0]), "d": torch.tensor([2, 0, 1])})
    assert order.tolist() == [5, 3, 4, 2, 0, 1]
    assert axis.entries("h").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert axis.entries("d").tolist() == [[0, 3], [1, 4], [2, 5]]
    both = Axis(8, kind="sum", parts=(Axis(2), axis))
    assert both.order({"h": torch.tensor([1, 0])}).tolist() == [0, 1, 5, 6, 7, 2, 3, 4]
    assert both.entries("d").tolist() == [[2, 5], [3, 6], [4, 7]]
    assert both.groups() == {"h", "d"}


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (
            lambda m, s: s.permute(Points.from_modules([m]), {"0": torch.tensor([0, 0, 1, 2])}),
            "no permutation",
        ),
        (lambda m, s: s.permute(Points.from_modules([m]), {"1": torch.arange(4)}), "group of units"),
        (lambda m, s: s.swap("0", 1, 1), "exchanged"),
        (lambda m, s: s.swap("7", 1, 2), "group of units"),
        (lambda m, s: s.random(groups=["x"]), "group of units"),
        (lambda m, s: Spec.of({"h": [("0.wait", 0)]}, m), "did you mean '0.weight'"),
        (lambda m, s: Spec.of({"h": [("0.weight", 2)]}, m), "axes"),
        (lambda m, s: Spec.of({"h": [("0.weight", 0), ("2.weight", 0)]}, m), "4 units"),
        (lambda m, s: permutation_spec(m), "without examples"),
        (lambda m, s: permutation_spec("net"), "no units"),
    ],
)
def test_bad_input(run, told):
    module = mlp(3, 4, 2)()
    with pytest.raises(LosslabError, match=told):
        run(module, permutation_spec(module, torch.randn(5, 3)))
