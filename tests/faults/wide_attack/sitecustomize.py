"""A fault for tests: in the model's process, PGD is allowed 1.1 times the radius."""

import sys
from fractions import Fraction

if "robustboard.bench.worker" in sys.orig_argv:
    from robustboard.bench import operations

    _pgd = operations.pgd

    def pgd(*args, threat, **kwargs):
        return _pgd(*args, threat=threat.scaled(Fraction(11, 10)), **kwargs)

    operations.pgd = pgd
