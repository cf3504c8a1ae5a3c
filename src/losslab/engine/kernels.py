"""The hand-batched kernels that training time goes into, with their own backward passes.

Layouts are chosen for the matrix library: a layer narrower than its batch is computed as ``W x^T`` and its
value kept feature-major, which is 2 times faster for ten classes; a softmax over classes then runs along
contiguous examples, 10 times faster than along ten numbers. Weight gradients come out contiguous, in the
shape of the weight, ready for the fused update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine.products import LARGE, available, by_onednn
from losslab.errors import LosslabError

NARROW = 64
"""Outputs below which a layer's value is kept feature-major, however many examples there are."""

ONE_VALUE = (
    "batch norm in training mode got one value a channel, and one value has no variance: take two "
    "examples or more, or evaluation mode (in training, drop_last leaves out a last batch of one)"
)


def products(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b^T + bias`` of N members: ``[N, m, k]``, ``[N, n, k]``, ``[N, n]`` -> ``[N, m, n]``; no graph."""
    members, m, k = a.shape
    n = b.shape[1]
    # A result that is large beside its factors would be copied for too long.
    if m * k * n >= LARGE and m * n <= k * max(m, n) and available(a):
        out = a.new_empty(members, m, n)
        for i in range(members):
            out[i] = by_onednn(a[i], b[i], None if bias is None else bias[i])
        return out
    bt = b.transpose(1, 2)
    return torch.bmm(a, bt) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, bt)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` of N members: x ``[N, B, i]``, W ``[N, o, i]``, b ``[N, o]`` -> ``[N, B, o]``; no graph.

    Examples that all members share are multiplied by all weights at once. A small layer narrower than its
    batch comes out feature-major, as a transposed view.
    """
    members, batch, inputs = x.shape
    outputs = weight.shape[1]
    large = batch * inputs * outputs >= LARGE and outputs >= NARROW
    if large and x.stride(0) == 0 and members > 1 and available(x):
        flat = None if bias is None else bias.reshape(-1)
        y = by_onednn(x[0], weight.reshape(members * outputs, inputs), flat)
        return y.view(batch, members, outputs).transpose(0, 1)
    if large or outputs >= batch:
        return products(x, weight, bias)
    xt = x.transpose(1, 2)
    yt = torch.bmm(weight, xt) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, xt)
    return yt.transpose(1, 2)


def linear_vjp_weight(g: Tensor, x: Tensor) -> Tensor:
    """``g^T x``, contiguous in the shape of the weight."""
    return torch.bmm(g.transpose(1, 2), x)


