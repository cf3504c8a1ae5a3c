"""Section 6.4: batch normalisation, and what it does to inputs, activations and the loss."""

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_4.activations import C40, C41, C47
from losslab.lecture.section_6_4.affine import C46
from losslab.lecture.section_6_4.backward import C37
from losslab.lecture.section_6_4.conditioning import C42
from losslab.lecture.section_6_4.covariate_shift import C50
from losslab.lecture.section_6_4.depth import C35
from losslab.lecture.section_6_4.first_order import C52
from losslab.lecture.section_6_4.forward import C36
from losslab.lecture.section_6_4.frozen import C43
from losslab.lecture.section_6_4.ghosts import C45
from losslab.lecture.section_6_4.inference import C44
from losslab.lecture.section_6_4.inputs import C33, C34
from losslab.lecture.section_6_4.lipschitz import C51
from losslab.lecture.section_6_4.noise import C48, C49
from losslab.lecture.section_6_4.rates import C38
from losslab.lecture.section_6_4.speed import C39

CLAIMS: list[Claim] = [
    C33,
    C34,
    C35,
    C36,
    C37,
    C38,
    C39,
    C40,
    C41,
    C42,
    C43,
    C44,
    C45,
    C46,
    C47,
    C48,
    C49,
    C50,
    C51,
    C52,
]

__all__ = ["CLAIMS"]
