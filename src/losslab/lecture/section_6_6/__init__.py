"""Section 6.6: surprises.

`connected` is about simple paths between minima (C62), `isolated` about the barriers on straight lines
(C63); `pairs` holds the networks of both. `tickets` is about lottery tickets and the size of networks (C65 to
C68), from the runs of `ticket_runs`.
"""

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_6.connected import C62
from losslab.lecture.section_6_6.isolated import C63
from losslab.lecture.section_6_6.tickets import C65, C66, C67, C68

CLAIMS: list[Claim] = [C62, C63, C65, C66, C67, C68]

__all__ = ["CLAIMS"]
