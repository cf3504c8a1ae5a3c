"""Networks to train: each name here returns a factory, a function without arguments that builds the network.

The weights start as torch's own layers draw them, unless a factory says otherwise; other starts are in
:mod:`losslab.layers`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.errors import LosslabError, unknown

P = ParamSpec("P")


@dataclass(frozen=True, repr=False)
class Factory:
    """Builds one network a call; prints, compares and hashes as the expression that made it.

    Example:
        >>> logistic_regression(64, 10)
        logistic_regression(inputs=64, classes=10)
        >>> logistic_regression(64, 10)()
        Linear(in_features=64, out_features=10, bias=True)
    """

    expression: str
    build: Callable[[], nn.Module] = field(compare=False)

    def __call__(self) -> nn.Module:
        """One network, its weights drawn from the global random state."""
        return self.build()

    def __repr__(self) -> str:
        return self.expression

    def to(self, dtype: torch.dtype) -> Factory:
        """The factory of the same networks in another precision."""
        if dtype == torch.float32:
            return self
        return Factory(f"{self.expression}.to({dtype})", lambda: self.build().to(dtype))


def _factory(recipe: Callable[P, Callable[[], nn.Module]]) -> Callable[P, Factory]:
    """Turn a function that checks its arguments and returns a builder into one that returns a Factory."""
    signature = inspect.signature(recipe)

    @functools.wraps(recipe)
    def make(*args: P.args, **kwargs: P.kwargs) -> Factory:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        shown: list[str] = []
        for name, value in bound.arguments.items():
            spread = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            shown += map(repr, value) if spread else [f"{name}={value!r}"]
        return Factory(f"{recipe.__name__}({', '.join(shown)})", recipe(*args, **kwargs))

    return make


class LeCunTanh(nn.Module):
    """``1.7159 tanh(2 x / 3)``, which maps 1 to 1 and -1 to -1 (Efficient BackProp, section 4.4)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation, elementwise."""
        return 1.7159 * torch.tanh(x * (2 / 3))


#: The activations that :func:`mlp` knows by name.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softsign": nn.Softsign,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
    "lecun_tanh": LeCunTanh,
}


@_factory
def mlp(
    *widths: int, activation: str = "relu", bias: bool = True, batch_norm: bool = False, dropout: float = 0.0
) -> Callable[[], nn.Module]:
    """Fully connected layers ``widths[0] -> ... -> widths[-1]`` on inputs ``[batch, widths[0]]``.

    Every layer but the last is: linear, batch norm (if wanted), activation, dropout (if wanted).

    Args:
        *widths: Inputs, hidden widths, outputs.
        activation: A name of :data:`ACTIVATIONS`.
        bias: Whether the linear layers have one; a layer before batch norm never has, since its mean is
            removed.
        batch_norm: Whether the hidden layers are normalised.
        dropout: The probability of dropping a hidden unit.

    Raises:
        LosslabError: If there are fewer than two widths, one is not positive, the activation is unknown, or
            the dropout is outside of [0, 1).

    Example:
        >>> mlp(64, 32, 10)
        mlp(64, 32, 10, activation='relu', bias=True, batch_norm=False, dropout=0.0)
    """
    _check_widths("mlp", widths)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if not 0 <= dropout < 1:
        raise LosslabError(f"dropout is {dropout}, a probability below one was wanted: pass 0 <= dropout < 1")

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths[:-1]):
            layers.append(nn.Linear(inputs, outputs, bias=bias and not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))

    return build


@_factory
def linear_net(*widths: int) -> Callable[[], nn.Module]:
    """The deep linear network ``x -> W_l ... W_1 x``, without biases.

    Raises:
        LosslabError: If there are fewer than two widths, or one is not positive.

    Example:
        >>> linear_net(3, 5, 2)()(torch.ones(7, 3)).shape
        torch.Size([7, 2])
    """
    _check_widths("linear_net", widths)
    pairs = list(itertools.pairwise(widths))
    return lambda: nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairs))


class LinearResidual(nn.Module):
    """``x -> x + A x``, with the entries of A drawn from N(0, scale^2 / dimension)."""

    def __init__(self, dimension: int, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, dimension, bias=False)
        nn.init.normal_(self.linear.weight, std=scale / dimension**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``[batch, dimension]``."""
        return x + self.linear(x)


@_factory
def linear_resnet(dimension: int, depth: int, scale: float = 0.0) -> Callable[[], nn.Module]:
    """The linear residual network ``x -> (I + A_depth) ... (I + A_1) x`` of Hardt and Ma (2017).

    Args:
        dimension: Of inputs, outputs and everything between.
        depth: The number of factors.
        scale: The A start with entries N(0, scale^2 / dimension), whose largest singular value is near 2
            scale; 0 starts from the identity.

    Raises:
        LosslabError: If the dimension or the depth is not positive, or the scale is negative.

    Example:
        >>> linear_resnet(2, 3)()(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]
    """
    _check_widths("linear_resnet", (dimension, depth))
    if scale < 0:
        raise LosslabError(f"scale is {scale}, a standard deviation was wanted: pass scale >= 0")
    return lambda: nn.Sequential(*(LinearResidual(dimension, scale) for _ in range(depth)))


def lenet_300_100() -> Factory:
    """LeNet-300-100 for MNIST: 784-300-100-10 with ReLU, 266,610 parameters (LeCun et al. 1998)."""
    return mlp(784, 300, 100, 10)


@_factory
def logistic_regression(inputs: int, classes: int) -> Callable[[], nn.Module]:
    """One linear layer with a bias, to go with the cross-entropy.

    Raises:
        LosslabError: If a number is not positive.
    """
    _check_widths("logistic_regression", (inputs, classes))
    return lambda: nn.Linear(inputs, classes)


