"""A chain's gradients as machine code: each member's way from its batch to its gradients, in a core's cache.

Operations on stacks go through all members' values once each, and through memory with them; torch's batched
products use half of the vector width of some processors. Here numba compiles the whole way of one member.
Only numbers enter: the plan, whose layout stands in `losslab.engine.compiled`.
"""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, types

from losslab.engine.compiled import (
    AT_CENTRED,
    AT_EXAMPLES,
    AT_GRADIENT,
    AT_INPUT,
    AT_LARGEST,
    AT_OTHER,
    AT_OUTPUT,
    AT_PRODUCT,
    AT_SCALES,
    AT_SUMS,
    BATCH,
    BETA,
    BIAS,
    BIASED,
    BLOCK,
    BLOCKS,
    G_BETA,
    G_BIAS,
    G_GAMMA,
    G_WEIGHT,
    GAMMA,
    GATED,
    HEAD,
    INPUTS,
    LABELS,
    LABELS_STRIDE,
    LOSSES,
    MEAN,
    MEMBERS,
    MEMORY,
    NEXT,
    NORMED,
    NUMBERS,
    OUTPUTS,
    PADDED,
    SHARE,
    TICKET,
    VAR,
    WEIGHT,
    WRONG,
    X_STRIDE,
    X,
)  # fmt: skip
from losslab.engine.vectors import LANES, doubles, drawn, fast, floats, longs, multiply, plain, transpose


@fast
def normalise(h, centred, scales, gamma, beta, mean, var, rows, batch, padded, momentum, eps):
    """Batch norm of the rows of h in place; running statistics move, centred values and scales are kept."""
    for r in range(rows):
        row, kept = h[r * padded : r * padded + batch], centred[r * padded : r * padded + batch]
        total = np.float32(0)
        for b in range(batch):
            total += row[b]
        middle = total / np.float32(batch)
        square = np.float32(0)
        for b in range(batch):
            away = row[b] - middle
            kept[b] = away
            square += away * away
        variance = square / np.float32(batch)
        scale = np.float32(1) / np.sqrt(variance + eps)
        mean[r] += momentum * (middle - mean[r])
        var[r] += momentum * (variance * np.float32(batch / (batch - 1)) - var[r])
        scales[r] = scale
        gain, shift = scale * gamma[r], beta[r]
        for b in range(batch):
            row[b] = kept[b] * gain + shift


@fast
def denormalise(g, centred, scales, gamma, g_gamma, g_beta, rows, batch, padded):
    """The way back through `normalise`, in place."""
    for r in range(rows):
        row, kept = g[r * padded : r * padded + batch], centred[r * padded : r * padded + batch]
        total, along = np.float32(0), np.float32(0)
        for b in range(batch):
            total += row[b]
            along += row[b] * kept[b]
        along *= scales[r]
        g_beta[r], g_gamma[r] = total, along
        share, slope = total / np.float32(batch), along * scales[r] / np.float32(batch)
        gain = scales[r] * gamma[r]
        for b in range(batch):
            row[b] = gain * (row[b] - share - kept[b] * slope)


@fast
def _exponential(x):
    """exp(x) of a float32 x <= 0 to two units in the last place; the library's would go number by number."""
    power = np.rint(x * np.float32(1.4426950408889634))
    r = x - power * np.float32(0.693359375) - power * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < np.float32(-87) else p * scale


@fast
def cross_entropy(z, labels, g, largest, sums, classes, batch, padded):
    """Mean of ``-log softmax(z)[y]`` over the columns of z ``[C, B]``, and its gradient g."""
    for b in range(batch):
        largest[b], sums[b] = z[b], np.float32(0)
    for c in range(1, classes):
        for b in range(batch):
            largest[b] = max(largest[b], z[c * padded + b])
    for c in range(classes):
        for b in range(batch):
            e = _exponential(z[c * padded + b] - largest[b])
            g[c * padded + b] = e
            sums[b] += e
    total = np.float32(0)
    for b in range(batch):  # in a loop of its own: else a small loss would be added to large logits, and lost
        largest[b] -= z[labels[b] * padded + b]
    for b in range(batch):
        total += np.log(sums[b]) + largest[b]
        sums[b] = np.float32(1) / (sums[b] * np.float32(batch))
    for c in range(classes):
        for b in range(batch):
            g[c * padded + b] *= sums[b]
    for b in range(batch):
        g[labels[b] * padded + b] -= np.float32(1) / np.float32(batch)
    return total / np.float32(batch)


