"""The one exception a user of losslab meets, and the sentence that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LosslabError(ValueError):
    """A mistake in what was asked, told in one sentence: what was got, what was wanted, what to do.

    The command line prints the sentence without a traceback and exits with code 2.

    Example:
        >>> raise LosslabError("lr is -1.0, a learning rate is positive: pass lr > 0")
        Traceback (most recent call last):
        ...
        losslab.errors.LosslabError: lr is -1.0, a learning rate is positive: pass lr > 0
    """


def first_line(error: BaseException) -> str:
    """An exception in one line: its kind and message; of a `LosslabError` what was wrong, without the advice.

    Example:
        >>> first_line(KeyError("labels")), first_line(LosslabError("one value has no variance: give two"))
        ("KeyError: 'labels'", 'one value has no variance')
    """
    lines = str(error).strip().splitlines()
    if isinstance(error, LosslabError):
        return lines[0].rpartition(": ")[0] or lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def unknown(kind: str, got: object, known: Iterable[str]) -> LosslabError:
    """The error for a name that is not in a list, naming its nearest neighbours.

    Args:
        kind: What the name stands for, e.g. ``"rule"``.
        got: The name that was given.
        known: Every name that would have been accepted.

    Returns:
        An error to raise; it names the three nearest names, or all of them when none is near.

    Example:
        >>> print(unknown("rule", "adm", ["adam", "sgd"]))
        no rule is named 'adm': did you mean 'adam'?
    """
    names = [str(name) for name in known]
    folded = {name.lower(): name for name in names}
    near = [folded[m] for m in difflib.get_close_matches(str(got).lower(), folded, n=3, cutoff=0.5)]
    if near:
        return LosslabError(f"no {kind} is named {got!r}: did you mean {', '.join(map(repr, near))}?")
    return LosslabError(f"no {kind} is named {got!r}: choose one of {', '.join(names) or '(none exist)'}")
