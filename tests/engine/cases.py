"""One table of networks, batches and losses that drives the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from losslab.engine import Points
from losslab.engine.backends import Stand
from losslab.engine.randomness import member_keys, seeded
from losslab.layers import BatchNorm, NoisyBatchNorm
from losslab.tasks import Task, linear_net, mlp
from losslab.tasks.models import ACTIVATIONS, LinearResidual, ResidualBlock
from losslab.tasks.nest import map_nest

EXAMPLES = 5
TAPE, TABLE, VMAP, LOOP = "tape", "table", "vmap", "loop"


@dataclass(frozen=True)
class Case:
    """A network with a loss, and the backends that must be able to run it; others may refuse, not differ."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[Generator, int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    backends: tuple[str, ...] = (TABLE, VMAP, LOOP)
    draws: bool = False

    def __str__(self) -> str:
        return self.name


def stand(case: Case, private: bool, members: int = 3, dtype: torch.dtype = torch.float64) -> Stand:
    """Members of different seeds on a batch for all or a batch each."""
    modules = []
    for seed in range(members):
        with seeded(seed, "case"):
            modules.append(case.make().to(dtype))
    points = Points.from_modules(modules)
    generator = torch.Generator().manual_seed(1)
    batches = [map_nest(lambda t: _as(t, dtype), case.batch(generator, EXAMPLES)) for _ in range(members)]
    batch = map_nest(lambda *t: torch.stack(t), *batches) if private else batches[0]
    return Stand(points.weights, points.buffers, batch, private, member_keys(range(members), "case"))


def task_of(case: Case, examples: int = 17) -> Task:
    """The case as something to train, with test data."""
    g = torch.Generator().manual_seed(2)
    train, test = case.batch(g, examples), case.batch(g, 11)
    return Task(case.make, case.loss, train, test, name=case.name)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


# -- batches -------------------------------------------------------------------------------------------


def classified(*shape: int, classes: int = 3) -> Callable[[Generator, int], Any]:
    def batch(g: Generator, n: int) -> Any:
        y = torch.randint(classes, (n,), generator=g)
        return torch.randn(n, *shape, generator=g), y

    return batch


def regressed(inputs: int, *outputs: int) -> Callable[[Generator, int], Any]:
    def batch(g: Generator, n: int) -> Any:
        return torch.randn(n, inputs, generator=g), torch.rand(n, *outputs, generator=g)

    return batch


def partly_ignored(g: Generator, n: int) -> Any:
    x, y = classified(4)(g, n)
    y[1::3] = -100
    return x, y


def described(g: Generator, n: int) -> Any:
    x, y = classified(4)(g, n)
    return {"x": x, "y": y, "share": torch.rand(n, generator=g), "note": 3}


def tokens(g: Generator, n: int) -> Any:
    return torch.randint(7, (n, 3), generator=g), torch.randint(3, (n,), generator=g)


def nothing(g: Generator, n: int) -> None:
    return None


# -- losses --------------------------------------------------------------------------------------------


def by(criterion: Callable[..., Tensor], **options: Any) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: criterion(model(batch[0]), batch[1], **options)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    penalty = sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.01 * penalty


def weighted(model: nn.Module, batch: Any) -> Tensor:
    each = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return (each * batch["share"]).sum() / batch["share"].sum()


def by_hand(model: nn.Module, batch: Any) -> Tensor:
    error = batch[1] - model(batch[0]).squeeze(-1)
    return 0.5 * (error**2).mean() + 1e-3 * error.abs().mean()


def residuals(model: nn.Module, batch: Any) -> Tensor:
    return (batch[1] - model(batch[0])).square().mean()


def of_weights(model: nn.Module, batch: None) -> Tensor:
    a, b = model.w[0], model.w[1]
    return (1 - a) ** 2 + 2 * (b - a**2) ** 2


# -- networks ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Parts by name, and what happens to the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def net(forward: Callable[[Any, Tensor], Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **{name: part() for name, part in parts.items()})


def sequence(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def linear(i: int, o: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, **options)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def frozen(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o).requires_grad_(False)


def tied() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, 3))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.Tanh(),
        nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, groups=2, dilation=2), nn.AvgPool2d(2, stride=1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def residual_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), ResidualBlock(4, 4, True),
        ResidualBlock(4, 6, True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    mixed = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1) @ v
    return m.out(mixed.mean(1))


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.out(m.lstm(x)[0][:, -1])


def masked(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return y + torch.relu(y[y > 0]).mean()


def counted(m: Any, x: Tensor) -> Tensor:
    m.count = m.count + 1
    m.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
    return m.a(x - m.mean)


def branching(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return y if float(y.detach().mean()) > 1e9 else torch.tanh(y)


def shaped(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.a(x), x[:, :2]], dim=1).reshape(x.shape[0], 2, -1).permute(0, 2, 1).flatten(1)
    y = F.pad(y, (0, 1))[:, None, 1:].unsqueeze(-1).squeeze()
    return torch.where(y > 0, y, 0.1 * y).view(x.size(0), -1)[..., :3] + m.t * y.amax(-1, keepdim=True)


BATCH_NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bare": {"affine": False, "momentum": 0.3},
    "cumulative": {"momentum": None},
    "frozen": {"statistics": "frozen"},
    "ghost": {"ghost": 3},
    "ghost-cumulative": {"ghost": 3, "momentum": None, "affine": False},
    "detached": {"detach": True},
}


