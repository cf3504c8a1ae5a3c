"""Batch norm in and out of networks of every kind; the network given stays as it is."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.layers import BatchNorm, NoisyBatchNorm, fold, with_batchnorm, without_batchnorm
from losslab.layers.batchnorm import is_batchnorm
from losslab.tasks import Factory, conv4, mlp, resnet20

IMAGE = (3, 8, 8)
MODELS = [
    (mlp(4, 6, 5, 3), (4,), 2),
    (mlp(4, 6, 5, 3, batch_norm=True), (4,), 2),
    (conv4(size=8), IMAGE, 6),
    (resnet20(), IMAGE, 19),
    (resnet20(batch_norm=False), IMAGE, 19),
]
every_model = pytest.mark.parametrize(("factory", "shape", "norms"), MODELS, ids=[repr(m[0]) for m in MODELS])


class Named(nn.Module):
    """Layers by name, activations by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 64, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.out(torch.tanh(self.hidden(x.flatten(1))))


def build(factory: Factory | type[nn.Module]) -> nn.Module:
    with seeded(0, "switching"):
        return factory()


def inputs(*shape: int) -> Tensor:
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    return sum(is_batchnorm(m) for m in model.modules())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@every_model
def test_every_layer_but_the_last_is_normalised(factory: Factory, shape: tuple[int, ...], norms: int) -> None:
    model = build(factory)
    before, text = state(model), repr(model)
    normalised = with_batchnorm(model)
    assert count(normalised) == norms
    assert normalised.training
    normalised(inputs(*shape)).sum().backward()
    assert all(p.grad is not None for p in normalised.parameters())
    biases = [n for n, m in normalised.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert [normalised.get_submodule(n).bias is None for n in biases] == [True] * (len(biases) - 1) + [False]
    # the module given has not moved
    assert repr(model) == text
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@every_model
def test_there_and_back(factory: Factory, shape: tuple[int, ...], norms: int) -> None:
    model = build(factory)
    plain = without_batchnorm(model)
    assert count(plain) == 0
    plain(inputs(*shape))
    again = with_batchnorm(plain)
    assert count(again) == norms
    without = without_batchnorm(again)
    assert {n: t.shape for n, t in state(without).items()} == {n: t.shape for n, t in state(plain).items()}
    for name, tensor in state(without).items():  # weights are kept, biases come back as zeros
        wanted = state(plain)[name]
        last = name == list(state(plain))[-1]
        assert torch.equal(tensor, wanted if tensor.dim() > 1 or last else torch.zeros_like(wanted)), name


def test_sequentials_come_out_as_the_models_are_written() -> None:
    plain, normalised = build(mlp(4, 6, 5, 3)), build(mlp(4, 6, 5, 3, batch_norm=True))
    assert list(state(with_batchnorm(plain, nn.BatchNorm1d))) == list(state(normalised))
    assert list(state(without_batchnorm(normalised))) == list(state(plain))
    assert repr(with_batchnorm(plain, nn.BatchNorm1d)) == repr(normalised)


def test_layers_by_name_and_named_sequentials() -> None:
    model = with_batchnorm(build(Named))
    assert [n for n, m in model.named_modules() if is_batchnorm(m)] == ["conv.1", "hidden.1"]
    model(inputs(*IMAGE))
    assert list(state(without_batchnorm(model))) == list(state(build(Named)))
    named = nn.Sequential(OrderedDict(first=nn.Linear(4, 3), act=nn.ReLU(), last=nn.Linear(3, 2)))
    assert [n for n, _ in with_batchnorm(named).named_children()] == ["first", "first_norm", "act", "last"]


def test_norms_are_made_to_order_and_replaced_with_their_state() -> None:
    model = build(resnet20())
    for step in range(3):
        model(inputs(*IMAGE) + step)
    ours = with_batchnorm(model, BatchNorm)
    assert sum(isinstance(m, BatchNorm) for m in ours.modules()) == 19
    assert list(state(ours)) == list(state(model))
    x = inputs(*IMAGE)
    for mode in (False, True):
        torch.testing.assert_close(ours.train(mode)(x), model.train(mode)(x))
    noisy = with_batchnorm(ours, lambda n: NoisyBatchNorm(n, ghost=2)).eval()
    assert sum(isinstance(m, NoisyBatchNorm) for m in noisy.modules()) == 19
    torch.testing.assert_close(noisy(x), ours.eval()(x))
    bare = with_batchnorm(model, lambda n: BatchNorm(n, affine=False))
    assert not any("norm1.weight" in n for n in state(bare))


def test_mode_dtype_and_shared_layers_are_kept() -> None:
    model = build(mlp(4, 6, 3)).double().eval()
    normalised = with_batchnorm(model)
    assert not any(m.training for m in normalised.modules())
    assert normalised(inputs(4).double()).dtype == torch.float64
    shared = nn.Linear(4, 4)
    tied = with_batchnorm(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 2)))
    assert tied[0] is tied[3]
    assert tied[1] is tied[4]


def test_attention_is_left_alone() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(24, 6), nn.Linear(6, 2))
    normalised = with_batchnorm(model)
    assert count(normalised) == 1
    normalised(inputs(3, 8))


def test_a_single_layer_is_the_last_and_a_single_norm_goes() -> None:
    assert repr(with_batchnorm(nn.Linear(3, 2))) == repr(nn.Linear(3, 2))
    assert isinstance(without_batchnorm(nn.BatchNorm1d(3)), nn.Identity)
    assert without_batchnorm(nn.Linear(3, 2, bias=False)).bias is None


def test_layers_with_parametrised_weights_are_layers() -> None:
    given = nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), weight_norm(nn.Conv1d(6, 2, 1)))
    changed = with_batchnorm(given)
    assert [is_batchnorm(part) for part in changed] == [False, True, False, False]
    assert {n for n, _ in changed.named_parameters()} >= {"0.parametrizations.weight.original0", "1.weight"}
    assert changed[0](torch.ones(2, 4)).shape == (2, 6)
    assert [type(part) for part in without_batchnorm(changed)] == [type(part) for part in given]


def test_features_on_the_last_axis_are_told() -> None:
    model = with_batchnorm(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    with pytest.raises(LosslabError, match=r"shape \(3, 5, 6\).* features are the second axis, so transpose"):
        model(torch.ones(3, 5, 4))
    with pytest.raises(LosslabError, match="give it as many features as the layer before has outputs"):
        BatchNorm(6)(torch.ones(3, 5))


@pytest.mark.parametrize("change", [with_batchnorm, without_batchnorm, fold])
def test_what_is_no_network_is_told(change: Any) -> None:
    with pytest.raises(LosslabError, match="the network is a int: pass a torch"):
        change(3)
    with pytest.raises(LosslabError, match="lazy layers without weights yet: run a batch"):
        change(nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2)))
