"""What kind of point: closed forms, every verdict, and the same one at any scale of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from losslab import LosslabError
from losslab.curvature.critical import Kind, examine, kinked
from losslab.engine import Objective, Points
from losslab.tasks import Function, Task, function_task, half_mse, linear_net, mlp, supervised


def function(f: object, dimension: int = 2) -> Objective:
    told = Function("f", f, dimension, (0.0,) * dimension, ((-1.0, 1.0),) * dimension, (), (), "")  # type: ignore[arg-type]
    return Objective(function_task(told))


def at(*rows: list[float]) -> Points:
    return Points({"x": torch.tensor(rows, dtype=torch.float64)}, {})


def quartic(x: Tensor) -> Tensor:
    return x[..., 0] ** 2 / 2 - x[..., 1] ** 2 / 2 + x[..., 1] ** 4 / 4


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("exact", [True, False])
def test_kinds_of_points_whatever_the_scale(scale: float, exact: bool) -> None:
    def f(x: Tensor) -> Tensor:
        return scale * (quartic(x) + 3 * x[..., 2:].square().sum(-1))

    zeros = [0.0] * 6
    points = at([0, 0, *zeros], [0, 1, *zeros], [1e-9, 1, *zeros], [0.5, 0.5, *zeros])
    found = examine(function(f, 8), points, dense_up_to=1500 if exact else 0)
    assert found.kinds == ["strict saddle", "minimum", "minimum", "not critical"]
    assert found.exact == exact
    assert found.index.tolist()[:2] == [1, 0]
    torch.testing.assert_close(
        found.smallest[:2], scale * torch.tensor([-1.0, 1.0]).double(), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        found.largest[:2], scale * torch.tensor([6.0, 6.0]).double(), rtol=1e-3, atol=0
    )
    assert found.fall[0] == pytest.approx(1.0, abs=0.02)
    assert found.fall[1].isnan()
    assert found.mismatch[0] < 1e-3
    assert found.escape[0, 1].abs() == pytest.approx(1.0, abs=1e-6)


def test_maxima_flat_points_and_zeros() -> None:
    hill = examine(function(lambda x: -x.square().sum(-1)), at([0.0, 0.0]))
    assert hill.kinds == [Kind.MAXIMUM]
    flat = examine(function(lambda x: 1 + x[..., 0] ** 3 * x[..., 1]), at([0.0, 0.0]))
    assert flat.kinds == [Kind.FLAT]
    valley = examine(function(lambda x: x[..., 0] ** 2 + 0 * x[..., 1]), at([0.0, 3.0]))
    assert valley.kinds == [Kind.MINIMUM]
    assert valley.zeros.tolist() == [1]


def test_the_origin_of_a_linear_network_is_strict_for_two_layers_and_flat_for_three() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for depth, kind in ((2, Kind.SADDLE), (3, Kind.FLAT)):
        task = supervised(linear_net(*[3] * (depth + 1)).to(torch.float64), (x, x), criterion=half_mse)
        zero = Points.from_modules([task.model()]).map(torch.zeros_like)
        assert examine(Objective(task), zero).kinds == [kind]


def test_bounds_on_both_sides_of_the_tolerance_are_undecided() -> None:
    # In float32 the Hessian's own rounding is larger than the tolerance asked for.
    f = function(lambda x: x[..., 0] ** 2 * 1e4 - 1e-4 * x[..., 1] ** 2)
    point = Points({"x": torch.zeros(1, 2)}, {})
    assert examine(f, point, curvature_tolerance=1e-12).kinds == [Kind.UNDECIDED]
    assert examine(f, point).kinds == [Kind.MINIMUM]


def test_kinks_are_named_and_seen() -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.bend = nn.ReLU()

        def forward(self) -> Tensor:
            return self.x[0] ** 2 - 0.5 * self.x[1] ** 2 + self.bend(self.x[1] - 1e-7) * 5

    objective = Objective(Task(Bent, lambda model, batch: model(), None))
    found = examine(objective, Points.from_modules([Bent()]))
    assert found.kinds == [Kind.SADDLE]
    assert found.kinks == ("ReLU",)
    assert found.mismatch[0] > 1
    assert "ReLU have kinks, across which second derivatives say nothing" in str(found)
    assert kinked(Objective(supervised(mlp(2, 2, 1, activation="tanh"), (torch.ones(2, 2), torch.ones(2, 1)),
                                       criterion=half_mse))) == ()  # fmt: skip


def test_the_table_has_a_row_a_point() -> None:
    found = examine(function(quartic), at([0.0, 0.0], [0.0, 1.0]))
    table = found.table()
    assert table.kind.tolist() == ["strict saddle", "minimum"]
    assert len(found) == len(table) == 2
    assert str(found) == "1 strict saddle, 1 minimum"


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LosslabError, match="not finite"):
        examine(function(quartic), at([float("nan"), 0.0]))
