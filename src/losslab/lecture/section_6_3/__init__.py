"""The claims of §6.3: Newton's method, and the rules that adapt a rate to each weight.

C18 to C20 are about gradient descent and Newton's method (`quadratics`, `newton`, `softmax`, `expense`),
C21 to C24 about AdaGrad (`diagonal`, `adagrad`, `decay`, `jumping`), C25 and C26 about RMSProp (`rmsprop`),
C27 about momentum (`momentum`), C28 to C32 about Adam (`adam` and its parts). Where gradients have a closed
form the package's rules are driven by hand (`driving`, `landscapes`), everywhere else by the engine.
"""

from __future__ import annotations

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_3 import adagrad, adam, diagonal, momentum, quadratics, rmsprop

CLAIMS: list[Claim] = [
    *quadratics.CLAIMS,
    *diagonal.CLAIMS,
    *adagrad.CLAIMS,
    *rmsprop.CLAIMS,
    *momentum.CLAIMS,
    *adam.CLAIMS,
]

__all__ = ["CLAIMS"]
