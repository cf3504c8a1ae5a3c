"""Plain chains of layers run straight through: what the tape does, and only where nothing is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import Case, stand
from torch import nn

from losslab.engine.backends import TapeBackend
from losslab.engine.chain import ACTIVATIONS, Chain
from losslab.engine.measured import Measured
from losslab.engine.template import Template
from losslab.tasks import Supervised, mlp

ENTROPY, SQUARES = Supervised(F.cross_entropy), Supervised(F.mse_loss)


def classes(g: torch.Generator, n: int) -> Any:
    return torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)


def targets(g: torch.Generator, n: int) -> Any:
    return torch.randn(n, 4, generator=g), torch.randn(n, 3, generator=g)


def images(g: torch.Generator, n: int) -> Any:
    return torch.randn(n, 1, 2, 2, generator=g), torch.randint(0, 3, (n,), generator=g)


def chain_of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


CHAINS = [
    Case("mlp", mlp(4, 6, 5, 3), classes, ENTROPY),
    Case("mse", mlp(4, 6, 3, activation="tanh"), targets, SQUARES),
    Case("one layer", lambda: nn.Linear(4, 3), classes, ENTROPY),
    Case("nested", lambda: chain_of(chain_of(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)), classes, ENTROPY),
    Case(
        "two activations",
        lambda: chain_of(nn.Linear(4, 6), nn.Tanh(), nn.Sigmoid(), nn.Linear(6, 3)),
        targets,
        SQUARES,
    ),
    Case("activation last", lambda: chain_of(nn.ReLU(), nn.Linear(4, 3), nn.Sigmoid()), targets, SQUARES),
    Case("no bias", lambda: chain_of(nn.Linear(4, 6, bias=False), nn.Linear(6, 3)), classes, ENTROPY),
    Case("images", lambda: chain_of(nn.Flatten(), nn.ReLU(), nn.Linear(4, 3)), images, ENTROPY),
    Case("batch norm", mlp(4, 6, 6, 3, batch_norm=True), classes, ENTROPY),
    Case(
        "batch norm first",
        lambda: chain_of(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)),
        classes,
        ENTROPY,
    ),
    *(
        Case(kind.__name__, lambda k=kind: chain_of(nn.Linear(4, 6), k(), nn.Linear(6, 3)), targets, SQUARES)
        for kind in ACTIVATIONS
    ),
]


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("mode", [None, True, False])
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_a_chain_does_what_the_tape_does(case: Case, private: bool, mode: bool | None) -> None:
    module = case.make().double()
    template = Template(module) if mode is None else Measured(module, mode)
    told = []
    for straight in (True, False):
        at, backend = stand(case, private), TapeBackend(template)
        given = [t.clone() for t in at.batch]
        if not straight:
            backend._chain = (case.loss, None)
        losses, gradients = backend.gradients(case.loss, at)
        assert (backend._chain[1] is not None) is straight
        assert all(map(torch.equal, given, at.batch))  # activations are written over values, not over data
        told.append((losses, dict(gradients), at.buffers))
    torch.testing.assert_close(told[0][0], told[1][0], rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(told[0][1:], told[1][1:], strict=True):
        assert list(mine) == list(theirs)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-11, atol=1e-13)


def hooked() -> nn.Module:
    made = mlp(4, 6, 3)()
    made[0].register_forward_hook(lambda module, given, found: 2 * found)
    return made


def patched() -> nn.Module:
    made = mlp(4, 6, 3)()
    made[1].forward = lambda x: x
    return made


def frozen() -> nn.Module:
    made = mlp(4, 6, 3)()
    made[0].bias.requires_grad_(False)
    return made


def tied() -> nn.Module:
    made = chain_of(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    made[2].weight = made[0].weight
    return made


class Doubling(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "hooks": (hooked, ENTROPY),
    "a forward of its own": (patched, ENTROPY),
    "frozen": (frozen, ENTROPY),
    "tied": (tied, ENTROPY),
    "a subclass": (lambda: Doubling(nn.Linear(4, 3)), ENTROPY),
    "dropout": (lambda: chain_of(nn.Dropout(), nn.Linear(4, 3)), ENTROPY),
    "cumulative": (lambda: chain_of(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)), ENTROPY),
    "an own loss": (mlp(4, 3), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])),
    "an own criterion": (mlp(4, 3), Supervised(lambda z, y: F.cross_entropy(z, y) ** 2)),
}


@pytest.mark.parametrize(("make", "loss"), OTHERS.values(), ids=OTHERS)
def test_whatever_is_more_than_a_chain_is_left_to_the_tape(make: Any, loss: Any) -> None:
    module = make()
    weights = {n: p.detach()[None] for n, p in module.named_parameters() if p.requires_grad}
    assert Chain.of(Template(module), loss, weights) is None


def test_targets_that_are_no_classes_go_to_the_tape_and_a_wrong_label_is_refused() -> None:
    case = Case("soft", mlp(4, 3), lambda g, n: (classes(g, n)[0], torch.rand(n, 3, generator=g)), ENTROPY)
    at, backend = stand(case, True), TapeBackend(Template(case.make().double()))
    with pytest.raises(Exception, match="this form of cross_entropy"):
        backend.gradients(case.loss, at)
    case = Case("labels", mlp(4, 3), lambda g, n: (classes(g, n)[0], torch.full((n,), 7)), ENTROPY)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        TapeBackend(Template(case.make().double())).gradients(case.loss, stand(case, True))
