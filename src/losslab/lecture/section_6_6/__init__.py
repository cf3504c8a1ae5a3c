"""Section 6.6: surprises.

`connected` is about simple paths between minima (C62), `isolated` about the barriers on straight lines
(C63); `pairs` holds the networks of both. `level_sets` is about walks away from a minimum (C64). `tickets` is
about sparse sub-networks that train as well as the whole, and about how large networks need to be (C65 to
C68); `ticket_runs` draws its lottery.
"""

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_6.connected import C62
from losslab.lecture.section_6_6.isolated import C63
from losslab.lecture.section_6_6.level_sets import C64
from losslab.lecture.section_6_6.tickets import C65, C66, C67, C68

CLAIMS: list[Claim] = [C62, C63, C64, C65, C66, C67, C68]

__all__ = ["CLAIMS"]
