"""Loops over a member's values for numba: batch norm, ReLU, cross-entropy and their ways back, and moments.

Values ``[rows, padded]`` have one row a unit and one number an example. As for `losslab.engine.vectors`:
numba's cache asks whether `losslab.engine.machine` has changed, not this file.
"""

from __future__ import annotations

import numpy as np

from losslab.engine.vectors import fast


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
        row = z[c * padded : c * padded + batch]
        for b in range(batch):
            largest[b] = max(largest[b], row[b])
    for c in range(classes):
        row, sent = z[c * padded : c * padded + batch], g[c * padded : c * padded + batch]
        for b in range(batch):
            e = _exponential(row[b] - largest[b])
            sent[b] = e
            sums[b] += e
    total = np.float32(0)
    for b in range(batch):  # in a loop of its own: else a small loss would be added to large logits, and lost
        largest[b] -= z[labels[b] * padded + b]
    for b in range(batch):
        total += np.log(sums[b]) + largest[b]
        sums[b] = np.float32(1) / (sums[b] * np.float32(batch))
    for c in range(classes):
        sent = g[c * padded : c * padded + batch]
        for b in range(batch):
            sent[b] *= sums[b]
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


@fast
def add_to_rows(h, bias, rows, padded):
    """Adds a bias to each row."""
    for r in range(rows):
        row, shift = h[r * padded : (r + 1) * padded], bias[r]
        for b in range(padded):
            row[b] += shift


@fast
def sum_rows(g, into, rows, batch, padded):
    """The sum of each row."""
    for r in range(rows):
        row, total = g[r * padded : r * padded + batch], np.float32(0)
        for b in range(batch):
            total += row[b]
        into[r] = total


@fast
def copy_rows(source, target, rows, columns, wide, tall):
    """Rows of one stride to rows of another."""
    for r in range(rows):
        start, end = source[r * wide : r * wide + columns], target[r * tall : r * tall + columns]
        for c in range(columns):
            end[c] = start[c]


@fast
def unit_moments(h, kept, rows, batch, padded):
    """Of each row the mean and the (biased) variance, kept; the share of rows with no positive value."""
    silent = 0
    for r in range(rows):
        row = h[r * padded : r * padded + batch]
        total, positive = np.float32(0), np.float32(0)
        for b in range(batch):
            total += row[b]
            positive += np.float32(1) if row[b] > 0 else np.float32(0)
        middle, square = total / np.float32(batch), np.float32(0)
        for b in range(batch):
            away = row[b] - middle
            square += away * away
        kept[r], kept[rows + r] = middle, square / np.float32(batch)
        silent += positive == 0
    return np.float32(silent / rows)


@fast
def moments(kept, rows, told, constant):
    """Of all values, from `unit_moments`: mean, variance, that within units, and the share of constant units.

    A unit is constant if its variance is at most ``constant`` times the mean square of all values.
    """
    middle, within, between, flat = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    means, variances = kept[:rows], kept[rows : 2 * rows]
    for r in range(rows):
        middle += means[r]
        within += variances[r]
    middle, within = middle / np.float32(rows), within / np.float32(rows)
    for r in range(rows):
        away = means[r] - middle
        between += away * away
    total = within + between / np.float32(rows)
    least = constant * (total + middle * middle)
    for r in range(rows):
        flat += np.float32(1) if variances[r] <= least else np.float32(0)
    told[0], told[1], told[2], told[3] = middle, total, within, flat / np.float32(rows)


@fast
def sum_of(values, rows, columns, wide):
    """The sum, and the sum of squares, in double precision row by row."""
    total, square = np.float64(0), np.float64(0)
    for r in range(rows):
        row = values[r * wide : r * wide + columns]
        one, two = np.float32(0), np.float32(0)
        for j in range(columns):
            one += row[j]
            two += row[j] * row[j]
        total += np.float64(one)
        square += np.float64(two)
    return total, square


@fast
def distance(values, earlier, rows, columns):
    """The sums of squared differences, and of squared earlier values, in double precision row by row."""
    apart, square = np.float64(0), np.float64(0)
    for r in range(rows):
        row, before = values[r * columns : (r + 1) * columns], earlier[r * columns : (r + 1) * columns]
        one, two = np.float32(0), np.float32(0)
        for j in range(columns):
            away = row[j] - before[j]
            one += away * away
            two += before[j] * before[j]
        apart += np.float64(one)
        square += np.float64(two)
    return apart, square
