"""Which claims exist, and how a user names them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from functools import cache

from losslab.errors import unknown
from losslab.lecture.claim import Claim

SECTIONS = (
    "losslab.lecture.section_6_1",
    "losslab.lecture.section_6_2",
    "losslab.lecture.section_6_3",
    "losslab.lecture.section_6_4",
    "losslab.lecture.section_6_5",
    "losslab.lecture.section_6_6",
)
"""The packages that hold the claims; each exposes ``CLAIMS``, a list."""


@cache
def claims() -> dict[str, Claim]:
    """Every claim that is built, by id, in the order of the notes."""
    built = [claim for section in SECTIONS for claim in importlib.import_module(section).CLAIMS]
    by_id = {claim.id: claim for claim in built}
    assert len(by_id) == len(built), "two claims share an id"
    return dict(sorted(by_id.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts C9 before C10.

    Example:
        >>> sorted(["C10", "C9"], key=natural)
        ['C9', 'C10']
    """
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def select(
    claim_ids: Iterable[str] = (), sections: Iterable[str] = (), known: Mapping[str, Claim] | None = None
) -> list[Claim]:
    """The claims that are named by id or lie in one of the sections; all when nothing is named.

    Args:
        claim_ids: Ids in any case, ``"C16"``.
        sections: ``"6.3"`` selects 6.3 and 6.3.1, 6.3.2, ...; a leading § is allowed.
        known: The claims to choose from, all that are built by default.

    Raises:
        LosslabError: An id or a section that no claim has.
    """
    known = claims() if known is None else known
    ids = {name.upper() for name in claim_ids}
    wanted = {name.lstrip("§") for name in sections}
    parents = {parent for claim in known.values() for parent in _parents(claim.section)}
    for name in sorted(ids - set(known)):
        raise unknown("claim", name, known)
    for name in sorted(wanted - parents):
        raise unknown("section", name, sorted(parents))
    everything = not ids and not wanted
    return [
        claim
        for claim in known.values()
        if everything or claim.id in ids or wanted.intersection(_parents(claim.section))
    ]


def _parents(section: str) -> list[str]:
    parts = section.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