def normalised(how: str) -> list[tuple[str, tuple[int, ...], Callable[[], nn.Module]]]:
    """A variant of batch norm on the inputs, behind a linear layer and behind a convolution."""

    def norm(features: int) -> Callable[[], nn.Module]:
        return lambda: BatchNorm(features, **BATCH_NORMS[how])

    flat = sequence(norm(4), linear(4, 6), norm(6), nn.ReLU, linear(6, 3))
    image = sequence(lambda: nn.Conv2d(2, 3, 3), norm(3), nn.ReLU, nn.Flatten, linear(12, 3))
    return [("1d", (4,), flat), ("2d", (2, 4, 4), image)]


_CE = by(F.cross_entropy)
_EVERY = (TAPE, TABLE, VMAP, LOOP)
_TAPED_NORMS = [("1d", "plain"), ("1d", "bare"), ("1d", "frozen")]
_TAPED = ("relu", "tanh", "sigmoid", "softsign", "silu", "identity", "lecun_tanh", "gelu", "elu")

CASES: list[Case] = [
    *(
        Case(
            f"mlp-{a}",
            mlp(4, 6, 3, activation=a),
            classified(4),
            _CE,
            _EVERY if a in _TAPED else (TABLE, VMAP, LOOP),
        )
        for a in ACTIVATIONS
    ),
    # losses
    Case("linear-mse", linear_net(4, 5, 2), regressed(4, 2), by(F.mse_loss), _EVERY),
    Case("wide-mse", mlp(3, 2, 9, activation="tanh"), regressed(3, 9), by(F.mse_loss), _EVERY),
    Case("square", mlp(4, 6, 2), regressed(4, 2), residuals, _EVERY),
    Case("by-hand", mlp(4, 6, 1), regressed(4), by_hand),
    Case("penalty", mlp(4, 6, 3), classified(4), penalised, _EVERY),
    Case("bce", mlp(4, 6, 2), regressed(4, 2), by(F.binary_cross_entropy_with_logits)),
    Case("l1", mlp(4, 6, 2), regressed(4, 2), by(F.l1_loss)),
    Case("huber", mlp(4, 6, 2), regressed(4, 2), by(F.huber_loss, delta=0.3)),
    Case("smooth-l1-sum", mlp(4, 6, 2), regressed(4, 2), by(F.smooth_l1_loss, reduction="sum")),
    Case("ignored", mlp(4, 6, 3), partly_ignored, _CE, _EVERY),
    Case("ignore-0", mlp(4, 6, 3), classified(4), by(F.cross_entropy, ignore_index=0), _EVERY),
    Case("ce-sum", mlp(4, 6, 3), classified(4), by(F.cross_entropy, reduction="sum")),
    Case("smoothed", mlp(4, 6, 3), classified(4), by(F.cross_entropy, label_smoothing=0.1), (VMAP, LOOP)),
    Case("dict", mlp(4, 6, 3), described, weighted),
    Case("branches", net(lambda m, x: torch.relu(F.linear(x, m.w) + m.b) + torch.tanh(F.linear(x, m.w) + m.b),
                         w=parameter(3, 4), b=parameter(3)), classified(4), _CE, _EVERY),
    Case("weights-only", net(lambda m, x: x, w=parameter(2)), nothing, of_weights),
    # normalisation and randomness
    Case("bn1d", mlp(4, 6, 3, batch_norm=True), classified(4), _CE, _EVERY),
    Case("bn-first", sequence(lambda: nn.BatchNorm1d(4), linear(4, 3)), classified(4), _CE, _EVERY),
    Case("bn-momentum", sequence(linear(4, 6), lambda: nn.BatchNorm1d(6, momentum=0.3, affine=False),
                                 linear(6, 3)), classified(4), _CE, _EVERY),
    Case("bn-untracked", sequence(linear(4, 6), lambda: nn.BatchNorm1d(6, track_running_stats=False),
                                  linear(6, 3)), classified(4), _CE, _EVERY),
    Case("bn-cumulative", sequence(linear(4, 6), lambda: nn.BatchNorm1d(6, momentum=None), linear(6, 3)),
         classified(4), _CE, (LOOP,)),
    *(Case(f"our-bn{kind}-{how}", network, classified(*shape), _CE,
           _EVERY if kind == "1d" and how in ("plain", "bare", "frozen") else (TABLE, VMAP, LOOP))
      for how in BATCH_NORMS for kind, shape, network in normalised(how)),
    Case("noisy-bn", sequence(linear(4, 6), lambda: NoisyBatchNorm(6), linear(6, 3)), classified(4), _CE,
         _EVERY, draws=True),
    Case("noisy-bn-first", sequence(lambda: NoisyBatchNorm(4), linear(4, 3)), classified(4), _CE, _EVERY,
         draws=True),
    Case("noisy-bn2d", sequence(lambda: nn.Conv2d(2, 3, 3), lambda: NoisyBatchNorm(3, ghost=3), nn.Flatten,
                                linear(12, 3)), classified(2, 4, 4), _CE, draws=True),
    Case("ln", sequence(linear(4, 6), lambda: nn.LayerNorm(6), nn.ReLU, linear(6, 3)), classified(4), _CE),
    Case("ln-first", sequence(lambda: nn.LayerNorm(4), linear(4, 3)), classified(4), _CE),
    Case("group-norm", sequence(linear(4, 6), lambda: nn.GroupNorm(2, 6), linear(6, 3)), classified(4), _CE,
         (VMAP, LOOP)),
    Case("dropout", mlp(4, 9, 3, dropout=0.4), classified(4), _CE, _EVERY, draws=True),
    Case("dropout-bn", mlp(4, 9, 3, dropout=0.4, batch_norm=True), classified(4), _CE, _EVERY, draws=True),
    Case("dropout2d", sequence(lambda: nn.Conv2d(2, 6, 3), lambda: nn.Dropout2d(0.5), nn.Flatten,
                               linear(24, 3)), classified(2, 4, 4), _CE, draws=True),
    Case("noise", net(lambda m, x: m.b(m.a(x) + torch.randn_like(m.a(x)) * torch.rand_like(x[:, :1])),
                      a=linear(4, 6), b=linear(6, 3)), classified(4), _CE, _EVERY, draws=True),
    # images
    Case("conv", conv_net, classified(2, 8, 8), _CE),
    Case("resnet", residual_net, classified(2, 6, 6), _CE),
    Case("conv1d", sequence(lambda: nn.Conv1d(2, 3, 3, stride=2), lambda: nn.MaxPool1d(2), nn.Flatten,
                            linear(3, 3)), classified(2, 6), _CE),
    Case("transposed", sequence(lambda: nn.ConvTranspose2d(2, 2, 2), nn.Flatten, linear(18, 3)),
         classified(2, 2, 2), _CE, (VMAP, LOOP)),
    # how weights are held
    Case("linear-residual", sequence(lambda: LinearResidual(4, 0.5), lambda: LinearResidual(4, 0.5)),
         regressed(4, 4), by(F.mse_loss), _EVERY),
    Case("tied", tied, classified(4), _CE, _EVERY),
    Case("tied-transposed", net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=linear(4, 3)),
         regressed(4, 4), by(F.mse_loss)),
    Case("large", mlp(300, 120, 3), classified(300), _CE, _EVERY),
    Case("unused", net(lambda m, x: m.a(x), a=linear(4, 3), b=linear(7, 2)), classified(4), _CE, _EVERY),
    Case("frozen", net(lambda m, x: m.b(torch.tanh(m.a(x))), a=frozen(4, 5), b=linear(5, 3)), classified(4),
         _CE, _EVERY),
    Case("scalar", net(lambda m, x: m.a(x) * m.t.exp() - m.t, a=linear(4, 3), t=parameter()), classified(4),
         _CE, _EVERY),
    Case("buffers", net(counted, a=linear(4, 3), count=lambda: torch.zeros(()),
                        mean=lambda: torch.zeros(4)), classified(4), _CE, (VMAP, LOOP)),
    Case("shapes", net(shaped, a=linear(4, 4), t=parameter()), classified(4), _CE),
    # what only some backends can run
    Case("attention", net(attention, q=linear(4, 4), k=linear(4, 4), v=linear(4, 4), out=linear(4, 3)),
         classified(3, 4), _CE),
    Case("multihead", net(lambda m, x: m.out(m.a(x, x, x, need_weights=False)[0].mean(1)),
                          a=lambda: nn.MultiheadAttention(4, 2, batch_first=True), out=linear(4, 3)),
         classified(3, 4), _CE, (VMAP, LOOP)),
    Case("embedding", net(lambda m, x: m.a(m.e(x).mean(1)), e=lambda: nn.Embedding(7, 4), a=linear(4, 3)),
         tokens, _CE, (VMAP, LOOP)),
    Case("lstm", net(recurrent, lstm=lambda: nn.LSTM(4, 5, batch_first=True), out=linear(5, 3)),
         classified(3, 4), _CE, (LOOP,)),
    Case("mask", net(masked, a=linear(4, 3)), classified(4), _CE, (LOOP,)),
    Case("branch", net(branching, a=linear(4, 3)), classified(4), _CE, (LOOP,)),
]  # fmt: skip

NAMED = {case.name: case for case in CASES}
