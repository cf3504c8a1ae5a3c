"""The three hand-batched kernels that training time goes into, with their own backward passes.

Layouts are chosen for the matrix library: a layer narrower than its batch is computed as ``W x^T`` and its
value kept feature-major, which is 2 times faster for ten classes; a softmax over classes then runs along
contiguous examples, 10 times faster than along ten numbers. Weight gradients come out contiguous, in the
shape of the weight, ready for the fused update.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(torch.autograd.Function):
    """``y = x W^T + b`` for N members: x ``[N, B, i]``, W ``[N, o, i]``, b ``[N, o]`` or None -> ``[N, B, o]``.

    The result may be a transposed view. The backward pass is differentiable, for Hessian-vector products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Batched product, bias folded in."""
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        if weight.shape[1] < x.shape[1]:
            xt = x.transpose(1, 2)
            yt = torch.bmm(weight, xt) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, xt)
            return yt.transpose(1, 2)
        wt = weight.transpose(1, 2)
        return torch.bmm(x, wt) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, wt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, W and b."""
        x, weight = ctx.saved_tensors
        g = grads[0]
        gt = g.transpose(1, 2)
        needs = ctx.needs_input_grad
        gx = torch.bmm(weight.transpose(1, 2), gt).transpose(1, 2) if needs[0] else None
        gw = torch.bmm(gt, x) if needs[1] else None
        gb = gt.sum(2) if ctx.biased and needs[2] else None
        return gx, gw, gb


class CrossEntropy(torch.autograd.Function):
    """``-log softmax(z)[y]`` per example: z ``[N, C, B]`` (classes before examples), y ``[N, B]`` -> ``[N, B]``."""

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
        p = log_p.exp()
        p.scatter_add_(1, index, p.new_full((), -1.0).expand(index.shape))
        return p.mul_(g), None


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Per-example cross-entropy ``[N, B]`` and its 0/1 weights, None where every example counts.

    Args:
        logits: ``[N, B, C]``.
        target: Class indices ``[N, B]``.
        ignore_index: As torch's.

    Raises:
        IndexError: A target outside of the classes, as torch raises (on a GPU torch stops the program).
    """
    classes = logits.shape[2]
    kept = None
    if target.device.type != "cpu" or 0 <= ignore_index < classes:
        kept = target != ignore_index
    else:
        low, high = (int(t) for t in torch.aminmax(target)) if target.numel() else (0, 0)
        if low < 0 or high >= classes:
            kept = target != ignore_index
            if bool((kept & ((target < 0) | (target >= classes))).any()):
                raise IndexError(f"Target {high if high >= classes else low} is out of bounds.")
    if kept is not None:
        target = torch.where(kept, target, torch.zeros_like(target))
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
    """
    members, batch, channels = x.shape[:3]
    flat = x.transpose(0, 1).reshape(batch, members * channels, *x.shape[3:])
    running = [None if s is None else s.reshape(-1) for s in (mean, var)]
    affine = [None if a is None else a.reshape(-1) for a in (weight, bias)]
    y = F.batch_norm(flat, running[0], running[1], affine[0], affine[1], training, momentum, eps)
    if training:
        for kept, moved in zip((mean, var), running, strict=True):
            if kept is not None and moved is not None and kept.data_ptr() != moved.data_ptr():
                kept.copy_(moved.view_as(kept))
    return y.reshape(batch, members, channels, *x.shape[3:]).transpose(0, 1)


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


__all__ = ["CrossEntropy", "Linear", "batch_norm", "convolution", "cross_entropy"]
