"""What an adversary can do to a classifier, and provably cannot.

The attacks here are one a module. The reference engine (`robustboard.attacks.autoattack`) and the verified bounds
(`robustboard.attacks.bounds`) bring heavy libraries along, so they are imported by name where they are used.
"""

from robustboard.attacks.counting import PassCounter
from robustboard.attacks.fgsm import fgsm
from robustboard.attacks.jsma import JsmaResult, jsma
from robustboard.attacks.losses import LOSSES, applicable_losses, cross_entropy, dlr, margin_loss
from robustboard.attacks.pgd import ascend, pgd
from robustboard.attacks.threat import ThreatModel

__all__ = [
    "LOSSES",
    "JsmaResult",
    "PassCounter",
    "ThreatModel",
    "applicable_losses",
    "ascend",
    "cross_entropy",
    "dlr",
    "fgsm",
    "jsma",
    "margin_loss",
    "pgd",
]
