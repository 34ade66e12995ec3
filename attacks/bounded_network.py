"""A classifier as auto_LiRPA sees it: lower bounds on its margins over a box or a ball of inputs.

IBP: Gowal et al. 2018 (arXiv 1810.12715). CROWN: Zhang et al. 2018 (arXiv 1811.00866). CROWN-IBP: Zhang et al. 2020
(arXiv 1906.06316). alpha-CROWN: Xu et al. 2021 (arXiv 2011.13824). auto_LiRPA: Xu et al. 2020 (arXiv 2002.12920).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from robustboard.attacks import lirpa_compat
from robustboard.attacks.aliasing import require_no_stale_reads
from robustboard.attacks.ball_perturbation import ball_in_box
from robustboard.attacks.bounded_view import casts_hold, patches_hold, separate_examples, share_buffers, shared_view
from robustboard.attacks.normalisation import split_normalisation
from robustboard.errors import BoundsError, first_line

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
Slope = Literal["adaptive", "same"]


@dataclass(frozen=True)
class Ball:
    """An L2 ball in pixel units: centres (N, C, H, W) and a radius that is already rounded up."""

    centre: Tensor
    eps: float


class BoundedNetwork:
    """An auto_LiRPA view of a classifier, built once and then asked for bounds batch by batch.

    The view shares the classifier's parameters and running statistics, so bounds taken during training are bounds of
    the weights of that moment and gradients reach them. The classifier itself is left as it is (mode, hooks,
    `requires_grad`); the view is always the classifier in eval mode. A leading per-channel normalisation is split off.

    Args:
        model: float images (N, C, H, W) in, logits (N, K) out.
        example: one image, (1, C, H, W); only its shape, device and type count.
        classes: the number of classes K.
        slope: the lower line through an unstable ReLU. `"adaptive"` is CROWN's choice of slope 0 or 1; `"same"` takes
            the slope of the upper line (Fast-Lin, Neurify, MixTrain's symbolic intervals) and mixes in no intervals.

    Raises:
        BoundsError: if auto_LiRPA is missing, does not know one of the model's operators, or computes another function.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, classes: int, slope: Slope = "adaptive") -> None:
        self._package = lirpa_compat.load()
        self.classes = classes
        self._slope = slope
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._shape = tuple(example.shape[1:])
        self.dtype, self.device = example.dtype, example.device
        try:
            view = shared_view(model)
            self.normalisation, core = split_normalisation(view, self._shape[0])
            with self._working():
                # Drawn, not zero: a mistraced network may agree at zero.
                probe = torch.rand(3, *self._shape, generator=torch.Generator().manual_seed(0)).to(example)
                require_no_stale_reads(view, probe[:1])
                self.patches = self._shape[1] == self._shape[2]
                self.network = self._build(core, probe[:1])
                if self.patches and not patches_hold(self.network):
                    self.patches = False
                    self.network = self._build(core, probe[:1])
                if not casts_hold(self.network):
                    raise BoundsError("auto_LiRPA would bound a rounding of this network as if it were none.")
                self._one_by_one = not self._computes(view, probe)
                if self._one_by_one and not self._computes(view, probe[:1]):
                    raise BoundsError(
                        "auto_LiRPA's view of this network computes other logits than the network itself."
                    )
        except BoundsError:
            raise
        except Exception as error:  # whatever the model's code or auto_LiRPA raises becomes one sentence
            raise BoundsError(f"auto_LiRPA cannot bound this network: {first_line(error)}.") from error
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def margins(
        self,
        labels: Tensor,
        *,
        lower: Tensor,
        upper: Tensor,
        method: str,
        ball: Ball | None = None,
        iterations: int = 20,
    ) -> Tensor:
        """Lower bounds on z_y - z_j over all allowed inputs, for the K - 1 classes j != y in rising order.

        Args:
            labels: y, int64 (N,).
            lower: the box's lower end in pixel units, (N, C, H, W).
            upper: its upper end.
            method: one of `METHODS`. IBP, CROWN-IBP and CROWN are differentiable in the parameters.
            ball: an L2 ball that the inputs lie in as well; IBP has no use for it.
            iterations: alpha-CROWN's budget of optimisation steps.

        Returns:
            Tensor (N, K - 1) in the type of the example.
        """
        if self._one_by_one and len(labels) > 1:
            parts = [
                self.margins(
                    labels[i : i + 1],
                    lower=lower[i : i + 1],
                    upper=upper[i : i + 1],
                    method=method,
                    ball=None if ball is None else Ball(ball.centre[i : i + 1], ball.eps),
                    iterations=iterations,
                )
                for i in range(len(labels))
            ]
            return torch.cat(parts)
        low, high = self.normalisation.box(lower.to(self.dtype), upper.to(self.dtype))
        inputs, specification = self._perturbed(low, high, ball), self._specification(labels)
        with self._working(), self._parameters_kept(frozen=method == "alpha-crown"):
            if method == "ibp":
                return self._compute(inputs, specification, "IBP")
            if method == "crown-ibp":
                return self._compute(inputs, specification, "CROWN-IBP")
            self._first_layer_by_intervals(allowed=ball is None)
            if method == "crown" or not self.network.optimizable_activations:
                return self._compute(inputs, specification, "CROWN")
            return self._alpha_crown(inputs, specification, iterations)

    def coefficients(self, labels: Tensor, *, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The linear functions of the pixels that CROWN finds below the margins z_y - z_j over a box, j != y rising.

        With `slope="same"` the function above a margin has the same coefficients, so these are the interval gradient
        of Wang et al. 2019 (arXiv 1906.02282), up to its sign.

        Args:
            labels: y, int64 (N,).
            lower: the box's lower end in pixel units, (N, C, H, W).
            upper: its upper end.

        Returns:
            The least values of the functions, (N, K - 1), which are CROWN's bounds, and what each function gains per
            unit of each pixel, (N, K - 1, C, H, W); detached.
        """
        if self._one_by_one and len(labels) > 1:
            parts = [
                self.coefficients(labels[i : i + 1], lower=lower[i : i + 1], upper=upper[i : i + 1])
                for i in range(len(labels))
            ]
            return torch.cat([bound for bound, _ in parts]), torch.cat([rows for _, rows in parts])
        low, high = self.normalisation.box(lower.to(self.dtype), upper.to(self.dtype))
        inputs, specification = self._perturbed(low, high, None), self._specification(labels)
        output, source = self.network.output_name[0], self.network.input_name[0]
        with torch.no_grad(), self._working(), self._parameters_kept(frozen=False):
            self._first_layer_by_intervals(allowed=True)
            bound, _, found = self.network.compute_bounds(
                x=(inputs,),
                C=specification,
                method="CROWN",
                bound_upper=False,
                return_A=True,
                needed_A_dict={output: [source]},
            )
        rows = found[output][source]["lA"].reshape(*bound.shape, *self._shape)
        return bound, rows * self.normalisation.scale.to(rows).view(-1, 1, 1)

    def scatter(self, margins: Tensor, labels: Tensor) -> Tensor:
        """Margins (N, K - 1) as (N, K), with +inf at the label."""
        full = margins.new_full((len(labels), self.classes), torch.inf)
        return full.scatter(1, self._others(labels), margins)

    def _build(self, core: nn.Module, probe: Tensor) -> Any:
        options = {
            "conv_mode": "patches" if self.patches else "matrix",
            # The releases read the slope under different names, and each ignores the other's.
            "relu": "same-slope" if self._slope == "same" else "adaptive",
            "activation_bound_option": "same-slope" if self._slope == "same" else "adaptive",
            "sparse_intermediate_bounds": self._slope == "adaptive",
            # Always leave out the stable neurons, however few they are: the choice must not depend on the batch.
            "minimum_sparsity": 1.0,
            # Both fail in 0.3.
            "sparse_features_alpha": False,
            "sparse_spec_alpha": False,
            # Would share slopes or not depending on how many neurons of the whole batch are unstable.
            "use_full_conv_alpha": False,
        }
        with lirpa_compat.log_lines() as lines:
            try:
                network = self._package.BoundedModule(core, probe, bound_opts=options, device=probe.device)
            except NotImplementedError as error:
                names = sorted({name for line in lines for name in re.findall(r"^Name: (?:onnx::)?([^,]+)", line)})
                operators = ", ".join(names) or first_line(error)
                raise BoundsError(f"auto_LiRPA cannot bound this network: it has no bounds for {operators}.") from error
        if any(type(node).__name__ != "BoundRelu" for node in network.optimizable_activations):
            # With both, alpha-CROWN of 0.3 fails on a convolution before a sigmoid or a tanh.
            network.bound_opts["sparse_intermediate_bounds"] = False
        share_buffers(network, core)
        separate_examples(network)
        return network

    def _computes(self, view: nn.Module, probe: Tensor) -> bool:
        """Whether auto_LiRPA's network gives the logits of the network itself.

        A reshape written with the batch's size (`x.view(x.size(0), -1)`) is traced as a constant. Such a view is right
        for one example at a time only.
        """
        with torch.no_grad():
            expected = view(probe)
            if expected.shape != (len(probe), self.classes):
                raise BoundsError(
                    f"The network gives logits of shape {tuple(expected.shape)} for {len(probe)} images and "
                    f"{self.classes} classes, not ({len(probe)}, {self.classes})."
                )
            try:
                seen = self.network(self.normalisation.apply(probe).to(self.dtype))
            except RuntimeError:
                return False
        close = 1e-3 * (1 + expected.abs().max())
        return seen.shape == expected.shape and bool(((seen - expected).abs() <= close).all())

    def _perturbed(self, low: Tensor, high: Tensor, ball: Ball | None) -> Any:
        package = self._package
        if ball is None:
            perturbation = package.PerturbationLpNorm(norm=torch.inf, eps=None, x_L=low, x_U=high)
            return package.BoundedTensor((low + high) / 2, perturbation)
        centre = self.normalisation.apply(ball.centre).to(self.dtype)
        # In normalised coordinates an L2 ball is an ellipsoid with one half-axis a channel.
        half_axes = (self.normalisation.scale.abs() * ball.eps).to(centre)
        half_axes = torch.nextafter(half_axes, torch.full_like(half_axes, torch.inf)).view(-1, 1, 1)
        return package.BoundedTensor(centre, ball_in_box(half_axes, low, high))

    def _others(self, labels: Tensor) -> Tensor:
        index = torch.arange(self.classes - 1, device=labels.device).expand(len(labels), -1)
        return index + (index >= labels[:, None]).long()

    def _specification(self, labels: Tensor) -> Tensor:
        identity = torch.eye(self.classes, dtype=self.dtype, device=labels.device)
        return identity[labels].unsqueeze(1) - identity[self._others(labels)]

    def _compute(self, inputs: Any, specification: Tensor, method: str) -> Tensor:
        lower, _ = self.network.compute_bounds(x=(inputs,), C=specification, method=method, bound_upper=False)
        return cast("Tensor", lower)

    def _alpha_crown(self, inputs: Any, specification: Tensor, iterations: int) -> Tensor:
        # Patience counts iterations in which no example of the batch improved: it would couple the examples.
        budget = {"iteration": iterations, "early_stop_patience": iterations + 1}
        self.network.set_bound_opts({"optimize_bound_args": budget})
        with torch.enable_grad():
            return self._compute(inputs, specification, "CROWN-Optimized").detach()

    def _first_layer_by_intervals(self, *, allowed: bool) -> None:
        # For a box the interval bound of a first affine layer is exact; for a ball the linear one is tighter.
        self.network.__dict__.pop("check_IBP_first_linear", None)
        if not allowed:
            self.network.__dict__["check_IBP_first_linear"] = lambda node: False

    @contextlib.contextmanager
    def _parameters_kept(self, *, frozen: bool) -> Iterator[None]:
        """Keep auto_LiRPA from unfreezing parameters, and alpha-CROWN's backward passes from adding to gradients."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        for parameter in trained if frozen else ():
            parameter.requires_grad_(requires_grad=False)
        for node in self.network.modules():
            # A node sets its parameter's `requires_grad` to its own mode: let it set what is already there.
            if isinstance(getattr(node, "param", None), nn.Parameter):
                node.training = node.param.requires_grad
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(requires_grad=True)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        # auto_LiRPA creates tensors without naming a type, so a float64 network needs float64 as torch's default.
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with lirpa_compat.quiet():
                yield
        finally:
            torch.set_default_dtype(before)
