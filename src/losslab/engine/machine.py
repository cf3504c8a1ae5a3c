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
    AT_UNITS,
    BATCH,
    BETA,
    BIAS,
    BIASED,
    BLOCK,
    BLOCKS,
    CONSTANT,
    EARLIER,
    EARLIER_GAMMA,
    G_BETA,
    G_BIAS,
    G_GAMMA,
    G_WEIGHT,
    GAMMA,
    GATED,
    GLANCE,
    GLANCES,
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
    PARTS,
    PLACES,
    SAMPLES,
    SHARE,
    SIZES,
    TICKET,
    TOLD,
    VALUES,
    VAR,
    WEIGHT,
    WRONG,
    X_STRIDE,
    X,
)  # fmt: skip
from losslab.engine.rows import (
    add_to_rows,
    copy_rows,
    cross_entropy,
    denormalise,
    distance,
    gate,
    gate_back,
    moments,
    normalise,
    sum_of,
    sum_rows,
    unit_moments,
)
from losslab.engine.vectors import LANES, doubles, drawn, floats, longs, multiply, plain, transpose


@plain
def _floats(address, count):
    return carray(floats(address), (count,))


@plain
def _of(plan, block, tensor, n, count):
    """A member's part of a block's tensor."""
    return _floats(plan[block + tensor] + 4 * n * plan[block + tensor + 1], count)


@plain
def _up(count):
    """The next multiple of a vector's size."""
    return (count + LANES - 1) // LANES * LANES


@plain
def _glance_at(plan, k, part, back, h, n, o, base):
    """Notes what a part of block k comes to."""
    if plan[GLANCES] == 0:
        return
    at = plan[GLANCES] + k * GLANCE
    told = plan[at + VALUES] + 4 * n * plan[at + VALUES + 1] + 4 * TOLD * (2 * part + back)
    told, kept = _floats(told, TOLD), _floats(base + 4 * plan[AT_UNITS], 2 * o)
    rows, batch, padded = o, plan[BATCH], plan[PADDED]
    if back and batch == padded:  # nobody asks for units of a gradient, and one long row is faster
        rows, batch, padded = 1, o * batch, o * padded
    told[TOLD - 1] = unit_moments(h, kept, rows, batch, padded)
    moments(kept, rows, told, np.float32(CONSTANT))
    if not back:
        count = plan[at + SAMPLES + 1] // PARTS
        places = carray(longs(plan[at + PLACES]), (count,))
        into = _floats(plan[at + SAMPLES] + 4 * n * plan[at + SAMPLES + 1] + 4 * count * part, count)
        for s in range(count):
            into[s] = h[np.uint64(places[s])]


@plain
def _measure(plan, k, which, w, g, n, rows, columns, wide):
    """Notes the sizes of a weight ``[rows, columns]`` of block k, of its gradient, and of its way."""
    at = plan[GLANCES] + k * GLANCE
    into = carray(doubles(plan[at + SIZES] + 8 * (n * plan[at + SIZES + 1] + 5 * which)), (5,))
    into[0] = sum_of(w, rows, columns, columns)[1]
    into[1], into[2] = sum_of(g, rows, columns, wide)
    earlier = at + (EARLIER_GAMMA if which else EARLIER)
    if plan[earlier]:
        before = _floats(plan[earlier] + 4 * n * plan[earlier + 1], rows * columns)
        into[3], into[4] = distance(w, before, rows, columns)


@plain
def _enter(plan, n, base):
    """The batch of a member, as it is and feature by feature."""
    inputs, batch, padded = plan[HEAD + INPUTS], plan[BATCH], plan[PADDED]
    x = _floats(plan[X] + 4 * n * plan[X_STRIDE], batch * inputs)
    wide, into = _up(inputs), base + 4 * plan[HEAD + AT_EXAMPLES]
    copy_rows(x, _floats(into, batch * wide), batch, inputs, inputs, wide)
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
            add_to_rows(h, _of(plan, at, BIAS, n, o), o, padded)
        _glance_at(plan, k, 0, 0, h, n, o, base)
        if plan[at + NORMED]:
            centred = _floats(base + 4 * plan[at + AT_CENTRED], o * padded)
            scales = _floats(base + 4 * plan[at + AT_SCALES], o)
            gamma, beta = _of(plan, at, GAMMA, n, o), _of(plan, at, BETA, n, o)
            mean, var = _of(plan, at, MEAN, n, o), _of(plan, at, VAR, n, o)
            momentum, eps = np.float32(numbers[2 * k]), np.float32(numbers[2 * k + 1])
            normalise(h, centred, scales, gamma, beta, mean, var, o, batch, padded, momentum, eps)
            _glance_at(plan, k, 1, 0, h, n, o, base)
        if plan[at + GATED]:
            gate(h, o * padded)
            _glance_at(plan, k, 2, 0, h, n, o, base)
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
            _glance_at(plan, k, 2, 1, g, n, o, base)
            gate_back(g, _floats(base + 4 * following, o * padded), o * padded)
        if plan[at + NORMED]:
            centred = _floats(base + 4 * plan[at + AT_CENTRED], o * padded)
            scales = _floats(base + 4 * plan[at + AT_SCALES], o)
            g_gamma, g_beta = _of(plan, at, G_GAMMA, n, o), _of(plan, at, G_BETA, n, o)
            gamma = _of(plan, at, GAMMA, n, o)
            _glance_at(plan, k, 1, 1, g, n, o, base)
            denormalise(g, centred, scales, gamma, g_gamma, g_beta, o, batch, padded)
            if plan[GLANCES]:
                _measure(plan, k, 1, gamma, g_gamma, n, 1, o, o)
        _glance_at(plan, k, 0, 1, g, n, o, base)
        if plan[at + BIASED]:
            sum_rows(g, _of(plan, at, G_BIAS, n, o), o, batch, padded)
        examples = base + 4 * plan[at + AT_EXAMPLES]
        into = plan[at + G_WEIGHT] + 4 * n * plan[at + G_WEIGHT + 1]
        if plan[at + G_WEIGHT] and wide == i:
            multiply(here, padded, 1, examples, wide, into, wide, o, batch, wide // LANES)
        else:
            multiply(here, padded, 1, examples, wide, product, wide, o, batch, wide // LANES)
            if plan[at + G_WEIGHT]:
                copy_rows(_floats(product, o * wide), _floats(into, o * i), o, i, wide, i)
            else:
                _measure(
                    plan, k, 0, _of(plan, at, WEIGHT, n, o * i), _floats(product, o * wide), n, o, i, wide
                )
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