def linear_vjp_input(g: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``g W`` in the memory layout of ``like``, so that elementwise work on both runs along memory."""
    if like.stride(2) == 1:
        return products(g, weight.transpose(1, 2))
    return torch.bmm(weight.transpose(1, 2), g.transpose(1, 2)).transpose(1, 2)


class Linear(torch.autograd.Function):
    """`linear` with a gradient; its backward pass is differentiable, for Hessian-vector products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Batched product, bias folded in."""
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, W and b."""
        x, weight = ctx.saved_tensors
        g, needs = grads[0], ctx.needs_input_grad
        gb = g.sum(1) if ctx.biased and needs[2] else None
        if torch.is_grad_enabled():  # somebody differentiates the gradient: stay with differentiable calls
            gx = torch.bmm(g, weight) if needs[0] else None
            return gx, torch.bmm(g.transpose(1, 2), x) if needs[1] else None, gb
        gx = linear_vjp_input(g, weight, x) if needs[0] else None
        return gx, linear_vjp_weight(g, x) if needs[1] else None, gb


class CrossEntropy(torch.autograd.Function):
    """``-log softmax(z)[y]``: z ``[N, C, B]`` (classes before examples), y ``[N, B]`` -> ``[N, B]``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Log-softmax along classes, one gather."""
        log_p = torch.log_softmax(logits, 1)
        ctx.save_for_backward(logits, target, log_p)
        return log_p.gather(1, target.unsqueeze(1)).squeeze(1).neg_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """``(softmax(z) - one_hot(y)) g``."""
        logits, target, log_p = ctx.saved_tensors
        g = grads[0].unsqueeze(1)
        index = target.unsqueeze(1)
        if torch.is_grad_enabled():  # somebody differentiates the gradient: rebuild it from the logits
            p = torch.softmax(logits, 1)
            hot = torch.zeros_like(p).scatter_(1, index, 1.0)
            return (p - hot) * g, None
        return cross_entropy_vjp(log_p, index, g), None


def cross_entropy_vjp(log_p: Tensor, index: Tensor, g: Tensor) -> Tensor:
    """``(softmax - one_hot) g``: log softmax ``[N, C, B]``, labels ``[N, 1, B]``, g ``[N, 1, 1 or B]``."""
    p = log_p.exp()
    p.scatter_add_(1, index, p.new_full((), -1.0).expand(index.shape))
    return p.mul_(g)


def checked_labels(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Labels that are safe to index with, and which examples count (None: all of them).

    Raises:
        IndexError: A target outside of the classes, as torch raises (on a GPU torch stops the program).
    """
    on_cpu = target.device.type == "cpu"
    if on_cpu and target.numel() and not 0 <= ignore_index < classes:
        low, high = (int(t) for t in torch.aminmax(target))
        if low >= 0 and high < classes:
            return target, None
    kept = target != ignore_index
    if on_cpu and (wrong := target[kept & ((target < 0) | (target >= classes))]).numel():
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")
    return torch.where(kept, target, torch.zeros_like(target)), kept


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Per-example cross-entropy ``[N, B]`` and its 0/1 weights, None where every example counts.

    Args:
        logits: ``[N, B, C]``.
        target: Class indices ``[N, B]``.
        ignore_index: As torch's.

    """
    target, kept = checked_labels(target, logits.shape[2], ignore_index)
    losses = CrossEntropy.apply(logits.transpose(1, 2).contiguous(), target)
    return losses, None if kept is None else kept.to(losses.dtype)


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation of N members at once: x ``[N, B, C, ...]``, statistics and affine ``[N, C]``.

    One call of torch's kernel on ``N*C`` channels; the running statistics are advanced in place.

    Raises:
        LosslabError: One value a channel in training mode, which has no variance.
    """
    flat = _many_channels(x)
    running, (gamma, beta) = _flat(mean, var), _flat(weight, bias)
    if training:
        _check_values_per_channel(flat)
    y = F.batch_norm(flat, running[0], running[1], gamma, beta, training, momentum, eps)
    if training:
        _keep_running((mean, var), running)
    return _one_by_one(y, x.shape)


BatchNormVjp = Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


def batch_norm_with_vjp(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, BatchNormVjp]:
    """As `batch_norm`, with the function that sends a gradient back to x, the weight and the bias; no graph.

    The value lies in memory as ``[B, N, C]``, and so do the gradients that come back.
    """
    if training and x.dim() == 3:
        return _normalised_vectors(x, mean, var, weight, bias, momentum, eps)
    flat = _many_channels(x)
    running, (gamma, beta) = _flat(mean, var), _flat(weight, bias)
    if training:
        _check_values_per_channel(flat)
    y, *saved = torch.native_batch_norm(flat, gamma, beta, running[0], running[1], training, momentum, eps)
    if training:
        _keep_running((mean, var), running)
    wanted = [True, weight is not None, bias is not None]

    def vjp(g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        sent = torch.ops.aten.native_batch_norm_backward(
            _many_channels(g), flat, gamma, *running, *saved, training, eps, wanted
        )
        gx, *of_affine = sent
        scale, shift = (
            g if a is None else g.view_as(a) for g, a in zip(of_affine, (weight, bias), strict=True)
        )
        return _one_by_one(gx, x.shape), scale, shift

    return _one_by_one(y, x.shape), vjp


def _normalised_vectors(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, BatchNormVjp]:
    """`batch_norm_with_vjp` for ``[N, B, C]`` in training mode, by arithmetic in the layout that x has.

    Torch's kernel wants ``[B, N*C]``, and the matrix products around it ``[N, B, C]``; copies between the
    two cost more than the normalisation.
    """
    batch = x.shape[1]
    if batch == 1:
        raise LosslabError(ONE_VALUE)
    centre = x.mean(1, keepdim=True)
    centred = x - centre
    variance = (centred * centred).mean(1, keepdim=True)
    scale = (variance + eps).rsqrt_()
    if mean is not None and var is not None:
        mean.lerp_(centre.squeeze(1), momentum)
        var.lerp_(variance.squeeze(1) * (batch / (batch - 1)), momentum)
    gain = scale if weight is None else scale * weight.unsqueeze(1)
    y = centred * gain if bias is None else torch.addcmul(bias.unsqueeze(1), centred, gain)

    def vjp(g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        total, along = g.sum(1, keepdim=True), (g * centred).sum(1, keepdim=True).mul_(scale)
        g.addcmul_(centred, along * scale, value=-1 / batch).sub_(total, alpha=1 / batch).mul_(gain)
        of_weight = None if weight is None else along.squeeze(1)
        return g, of_weight, None if bias is None else total.squeeze(1)

    return y, vjp


def _many_channels(x: Tensor) -> Tensor:
    """``[N, B, C, ...]`` -> ``[B, N*C, ...]``."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])


def _one_by_one(y: Tensor, shape: torch.Size) -> Tensor:
    """``[B, N*C, ...]`` -> ``[N, B, C, ...]``, a view."""
    return y.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def _flat(*values: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.reshape(-1) for v in values]


def _keep_running(kept: tuple[Tensor | None, ...], moved: list[Tensor | None]) -> None:
    """Copies advanced statistics back where flattening had to copy them."""
    for statistic, now in zip(kept, moved, strict=True):
        if statistic is not None and now is not None and not statistic.is_contiguous():
            statistic.copy_(now.view_as(statistic))


def _check_values_per_channel(flat: Tensor) -> None:
    if flat.numel() == flat.shape[1]:
        raise LosslabError(ONE_VALUE)


def convolution(function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: Any) -> Tensor:
    """A convolution of N members, x ``[N, B, C, ...]``, weight ``[N, O, I, ...]``.

    On a CPU one call a member: the grouped convolution that one call would need is 1.5 times slower there.
    On a GPU one grouped call.
    """
    members = weight.shape[0]
    biases: Any = [None] * members if bias is None else bias.unbind(0)
    groups = options.pop("groups", 1)
    if x.device.type == "cpu":
        parts = zip(x.unbind(0), weight.unbind(0), biases, strict=True)
        return torch.stack([function(xi, wi, bi, groups=groups, **options) for xi, wi, bi in parts])
    batch, channels = x.shape[1:3]
    flat = x.transpose(0, 1).reshape(batch, members * channels, *x.shape[3:])
    y = function(
        flat,
        weight.reshape(-1, *weight.shape[2:]),
        None if bias is None else bias.reshape(-1),
        groups=groups * members,
        **options,
    )
    return y.reshape(batch, members, -1, *y.shape[2:]).transpose(0, 1)


__all__ = [
    "CrossEntropy",
    "Linear",
    "batch_norm",
    "batch_norm_with_vjp",
    "convolution",
    "cross_entropy",
]
