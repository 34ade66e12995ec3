"""The cascade beside AutoAttack, pooled over networks, radii and attack seeds: no weaker, by paired counts."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from cases import DIGITS, DIGITS_RADII, digits, reseeded
from scipy.stats import binomtest

from robustboard.bench.cascade import judge
from robustboard.bench.examiner import Examiner
from robustboard.bench.session import LocalSession
from robustboard.bench.verdicts import Verdicts
from robustboard.defenses.adapter import NoProgress

SEEDS = range(3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_more_survives_the_cascade_than_autoattack(capsys):
    """Examples that only one of the two breaks: were the cascade weaker, more of them would be AutoAttack's."""
    from pyautoattack import AutoAttack

    torch.set_num_threads(1)
    counts = np.zeros(4, dtype=int)
    lines = []
    total = 0
    for name in DIGITS:
        case = digits(name)
        model, examples = case.model, case.examples
        images, labels = examples.tensor(), torch.from_numpy(examples.labels)
        for eps in DIGITS_RADII:
            for seed in SEEDS:
                one = reseeded(case.track, seed, eps)
                verdicts = Verdicts(examples.hashes, examples.labels)
                judge(Examiner(LocalSession(model, torch.device("cpu")), one, examples, NoProgress()), verdicts)
                assert not verdicts.contradictions()
                ours = verdicts.certified | verdicts.open
                attack = AutoAttack(model, norm="Linf", eps=one.threat.radius, seed=seed, device="cpu")
                adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
                with torch.no_grad():
                    theirs = (model(adversarial).argmax(dim=1) == labels).numpy()
                assert not (verdicts.certified & ~theirs).any(), "AutoAttack breaks a certified example"
                found = [int(flags.sum()) for flags in (ours, theirs, ours & ~theirs, theirs & ~ours)]
                counts += found
                total += len(labels)
                lines.append(f"{name} eps {eps} seed {seed}: ours {found[0]}, AutoAttack {found[1]}, n = {len(labels)}")
    only_theirs, only_ours = int(counts[2]), int(counts[3])
    lines += [
        f"robust: ours {counts[0]} and AutoAttack {counts[1]} of {total}",
        f"broken by AutoAttack alone {only_theirs}, by the cascade alone {only_ours}",
    ]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    if only_theirs + only_ours:
        assert binomtest(only_theirs, only_theirs + only_ours, 0.5, alternative="greater").pvalue > 0.01
    assert counts[0] <= counts[1] + 0.001 * total
