"""Defensive distillation (Papernot et al. 2016, arXiv 1511.04508, sec. IV): train at a temperature, deploy without it.

A teacher is trained on the labels with softmax(z / T). Its probabilities, at the same T, are the labels of a student of
the same architecture, which is trained at T too. The student is deployed at T = 1: its logits, some T times larger than
usual, are not divided. The softmax then rounds to zeros and ones, and the gradients that an attack would follow to
zero; where the decision boundary runs has hardly changed (Carlini & Wagner 2016, arXiv 1607.04311).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.keyed import derive_seed
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, Claim, Defense, DefenseCard, Progress, TrainingData
from robustboard.defenses.batches import Batch
from robustboard.defenses.training import Objective, Recipe, fresh_model, sized, train


@dataclass(frozen=True, kw_only=True)
class DistillationHyper(Recipe):
    """Defensive distillation's hyper-parameters; the recipe is that of the teacher and again of the student.

    The loss at temperature T has gradients of about 1/T, which its last two hyper-parameters are for. Without either,
    SGD hardly moves: on MNIST (`cnn-small`, T = 100, three epochs each, lr 0.05) the student stayed at chance; a warm
    start gave 95.2 % clean accuracy, and a gain of 10 besides 98.4 %. Adam divides gradients by their size, so it needs
    no gain.

    Attributes:
        temperature: T, of the teacher, of its soft labels and of the student.
        warm_start_epochs: ordinary epochs (T = 1, hard labels) whose weights both the teacher and the student start
            from; 0 gives each random weights of its own, as in the paper. One is what Carlini & Wagner's code does.
        lr_gain: the learning rate at temperature T is `lr` times the smaller of T and this.
    """

    temperature: float = 100.0
    warm_start_epochs: int = 1
    lr_gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 1:
            raise ValueError(f"temperature must be at least 1, not {self.temperature:g}")
        if self.warm_start_epochs < 0 or self.lr_gain < 1:
            raise ValueError(
                "warm_start_epochs must not be negative and lr_gain at least 1, not "
                f"{self.warm_start_epochs} and {self.lr_gain:g}"
            )


class Distillation(Defense[DistillationHyper]):
    """Trains a student, at a temperature, on the probabilities of a teacher of the same architecture."""

    card = DefenseCard(
        name="distillation",
        title="Defensive distillation",
        paper="https://arxiv.org/abs/1511.04508",
        authors=("Nicolas Papernot", "Patrick McDaniel", "Xi Wu", "Somesh Jha", "Ananthram Swami"),
        year=2016,
        kind="empirical",
        summary="A student learns the softened probabilities of a teacher at temperature T, and is deployed at T = 1.",
        claims=(
            Claim(
                "jsma_success",
                0.0045,
                "MNIST, T = 100, targeted JSMA (95.89 % without the defense)",
                "quoted by an article on the paper",
            ),
            Claim(
                "jsma_success",
                0.0511,
                "CIFAR-10, T = 100, targeted JSMA (87.89 % without the defense)",
                "quoted by an article on the paper",
            ),
            Claim("gradient_reduction", 1e30, "gradients used to make adversarial examples, a factor", "abstract"),
        ),
    )
    hyper_type = DistillationHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> DistillationHyper:
        """The highest temperature of the paper; teacher and student each get the undefended network's epochs.

        A tenth of them, at least one, comes before as a warm start: on small data sets an epoch is but a few steps.
        """
        del threat
        sizes = sized(data, examples=300_000)
        return DistillationHyper(
            **sizes,
            warm_start_epochs=max(1, sizes["epochs"] // 10),
        )

    def fit(
        self,
        data: TrainingData,
        threat: ThreatModel,
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
        checkpoints: CheckpointStore,
    ) -> nn.Module:
        """Train the shared start, the teacher and the student; see `Defense.fit`. Each stage resumes by itself."""
        hyper = self.hyper(data, threat)
        stage = partial(
            train, data=data, threat=threat, seed=seed, device=device, progress=progress, checkpoints=checkpoints
        )
        teacher = fresh_model(hyper.architecture, data, seed=seed).to(device)
        student = fresh_model(hyper.architecture, data, seed=derive_seed(seed, "student")).to(device)
        if hyper.warm_start_epochs:
            plain = dataclasses.replace(hyper, epochs=hyper.warm_start_epochs)
            stage(teacher, hard_labels(teacher, temperature=1.0), recipe=plain, name="distillation-start")
            student = copy.deepcopy(teacher)
        warm = dataclasses.replace(hyper, lr=hyper.lr * min(hyper.temperature, hyper.lr_gain))
        stage(teacher, hard_labels(teacher, temperature=hyper.temperature), recipe=warm, name="distillation-teacher")
        objective = soft_labels(student, teacher, temperature=hyper.temperature)
        return stage(student, objective, recipe=warm, name="distillation-student")


def hard_labels(model: nn.Module, *, temperature: float) -> Objective:
    """CE(softmax(z / T), y), the teacher's loss, as a function of a mini-batch."""

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch.images) / temperature, batch.labels)

    return loss


def soft_labels(student: nn.Module, teacher: nn.Module, *, temperature: float) -> Objective:
    """CE(softmax(z / T), softmax(z_teacher / T)), the student's loss, as a function of a mini-batch.

    The teacher labels each mini-batch when it comes, in eval mode, so that augmented images have labels of their own;
    without augmentation that is the same as labelling the training set once.
    """
    teacher.eval()

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            probabilities = functional.softmax(teacher(batch.images) / temperature, dim=1)
        return functional.cross_entropy(student(batch.images) / temperature, probabilities)

    return loss
