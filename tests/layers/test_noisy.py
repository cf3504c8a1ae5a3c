"""The moments of the noise, and whose noise it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.layers import BatchNorm, NoisyBatchNorm

UNITS, EXAMPLES = 4000, 50


def noise(shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Plain outputs and, per unit and example, the scale and the shift of two positions' worth of noise."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = BatchNorm(shape[1]).double()(x).detach()
    with seeded(3, "noise"):
        y = NoisyBatchNorm(shape[1], **options).double()(x).detach()
    scale = (y[..., 1] - y[..., 0]) / (plain[..., 1] - plain[..., 0])
    return plain, scale, y[..., 0] - scale * plain[..., 0]


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_moments_of_scale_and_shift(strength: float) -> None:
    _, scale, shift = noise((EXAMPLES, UNITS, 2), strength=strength)
    centre, spread = shift.mean(0), shift.std(0)
    assert float(centre.mean()) == pytest.approx(0, abs=0.03 * strength)
    assert float(centre.var()) == pytest.approx(strength**2 * (0.5**2 / 3 + 0.1**2 / 3 / EXAMPLES), rel=0.05)
    assert float(centre.abs().max()) < 0.55 * strength
    assert float(spread.mean()) == pytest.approx(strength * 0.1 / 3**0.5, rel=0.02)
    assert float((shift - centre).abs().max()) < 0.2 * strength  # uniform, not normal
    level, jitter = scale.mean(0), scale.std(0)
    assert float(level.mean()) == pytest.approx(1 + strength * 0.125, rel=0.01)
    assert float(level.var()) == pytest.approx(strength**2 * (0.25**2 / 12 + 0.1**2 / EXAMPLES), rel=0.06)
    assert float(jitter.mean()) == pytest.approx(strength * 0.1, rel=0.02)
    assert float((scale - level).abs().max()) > 0.35 * strength  # normal, not uniform


def test_positions_of_a_channel_share_the_draw_and_examples_do_not() -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = BatchNorm(3).double()(x).detach()
    y = NoisyBatchNorm(3).double()(x).detach()
    design = torch.stack([plain.flatten(2), torch.ones(6, 3, 16, dtype=torch.float64)], -1)
    fit = torch.linalg.lstsq(design, y.flatten(2).unsqueeze(-1)).solution
    torch.testing.assert_close((design @ fit).squeeze(-1), y.flatten(2))
    assert len(fit[:, 0, 0, 0].unique()) == 6


def test_every_step_has_its_own_noise_and_evaluation_has_none() -> None:
    layer = NoisyBatchNorm(3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert not torch.isclose(layer(x), layer(x)).any()
    plain = BatchNorm(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_gradients_flow_through_the_noise() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = NoisyBatchNorm(2).double()

    def call(x: Tensor) -> Tensor:
        with seeded(1, "noise"):
            return layer(x)

    assert torch.autograd.gradcheck(call, (x,))


@pytest.mark.parametrize("wrong", ["mean_range", "mean_jitter", "scale_jitter", "strength", "scale_range"])
def test_negative_widths_are_told(wrong: str) -> None:
    with pytest.raises(LosslabError, match=f"{wrong} is -1"):
        NoisyBatchNorm(3, **{wrong: -1.0})
