"""An L2 ball as a perturbation for auto_LiRPA: bounded by its dual norm and by a box around it, whichever is tighter.

auto_LiRPA's own L2 perturbation ignores the pixel box, and its interval arithmetic takes every layer but a convolution
or a linear one for a point (the interval of a ball is stored as [x, x]). Here the interval is the box, which is sound
for every layer, and linear bounds use `a.x +- |half_axes * a|_2` where that is the tighter one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustboard.attacks import lirpa_compat


def ball_in_box(half_axes: Tensor, low: Tensor, high: Tensor) -> Any:
    """A perturbation: {x : |(x - centre) / half_axes|_2 <= 1 and low <= x <= high}, centred on the bounded tensor.

    Args:
        half_axes: (C, 1, 1), the radius along each channel.
        low: (N, C, H, W), the lower end of a box that holds all allowed inputs.
        high: its upper end.
    """
    package = lirpa_compat.load()
    patches = lirpa_compat.submodule("patches")

    class BallInBox(package.PerturbationLpNorm):  # type: ignore[misc, name-defined]
        def concretize(
            self,
            x: Tensor,
            A: Any,  # noqa: N803
            sign: int = -1,
            aux: Any = None,
            extra_constr: Any = None,
        ) -> Tensor | None:
            box: Tensor | None = super().concretize(x, A, sign=sign, aux=aux, extra_constr=extra_constr)
            if box is None:
                return None
            if isinstance(A, Tensor):
                rows = A.reshape(A.shape[0], A.shape[1], *x.shape[1:])
                centre = torch.einsum("bschw,bchw->bs", rows, x)
                radius = (rows * half_axes).flatten(2).norm(dim=-1)
            elif isinstance(A, patches.Patches) and not A.identity:
                centre = A.matmul(x)
                # The patches' own product leaves out what hangs over the image's edge.
                radius = A.create_similar(A.patches.square()).matmul(half_axes.square().expand_as(x)).sqrt()
            else:
                return box
            ball = (centre + sign * radius).reshape(box.shape)
            return torch.maximum(box, ball) if sign == -1 else torch.minimum(box, ball)

    return BallInBox(norm=torch.inf, eps=None, x_L=low, x_U=high)
