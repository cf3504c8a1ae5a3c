"""Section 6.2: stochastic gradient descent, and why it leaves saddle points.

`gradients` and `epochs` are about the estimate (C8, C9, C10), `convergence` about its price (C11),
`generalisation` and `sharpness` about the minima it finds (C12, C13), `saddles` about its use (C14), and
`quadratics` about the notes' argument for that (C15, C16, C17). The other files hold what they share or run.
"""

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_2.convergence import C11
from losslab.lecture.section_6_2.epochs import C10
from losslab.lecture.section_6_2.generalisation import C12
from losslab.lecture.section_6_2.gradients import C8, C9
from losslab.lecture.section_6_2.quadratics import C15, C16, C17
from losslab.lecture.section_6_2.saddles import C14
from losslab.lecture.section_6_2.sharpness import C13

CLAIMS: list[Claim] = [C8, C9, C10, C11, C12, C13, C14, C15, C16, C17]

__all__ = ["CLAIMS"]