def conv2(channels: int = 3, size: int = 32, classes: int = 10) -> Factory:
    """Conv-2 of Frankle and Carbin (The Lottery Ticket Hypothesis, 2019, figure 2): 4,300,992 weights.

    Two 3x3 convolutions of 64 channels with padding and ReLU, max-pooling by two, then 256, 256 and
    ``classes``.

    Args:
        channels: Channels of the input image.
        size: Height and width of the input image, ``[batch, channels, size, size]``.
        classes: Outputs.

    Raises:
        LosslabError: If a number is not positive, or the poolings do not divide the size.
    """
    return _conv(1, channels=channels, size=size, classes=classes)


def conv4(channels: int = 3, size: int = 32, classes: int = 10) -> Factory:
    """Conv-4: :func:`conv2` with a second stage of two convolutions of 128 channels; 2,425,024 weights."""
    return _conv(2, channels=channels, size=size, classes=classes)


def conv6(channels: int = 3, size: int = 32, classes: int = 10) -> Factory:
    """Conv-6: :func:`conv4` with a third stage of two convolutions of 256 channels; 2,261,184 weights."""
    return _conv(3, channels=channels, size=size, classes=classes)


def _conv(stages: int, channels: int, size: int, classes: int) -> Factory:
    name = f"conv{2 * stages}"
    _check_widths(name, (channels, size, classes))
    if size % 2**stages:
        raise LosslabError(
            f"{name} halves the image {stages} times, size is {size}: pass a multiple of {2**stages}"
        )

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        inputs = channels
        for width in (64, 128, 256)[:stages]:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = width
        flat = inputs * (size // 2**stages) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(256, classes))

    return Factory(f"{name}(channels={channels}, size={size}, classes={classes})", build)


@_factory
def vgg(
    *stages: int,
    batch_norm: bool = False,
    width: int = 64,
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
) -> Callable[[], nn.Module]:
    """Stages of 3x3 convolutions, each ended by max-pooling, then one linear layer, for small square images.

    The convolutional part is that of Simonyan and Zisserman (2015, table 1); their three linear layers, made
    for larger images, are one here, as is usual on CIFAR-10.

    Args:
        *stages: Convolutions in each stage; ``vgg(2, 2, 2, width=8, channels=1, size=8)`` suits the digits.
        batch_norm: Whether batch norm follows each convolution, which then has no bias.
        width: Channels of the first stage; each stage doubles them, up to eight times the first.
        channels: Channels of the input image.
        size: Height and width of the input image, ``[batch, channels, size, size]``.
        classes: Outputs.

    Raises:
        LosslabError: If there is no stage, a number is not positive, or the poolings do not divide the size.
    """
    _check_widths("vgg", (*stages, width, channels, size, classes) if stages else ())
    if size % 2 ** len(stages):
        raise LosslabError(
            f"vgg halves the image {len(stages)} times, size is {size}: "
            f"pass a multiple of {2 ** len(stages)}, or fewer stages"
        )

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        inputs = channels
        for stage, convolutions in enumerate(stages):
            outputs = width * min(2**stage, 8)
            for _ in range(convolutions):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        flat = inputs * (size // 2 ** len(stages)) ** 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, classes))

    return build


def vgg11(batch_norm: bool = False, width: int = 64) -> Factory:
    """VGG-11 for CIFAR-10: eight convolutions and a linear layer, 9,225,610 parameters; see :func:`vgg`."""
    return vgg(1, 1, 2, 2, 2, batch_norm=batch_norm, width=width)


def vgg13(batch_norm: bool = False, width: int = 64) -> Factory:
    """VGG-13 for CIFAR-10: ten convolutions and a linear layer, 9,410,122 parameters; see :func:`vgg`."""
    return vgg(2, 2, 2, 2, 2, batch_norm=batch_norm, width=width)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al. 2016, option A).

    Where the block changes the shape, the shortcut takes every second pixel and pads the new channels with
    zeros.
    """

    def __init__(self, inputs: int, outputs: int, batch_norm: bool) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.padding = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=not batch_norm)
        self.norm1 = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not batch_norm)
        self.norm2 = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``[batch, inputs, height, width]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(x + y)


@_factory
def resnet20(
    batch_norm: bool = True, channels: int = 3, classes: int = 10, width: int = 16
) -> Callable[[], nn.Module]:
    """ResNet-20 for small images: three stages of three blocks, 16, 32, 64 channels, 0.27 M parameters.

    He et al., Deep Residual Learning (2016), section 4.2, with the parameter-free shortcut. Without batch
    norm the convolutions have biases instead.

    Args:
        batch_norm: Whether batch norm follows each convolution.
        channels: Channels of the input image.
        classes: Outputs.
        width: Channels of the first stage; the others have twice and four times as many.

    Raises:
        LosslabError: If a number is not positive.
    """
    _check_widths("resnet20", (channels, classes, width))

    def build() -> nn.Module:
        norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm),
            norm,
            nn.ReLU(),
        ]
        inputs = width
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(3):
                layers.append(ResidualBlock(inputs, outputs, batch_norm))
                inputs = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))

    return build


def _check_widths(name: str, widths: tuple[int, ...]) -> None:
    if len(widths) < 2 or any(not isinstance(width, int) or width < 1 for width in widths):
        raise LosslabError(
            f"{name} got the sizes {widths}: pass at least two, all of them positive whole numbers"
        )


#: Every model factory by name.
MODELS: dict[str, Callable[..., Factory]] = {
    maker.__name__: maker
    for maker in (
        mlp, linear_net, linear_resnet, lenet_300_100, logistic_regression, conv2, conv4, conv6, resnet20,
        vgg, vgg11, vgg13,
    )
}  # fmt: skip
