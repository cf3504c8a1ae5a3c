"""How numbers are written for readers."""

from __future__ import annotations

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A number to four digits, or to two with a power of ten; a dash for NaN.

    Example:
        >>> [number(x) for x in (0.12345, 12345.6, 3.2e-16, -1e-9, 0.0, float("inf"), float("nan"))]
        ['0.1235', '12 346', '3.2 × 10⁻¹⁶', '−10⁻⁹', '0', '∞', '–']
    """
    if math.isnan(value):
        return "–"
    sign, size = ("−" if value < 0 else ""), abs(value)
    if math.isinf(size):
        return f"{sign}∞"
    if size == 0 or 1e-3 <= size < 1e3:
        return f"{sign}{size:.4g}"
    if 1e3 <= size < 1e6:
        return f"{sign}{size:,.0f}".replace(",", " ")
    digits, power = f"{size:.1e}".split("e")
    factor = "" if digits == "1.0" else f"{digits.removesuffix('.0')} × "
    return f"{sign}{factor}10{str(int(power)).translate(_SUPERSCRIPTS)}"


def interval(estimate: float, ends: tuple[float, float]) -> str:
    """An interval in brackets; nothing when an end is NaN or the interval is the estimate alone.

    Example:
        >>> interval(1.0, (0.9, 1.1)), interval(1.0, (1.0, 1.0))
        ('[0.9, 1.1]', '')
    """
    low, high = ends
    if math.isnan(low) or math.isnan(high) or low == estimate == high:
        return ""
    return f"[{number(low)}, {number(high)}]"


def duration(seconds: float) -> str:
    """A time span.

    Example:
        >>> duration(0.002), duration(0.034), duration(12.34), duration(125)
        ('< 0.01 s', '0.03 s', '12.3 s', '2 min 5 s')
    """
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    if 0 < seconds < 0.01:
        return "< 0.01 s"
    return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
