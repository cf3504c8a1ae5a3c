"""Section 6.1: local minima, where they are global and where they are not.

`linear_networks` is about linear networks (C1), `residual_networks` about linear residual ones (C2),
`small_networks` about the bad minima of small nonlinear ones (C3), `width` about what width does to them
(C4). `permutations` is about the symmetries of a layer (C5), `saddles` about the passes between permuted
copies (C6), with the networks of `walls` whose copies are cut off, `averages` about what lies on the straight
way between them (C7). `certified` holds the searches whose ends the Hessian certifies.
"""

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_1.averages import C7
from losslab.lecture.section_6_1.linear_networks import C1
from losslab.lecture.section_6_1.permutations import C5
from losslab.lecture.section_6_1.residual_networks import C2
from losslab.lecture.section_6_1.saddles import C6
from losslab.lecture.section_6_1.small_networks import C3
from losslab.lecture.section_6_1.width import C4

CLAIMS: list[Claim] = [C1, C2, C3, C4, C5, C6, C7]

__all__ = ["CLAIMS"]