@fast
def gate(h, size):
    """ReLU in place; NaN stays NaN."""
    for j in range(size):
        h[j] = np.float32(0) if h[j] < 0 else h[j]


@fast
def gate_back(g, h, size):
    """The way back through `gate`."""
    for j in range(size):
        g[j] = np.float32(0) if h[j] <= 0 else g[j]


@plain
def _floats(address, count):
    return carray(floats(address), (count,))


@plain
def _of(plan, block, tensor, n, count):
    """A member's part of a block's tensor."""
    return _floats(plan[block + tensor] + 4 * n * plan[block + tensor + 1], count)


@fast
def _add_to_rows(h, bias, rows, padded):
    for r in range(rows):
        shift = bias[r]
        for b in range(r * padded, (r + 1) * padded):
            h[b] += shift


@fast
def _sum_rows(g, into, rows, batch, padded):
    for r in range(rows):
        total = np.float32(0)
        for b in range(r * padded, r * padded + batch):
            total += g[b]
        into[r] = total


@fast
def _copy_rows(source, target, rows, columns, wide, tall):
    for r in range(rows):
        for c in range(columns):
            target[r * tall + c] = source[r * wide + c]


@plain
def _up(count):
    """The next multiple of a vector's size."""
    return (count + LANES - 1) // LANES * LANES


@plain
def _enter(plan, n, base):
    """The batch of a member, as it is and feature by feature."""
    inputs, batch, padded = plan[HEAD + INPUTS], plan[BATCH], plan[PADDED]
    x = _floats(plan[X] + 4 * n * plan[X_STRIDE], batch * inputs)
    wide, into = _up(inputs), base + 4 * plan[HEAD + AT_EXAMPLES]
    _copy_rows(x, _floats(into, batch * wide), batch, inputs, inputs, wide)
    transpose(into, base + 4 * plan[HEAD + AT_INPUT], batch, inputs, wide, padded)


