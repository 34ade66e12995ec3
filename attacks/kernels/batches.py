"""How many examples an attack takes at a time: as many as the device's memory for activations is fast for.

Measured with one thread on two networks of 10,000 and 15,000 activations an example, in a process that keeps the memory
that it frees: a step of an attack takes a fifth less time an example with 100 at a time than with 30, and with 150 no
less than with 100. A perceptron on tiny images has a tenth of them, and is fastest with ten times as many examples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CPU_BYTES, _LEAST, _MOST = 8 << 20, 16, 1024
# On a GPU the launch of a kernel costs more than what it does to few examples, and memory is the only limit. A search
# keeps a dozen images beside the activations and their gradients.
_GPU_SHARE, _KEPT = 0.25, 3


def examples_at_a_time(model: nn.Module, image: Tensor) -> int:
    """How many examples to attack together; no verdict depends on it.

    Args:
        model: in eval mode; it runs once.
        image: one image (1, C, H, W), on the model's device.

    >>> examples_at_a_time(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.zeros(1, 1, 8, 8))
    1024
    """
    activations = [image.numel()]

    def count(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor):
            activations.append(output.numel())

    # Scripted modules admit no hooks; what they hold inside is not counted then.
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    leaves = [module for module in plain if not any(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    need = sum(activations) * image.element_size()
    if image.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(image.device)
        return max(_LEAST, int(_GPU_SHARE * free / (_KEPT * need)))
    return min(max(_CPU_BYTES // need, _LEAST), _MOST)
