"""The mends that auto_LiRPA 0.3 needs are applied once, only where needed, and leave torch's own behaviour alone."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch.nn import functional

from robustboard.attacks import lirpa_compat
from robustboard.errors import BoundsError

if importlib.util.find_spec("auto_LiRPA") is None:
    pytest.skip("auto_LiRPA is not installed", allow_module_level=True)


def test_loading_says_nothing_and_leaves_logging_as_it_was() -> None:
    """A library must not print, nor send every program's log to its standard output."""
    program = (
        "import logging, warnings; from robustboard.attacks import lirpa_compat; before = list(warnings.filters);"
        "lirpa_compat.load(); lirpa_compat.load();"
        "assert not logging.getLogger().handlers, logging.getLogger().handlers;"
        "assert warnings.filters == before, 'warning filters changed';"
        "logging.getLogger('auto_LiRPA.utils').error('hidden')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_package_is_one_sentence_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> types.ModuleType:
        if name == "auto_LiRPA":
            raise ModuleNotFoundError("No module named 'auto_LiRPA'", name="auto_LiRPA")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BoundsError, match=r"pip install --no-deps auto_LiRPA==0\.3"):
        lirpa_compat.load()


def test_loading_twice_mends_once() -> None:
    package = lirpa_compat.load()
    activation = lirpa_compat.submodule("operators.activation")
    first = (activation.torch, torch._C.Node.__getitem__, package.BoundedModule._named_members)
    assert lirpa_compat.load() is package
    assert (activation.torch, torch._C.Node.__getitem__, package.BoundedModule._named_members) == first


def test_torch_itself_keeps_its_clamp() -> None:
    lirpa_compat.load()
    assert isinstance(torch.clamp, types.BuiltinFunctionType)
    assert lirpa_compat.submodule("operators.activation").torch.relu is torch.relu


def test_inside_the_activations_gradient_passes_at_the_bounds_of_a_clamp() -> None:
    """Every alpha starts at 0 or 1: with a clamp that is flat there, alpha-CROWN silently returns CROWN."""
    lirpa_compat.load()
    clamp = lirpa_compat.submodule("operators.activation").torch.clamp
    values = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    clamped = clamp(values, min=0.0, max=1.0)
    (gradient,) = torch.autograd.grad(clamped.sum(), values)
    assert clamped.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert gradient.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((1, 1), (4, 4), {"stride": 2}),
        ((1, 1), (4, 4), {"stride": (3, 3), "padding": (1, 1), "output_padding": (2, 2)}),
        ((4, 3), (3, 4), {"stride": (2, 3)}),
        ((7, 7), (4, 4), {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "output_padding": (1, 0)}),
        ((5, 5), (3, 3), {"padding": 1}),
        ((5, 5), (3, 3), {"stride": 2, "dilation": 2}),
        ((5, 5), (3, 3), {"groups": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [0, 1, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inside_the_package_a_transposed_convolution_is_torchs_own(
    size: tuple[int, int], kernel: tuple[int, int], options: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    lirpa_compat.load()
    quick = importlib.import_module("auto_LiRPA.operators.convolution").F.conv_transpose2d
    assert quick is not functional.conv_transpose2d
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(count, 6, *size, generator=draws, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 2, *kernel, generator=draws, dtype=dtype)
    found, expected = (transpose(values, weight, **options) for transpose in (quick, functional.conv_transpose2d))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 1e-12)
    gradients = [torch.autograd.grad(one.square().sum(), values)[0] for one in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-3 if dtype == torch.float32 else 1e-10)


def test_nothing_is_mended_where_nothing_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer auto_LiRPA, numpy or torch that has what is needed stays untouched."""
    arraysetops = types.ModuleType("numpy.lib.arraysetops")
    monkeypatch.setitem(sys.modules, "numpy.lib.arraysetops", arraysetops)
    helper = importlib.import_module("torch.onnx.symbolic_helper")
    setter = object()
    monkeypatch.setitem(helper.__dict__, "_set_opset_version", setter)
    lirpa_compat.mend_before_import()
    assert not hasattr(arraysetops, "isin")
    assert helper._set_opset_version is setter

    newer: Any = types.ModuleType("auto_LiRPA.operators.newer")
    newer.torch = torch
    monkeypatch.setitem(sys.modules, newer.__name__, newer)
    monkeypatch.setattr(lirpa_compat, "_clamp_passes_gradient_at_its_bounds", lambda: True)
    lirpa_compat.mend_after_import()
    assert newer.torch is torch


def test_the_opset_setter_sets_what_torch_reads() -> None:
    lirpa_compat.load()
    settings = importlib.import_module("torch.onnx._internal.torchscript_exporter._globals").GLOBALS
    before = settings.export_onnx_opset_version
    try:
        importlib.import_module("torch.onnx.symbolic_helper")._set_opset_version(12)
        assert settings.export_onnx_opset_version == 12
    finally:
        settings.export_onnx_opset_version = before


def test_what_the_package_logs_can_be_heard() -> None:
    lirpa_compat.load()
    with lirpa_compat.log_lines() as lines:
        logging.getLogger("auto_LiRPA.utils").error("Name: %s", "onnx::Erf")
    logging.getLogger("auto_LiRPA.utils").error("later")
    assert lines == ["Name: onnx::Erf"]
