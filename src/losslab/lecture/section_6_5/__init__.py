"""Section 6.5: initialisation, and what it does to signals and gradients.

`moments` is about one linear unit (C54, C55), `tanh` about one activation (C56, C57), `depth` and `xavier`
about many layers, forward and backward (C58, C59, C60), `gains` and `glorot` about training from there (C53,
C61). The other files hold what they share.
"""

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_5.depth import C58
from losslab.lecture.section_6_5.gains import C53
from losslab.lecture.section_6_5.glorot import C61
from losslab.lecture.section_6_5.moments import C54, C55
from losslab.lecture.section_6_5.tanh import C56, C57
from losslab.lecture.section_6_5.xavier import C59, C60

CLAIMS: list[Claim] = [C53, C54, C55, C56, C57, C58, C59, C60, C61]

__all__ = ["CLAIMS"]
