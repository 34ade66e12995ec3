"""The attacks that follow PGD, by the name of their ensemble.

`standard` has the four attacks of AutoAttack's standard version (Croce & Hein 2020, arXiv 2003.01690) as the board runs
them. They are no AutoAttack: they have its steps, targets and queries, but their own draws, which are keyed by the
example, and they leave out what a certificate has settled. `robustboard.attacks.autoattack` runs the authors' code.
`fast` is one attack of a tenth of their passes, for tracks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from robustboard.attacks.kernels.apgd import STEPS, TARGETS, apgd, apgd_targeted
from robustboard.attacks.kernels.fab import fab_targeted
from robustboard.attacks.kernels.fast import FORWARDS as FAST_FORWARDS
from robustboard.attacks.kernels.fast import fast
from robustboard.attacks.kernels.square import square
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import TrackError

STAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"standard": ("apgd_ce", "apgd_t", "fab_t", "square"), "fast": ("fast",)}
)
QUERIES = 5000

# Forward passes of an example that survives, with ten classes: for progress bars only.
FORWARDS: Mapping[str, int] = MappingProxyType(
    {
        "apgd_ce": STEPS + 2,
        "apgd_t": TARGETS * (STEPS + 1),
        "fab_t": TARGETS * (STEPS + 1),
        "square": QUERIES + 2,
        "fast": FAST_FORWARDS,
    }
)


def run(
    stage: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    targets: Tensor | None = None,
    most: int = TARGETS,
) -> Tensor:
    """Run one stage.

    Args:
        stage: one of those in `STAGES`.
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, on the model's device.
        labels: int64 (N,).
        threat: the ball.
        keys: what each example's draws are keyed by, N content hashes.
        seed: of the draws.
        targets: bool (N, K), the classes that no certificate excludes; None for all. The targeted stages try no other.
        most: how many classes the targeted stages try, the likeliest ones; the standard version tries nine.

    Returns:
        (N, C, H, W): the misclassified image of the ball where one was found, the clean image elsewhere.

    Raises:
        TrackError: for an unknown stage, or images that are too small for it.
        ModelError: if the model is in training mode, or its logits or input gradients are missing or not finite.
    """
    if stage == "apgd_ce":
        return apgd(model, images, labels, threat=threat, keys=keys, seed=seed)
    if stage == "apgd_t":
        return apgd_targeted(model, images, labels, threat=threat, keys=keys, seed=seed, targets=targets, most=most)
    if stage == "fab_t":
        return fab_targeted(model, images, labels, threat=threat, targets=targets, most=most)
    if stage == "square":
        return square(model, images, labels, threat=threat, keys=keys, seed=seed, queries=QUERIES)
    if stage == "fast":
        return fast(model, images, labels, threat=threat, keys=keys, seed=seed)
    raise TrackError(f"The attack {stage!r} is unknown; choose from {', '.join(FORWARDS)}.")