@plain
def _forward(plan, n, base, numbers):
    batch, padded, blocks = plan[BATCH], plan[PADDED], plan[BLOCKS]
    for k in range(blocks):
        at = HEAD + k * BLOCK
        i, o = plan[at + INPUTS], plan[at + OUTPUTS]
        following = plan[AT_OUTPUT] if k + 1 == blocks else plan[at + BLOCK + AT_INPUT]
        into = base + 4 * following
        weight = plan[at + WEIGHT] + 4 * n * plan[at + WEIGHT + 1]
        multiply(weight, i, 1, base + 4 * plan[at + AT_INPUT], padded, into, padded, o, i, padded // LANES)
        h = _floats(into, o * padded)
        if plan[at + BIASED]:
            _add_to_rows(h, _of(plan, at, BIAS, n, o), o, padded)
        if plan[at + NORMED]:
            centred = _floats(base + 4 * plan[at + AT_CENTRED], o * padded)
            scales = _floats(base + 4 * plan[at + AT_SCALES], o)
            gamma, beta = _of(plan, at, GAMMA, n, o), _of(plan, at, BETA, n, o)
            mean, var = _of(plan, at, MEAN, n, o), _of(plan, at, VAR, n, o)
            momentum, eps = np.float32(numbers[2 * k]), np.float32(numbers[2 * k + 1])
            normalise(h, centred, scales, gamma, beta, mean, var, o, batch, padded, momentum, eps)
        if plan[at + GATED]:
            gate(h, o * padded)
        if k + 1 < blocks:
            wide = _up(o)
            transpose(into, base + 4 * plan[at + BLOCK + AT_EXAMPLES], o, batch, padded, wide)


@plain
def _back(plan, n, base):
    batch, padded, blocks = plan[BATCH], plan[PADDED], plan[BLOCKS]
    here, there = base + 4 * plan[AT_GRADIENT], base + 4 * plan[AT_OTHER]
    product = base + 4 * plan[AT_PRODUCT]
    for k in range(blocks - 1, -1, -1):
        at = HEAD + k * BLOCK
        i, o = plan[at + INPUTS], plan[at + OUTPUTS]
        g, wide = _floats(here, o * padded), _up(i)
        if plan[at + GATED]:
            following = plan[AT_OUTPUT] if k + 1 == blocks else plan[at + BLOCK + AT_INPUT]
            gate_back(g, _floats(base + 4 * following, o * padded), o * padded)
        if plan[at + NORMED]:
            centred = _floats(base + 4 * plan[at + AT_CENTRED], o * padded)
            scales = _floats(base + 4 * plan[at + AT_SCALES], o)
            g_gamma, g_beta = _of(plan, at, G_GAMMA, n, o), _of(plan, at, G_BETA, n, o)
            gamma = _of(plan, at, GAMMA, n, o)
            denormalise(g, centred, scales, gamma, g_gamma, g_beta, o, batch, padded)
        if plan[at + BIASED]:
            _sum_rows(g, _of(plan, at, G_BIAS, n, o), o, batch, padded)
        examples = base + 4 * plan[at + AT_EXAMPLES]
        into = plan[at + G_WEIGHT] + 4 * n * plan[at + G_WEIGHT + 1]
        if wide == i:
            multiply(here, padded, 1, examples, wide, into, wide, o, batch, wide // LANES)
        else:
            multiply(here, padded, 1, examples, wide, product, wide, o, batch, wide // LANES)
            _copy_rows(_floats(product, o * wide), _floats(into, o * i), o, i, wide, i)
        if k > 0:
            weight = plan[at + WEIGHT] + 4 * n * plan[at + WEIGHT + 1]
            multiply(weight, 1, i, here, padded, there, padded, i, o, padded // LANES)
            here, there = there, here


@plain
def _labels(plan, n):
    return carray(longs(plan[LABELS] + 8 * n * plan[LABELS_STRIDE]), (plan[BATCH],))


@plain
def _any_wrong(plan, classes):
    """Whether some member has a label that is no class."""
    for n in range(plan[MEMBERS]):
        for label in _labels(plan, n):
            if label < 0 or label >= classes:
                return True
    return False


@plain
def _member(plan, n, base, numbers, classes):
    batch, padded = plan[BATCH], plan[PADDED]
    labels = _labels(plan, n)
    _enter(plan, n, base)
    _forward(plan, n, base, numbers)
    z = _floats(base + 4 * plan[AT_OUTPUT], classes * padded)
    g = _floats(base + 4 * plan[AT_GRADIENT], classes * padded)
    largest, sums = _floats(base + 4 * plan[AT_LARGEST], padded), _floats(base + 4 * plan[AT_SUMS], padded)
    loss = cross_entropy(z, labels, g, largest, sums, classes, batch, padded)
    _floats(plan[LOSSES] + 4 * n, 1)[0] = loss
    _back(plan, n, base)


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def work(data):
    """What each thread does: takes one member after another until there is none left."""
    length = carray(data, (1,))[0]
    plan = carray(data, (length,))
    classes = plan[HEAD + (plan[BLOCKS] - 1) * BLOCK + OUTPUTS]
    if _any_wrong(plan, classes):
        plan[WRONG] = 1
        return
    base = plan[MEMORY] + 4 * plan[SHARE] * drawn(data, TICKET)
    numbers = carray(doubles(plan[NUMBERS]), (2 * plan[BLOCKS],))
    n = drawn(data, NEXT)
    while n < plan[MEMBERS]:
        _member(plan, n, base, numbers, classes)
        n = drawn(data, NEXT)
