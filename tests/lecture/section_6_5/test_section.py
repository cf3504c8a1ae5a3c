"""The section as a whole."""

from __future__ import annotations

from losslab.lecture import ERRATA, claims
from losslab.lecture.section_6_5 import CLAIMS


def test_the_claims_come_in_order_and_are_registered() -> None:
    assert [claim.id for claim in CLAIMS] == [f"C{k}" for k in range(53, 62)]
    for claim in CLAIMS:
        assert claims()[claim.id] is claim
        assert claim.section.startswith("6.5")
        assert claim.caveats
        assert all(claim.id in ERRATA[name].claims for name in claim.errata)
