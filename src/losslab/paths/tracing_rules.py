"""What torch's functions do to the labels of axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from losslab.paths.labels import Label, product, regroup, split_into, total, unify
from losslab.paths.tracing import RULES, Labels, Trace, broadcast, labels_of


def _names(text: str) -> list[str]:
    return text.split()


_SAME = _names("""
    relu relu_ tanh tanh_ sigmoid sigmoid_ gelu silu elu selu celu leaky_relu softplus softsign hardtanh relu6
    logsigmoid mish hardswish hardsigmoid exp log log1p expm1 abs neg square sqrt rsqrt sin cos erf clamp clip
    sign reciprocal detach float double half bfloat16 to type_as contiguous clone dropout dropout1d dropout2d
    dropout3d alpha_dropout feature_alpha_dropout softmax log_softmax softmin normalize zeros_like ones_like
    nan_to_num isfinite requires_grad_ cpu data hardshrink tanhshrink __neg__ __abs__
""")
_PAIRS = _names("""
    add sub rsub mul multiply div divide true_divide subtract rdiv pow maximum minimum where eq ne lt le gt ge
    add_ sub_ mul_ div_ lerp addcmul addcdiv masked_fill __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__
    __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __pow__ __rpow__
""")
_REDUCTIONS = _names("sum mean amax amin var std prod logsumexp all any var_mean")
_CHOICES = _names("max min argmax argmin")
_POOLS = _names("""
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d interpolate boolean_dispatch
""")


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what functions of these names do."""

    def add(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = implementation
        return implementation

    return add


@rule(*_SAME)
def _same(trace: Trace, y: Any, x: Any, *_: Any, **__: Any) -> Any:
    return list(labels_of(x)) if isinstance(y, Tensor) and y.dim() == x.dim() else NotImplemented


@rule(*_PAIRS)
def _pairs(trace: Trace, y: Tensor, *args: Any, **kwargs: Any) -> Labels:
    return broadcast(y, *args, *(v for n, v in kwargs.items() if n != "out"))


@rule(*_REDUCTIONS)
def _reduced(trace: Trace, y: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[0] if args else None)
    if isinstance(dim, Tensor):
        return _pairs(trace, y, x, dim)
    told = [y] if isinstance(y, Tensor) else list(y)
    every = range(x.dim()) if dim is None or isinstance(dim, bool) else [dim] if isinstance(dim, int) else dim
    gone = {d % max(x.dim(), 1) for d in every}
    labels = labels_of(x)
    kept = [label for i, label in enumerate(labels) if i not in gone]
    wide = [Label(1, fixed=True) if i in gone else label for i, label in enumerate(labels)]
    found = [kept if t.dim() == len(kept) else wide for t in told]
    return found[0] if isinstance(y, Tensor) else found


@rule(*_CHOICES)
def _chosen(trace: Trace, y: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As a reduction, but what says where the largest is must know where everything is."""
    found = _reduced(trace, y, x, *args, **kwargs)
    dim = kwargs.get("dim", args[0] if args else None)
    for label in labels_of(x) if dim is None else [labels_of(x)[dim]] if isinstance(dim, int) else []:
        label.fix()
    return found


# -- layers ------------------------------------------------------------------------------------------------


@rule("linear")
def _linear(trace: Trace, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Labels:
    out, inner = labels_of(weight)
    trace.reads(x, x.dim() - 1)
    unify(labels_of(x)[-1], inner)
    if bias is not None:
        unify(labels_of(bias)[0], out)
    return [*labels_of(x)[:-1], out]


@rule("matmul", "__matmul__", "mm", "bmm")
def _matmul(trace: Trace, y: Tensor, a: Tensor, b: Tensor) -> Any:
    if a.dim() < 2 or b.dim() < 2:
        return NotImplemented
    trace.reads(a, a.dim() - 1)
    la, lb = labels_of(a), labels_of(b)
    unify(la[-1], lb[-2])
    return [*_met(y.dim() - 2, la[:-2], lb[:-2], y), la[-2], lb[-1]]


@rule("__rmatmul__")
def _rmatmul(trace: Trace, y: Tensor, a: Tensor, b: Tensor) -> Any:
    return _matmul(trace, y, b, a)


def _met(count: int, a: Labels, b: Labels, y: Tensor) -> Labels:
    """Labels of leading axes that two tensors share."""
    found: Labels = []
    for axis in range(1, count + 1):
        there = [ls[-axis] for ls in (a, b) if len(ls) >= axis and ls[-axis].size > 1]
        if len(there) == 2:
            unify(*there)
        found.insert(0, there[0] if there else Label(y.shape[count - axis], fixed=True))
    return found


@rule("einsum")
def _einsum(trace: Trace, y: Tensor, equation: str, *operands: Any) -> Any:
    tensors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return NotImplemented
    known: dict[str, Label] = {}
    for letters, t in zip(left.split(","), tensors, strict=True):
        for letter, label in zip(letters, labels_of(t), strict=True):
            unify(known.setdefault(letter, label), label)
    return [known[letter] for letter in right]


@rule("conv1d", "conv2d", "conv3d")
def _convolution(
    trace: Trace, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    if x.dim() != weight.dim():
        return NotImplemented
    batch, channels = labels_of(x)[:2]
    out, inner = labels_of(weight)[:2]
    trace.reads(x, 1)
    if groups == 1:
        unify(channels, inner)
    else:
        group, within = regroup([channels], [groups, x.shape[1] // groups])
        own, each = regroup([out], [groups, weight.shape[0] // groups])
        unify(group, own)
        if within.size > 1:
            unify(within, inner)
        out = product([own, each])
    if bias is not None:
        unify(labels_of(bias)[0], out)
    for label in labels_of(weight)[2:]:
        label.fix()
    return [batch, out, *(Label(n, fixed=True) for n in y.shape[2:])]


@rule("batch_norm", "instance_norm")
def _batch_norm(trace: Trace, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Labels:
    for t in (*args[:4], *kwargs.values()):
        if isinstance(t, Tensor) and t.dim() == 1:
            unify(labels_of(t)[0], labels_of(x)[1])
    return list(labels_of(x))


@rule("layer_norm", "rms_norm")
def _layer_norm(trace: Trace, y: Tensor, x: Tensor, shape: Any, *args: Any, **kwargs: Any) -> Labels:
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor):
            for own, label in zip(labels_of(t), labels_of(x)[-t.dim() :], strict=True):
                unify(own, label)
    return list(labels_of(x))


@rule("group_norm")
def _group_norm(
    trace: Trace, y: Tensor, x: Tensor, groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Labels:
    labels = list(labels_of(x))
    labels[1] = product(regroup([labels[1]], [groups, x.shape[1] // groups]))
    for t in (weight, bias):
        if t is not None:
            unify(labels_of(t)[0], labels[1])
    return labels


@rule(*_POOLS)
def _pool(trace: Trace, y: Any, x: Tensor, *_: Any, **__: Any) -> Any:
    if not isinstance(y, Tensor) or x.dim() < 3 or y.shape[:2] != x.shape[:2]:
        return NotImplemented
    return [*labels_of(x)[:2], *(Label(n, fixed=True) for n in y.shape[2:])]


@rule("embedding")
def _embedding(trace: Trace, y: Tensor, index: Tensor, weight: Tensor, *_: Any, **__: Any) -> Labels:
    rows, units = labels_of(weight)
    rows.fix()
    return [*labels_of(index), units]


@rule("scaled_dot_product_attention")
def _attention(trace: Trace, y: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    lq, lk, lv = labels_of(q), labels_of(k), labels_of(v)
    if kwargs.get("enable_gqa"):
        return NotImplemented
    unify(lq[-1], lk[-1])
    unify(lk[-2], lv[-2])
    outer = _met(y.dim() - 2, lq[:-2], lk[:-2], y)
    outer = _met(y.dim() - 2, outer, lv[:-2], y)
    return [*outer, lq[-2], lv[-1]]


@rule("multi_head_attention_forward")
def _multi_head(trace: Trace, y: Any, *args: Any, **kwargs: Any) -> Any:
    query, key, value, width, heads, in_weight, in_bias, bias_k, bias_v = args[:9]
    out_weight, out_bias = args[11:13]
    if in_weight is None or bias_k is not None or bias_v is not None:
        return NotImplemented
    head = Label(heads)
    match, carry = (product([head, Label(width // heads)]) for _ in range(2))
    rows = total([match, match, carry])
    unify(labels_of(in_weight)[0], rows)
    if in_bias is not None:
        unify(labels_of(in_bias)[0], rows)
    for t in (query, key, value):
        unify(labels_of(t)[-1], labels_of(in_weight)[1])
        trace.reads(t, t.dim() - 1)
    unify(labels_of(out_weight)[1], carry)
    out = labels_of(out_weight)[0]
    if out_bias is not None:
        unify(labels_of(out_bias)[0], out)
    told = [[*labels_of(query)[:-1], out]]
    return told + [[Label(n, fixed=True) for n in t.shape] if isinstance(t, Tensor) else [] for t in y[1:]]


# -- shapes ------------------------------------------------------------------------------------------------


@rule("flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _regrouped(trace: Trace, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    return regroup(labels_of(x), y.shape)


@rule("expand", "expand_as")
def _expanded(trace: Trace, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    return broadcast(y, x)


@rule("permute")
def _permuted(trace: Trace, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    dims = kwargs.get("dims", args)
    order = dims[0] if dims and isinstance(dims[0], (list, tuple)) else dims
    return [labels_of(x)[d] for d in order]


@rule("transpose", "swapaxes", "swapdims")
def _transposed(trace: Trace, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Labels:
    a, b = (*args, *kwargs.values())
    found = list(labels_of(x))
    found[a], found[b] = found[b], found[a]
    return found


@rule("t", "T", "mT")
def _turned(trace: Trace, y: Tensor, x: Tensor) -> Any:
    if x.dim() != 2:
        return NotImplemented
    return labels_of(x)[::-1]


@rule("cat", "concat")
def _joined(trace: Trace, y: Tensor, parts: Any, dim: int = 0) -> Labels:
    dim %= y.dim()
    found = [
        total([labels_of(t)[axis] for t in parts]) if axis == dim else labels_of(parts[0])[axis]
        for axis in range(y.dim())
    ]
    for t in parts[1:]:
        for axis, label in enumerate(labels_of(t)):
            if axis != dim:
                unify(found[axis], label)
    return found


@rule("stack")
def _stacked(trace: Trace, y: Tensor, parts: Any, dim: int = 0) -> Labels:
    found = list(labels_of(parts[0]))
    for t in parts[1:]:
        for own, label in zip(found, labels_of(t), strict=True):
            unify(own, label)
    found.insert(dim % y.dim(), Label(len(parts), fixed=True))
    return found


@rule("chunk", "split", "split_with_sizes")
def _taken_apart(trace: Trace, y: Any, x: Tensor, sizes: Any, dim: int = 0) -> list[Labels]:
    dim %= x.dim()
    parts = split_into(labels_of(x)[dim], [t.shape[dim] for t in y])
    return [[*labels_of(x)[:dim], part, *labels_of(x)[dim + 1 :]] for part in parts]


@rule("unbind")
def _unbound(trace: Trace, y: Any, x: Tensor, dim: int = 0) -> list[Labels]:
    dim %= x.dim()
    labels_of(x)[dim].fix()
    return [[*labels_of(x)[:dim], *labels_of(x)[dim + 1 :]] for _ in y]


@rule("__getitem__")
def _picked(trace: Trace, y: Tensor, x: Tensor, index: Any) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(p is None or p is ... or isinstance(p, (int, slice)) for p in parts):
        return NotImplemented
    named = sum(p is not None and p is not ... for p in parts)
    if ... in parts:
        at = parts.index(...)
        parts[at : at + 1] = [slice(None)] * (x.dim() - named)
    parts += [slice(None)] * (x.dim() - sum(p is not None for p in parts))
    labels, found = iter(labels_of(x)), []
    for part in parts:
        if part is None:
            found.append(Label(1, fixed=True))
            continue
        label = next(labels)
        if isinstance(part, slice) and range(label.size)[part] == range(label.size):
            found.append(label)
            continue
        label.fix()
        if isinstance(part, slice):
            found.append(Label(len(range(label.size)[part]), fixed=True))
    return found


@rule("pad")
def _padded(trace: Trace, y: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode != "constant":
        return NotImplemented
    found = list(labels_of(x))
    for k in range(len(pad) // 2):
        before, after = pad[2 * k], pad[2 * k + 1]
        if before < 0 or after < 0:
            return NotImplemented
        # Entries that are all the same number may change places among themselves.
        sides = [Label(n) if found[-1 - k].free else Label(n, fixed=True) for n in (before, after)]
        axis = [sides[0], found[-1 - k], sides[1]]
        found[-1 - k] = total([label for label in axis if label.size])
    return found
