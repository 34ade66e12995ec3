"""A third-party defense, described by a `defense.toml` beside its weights and its model code.

`read_manifest` reads and checks the description and executes nothing. `load_model` runs the submitted factory, so it is
called only in the process that runs model code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, cast

import numpy as np
import torch
from packaging.requirements import InvalidRequirement, Requirement
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from robustboard.errors import SubmissionError, first_line

_MAX_MANIFEST = 1 << 20
_FACTORY = re.compile(r"(?P<file>[^:]+\.py):(?P<function>[A-Za-z_]\w*)")

Text = Annotated[str, Field(min_length=1, max_length=400)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class SubmittedClaim(_Strict):
    """What the authors say: `value` of `metric` under `attack` at `eps`, and where they say it."""

    metric: Text
    value: Share
    attack: Text | None = None
    eps: Text | None = None
    source: Text | None = None


class DefenseSection(_Strict):
    """Who and what; see docs/add-a-defense.md for every key."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
    title: Text
    paper: HttpUrl | None = None
    authors: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    year: Annotated[int, Field(ge=1990, le=2100)] | None = None
    license: Text | None = None
    kind: Literal["empirical", "certified", "undefended"] = "empirical"
    architecture: Text | None = None
    extra_data: bool = False


class ModelSection(_Strict):
    """Where the code and the weights are, relative to the manifest."""

    factory: Text
    weights: Text
    files: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    requires: Annotated[tuple[Text, ...], Field(max_length=100)] = ()


class _Manifest(_Strict):
    defense: DefenseSection
    model: ModelSection
    claims: Annotated[tuple[SubmittedClaim, ...], Field(max_length=100)] = ()


class Submission(_Strict):
    """A checked manifest: every file exists inside the folder, and has a recorded sha256."""

    manifest: Path
    defense: DefenseSection
    model: ModelSection
    claims: tuple[SubmittedClaim, ...]
    code_sha256: str
    weights_sha256: str

    @property
    def folder(self) -> Path:
        """The folder of the manifest."""
        return self.manifest.parent

    @property
    def files(self) -> dict[str, Path]:
        """All that the model is built of, by its path within the folder: the manifest, the code and the weights."""
        code = self.model.factory.partition(":")[0]
        names = (self.manifest.name, code, *self.model.files, self.model.weights)
        return {name: self.folder / name for name in names}


def read_manifest(path: Path) -> Submission:
    """Read a defense.toml without running anything that it names.

    Raises:
        SubmissionError: with the first thing that is wrong, and where.
    """
    parsed = _parse(path)
    folder = path.resolve().parent
    match = _FACTORY.fullmatch(parsed.model.factory)
    if match is None:
        raise SubmissionError(f'{path}: model.factory must read "file.py:function", not {parsed.model.factory[:80]!r}.')
    code = [_inside(folder, match["file"], "model.factory")]
    code += [_inside(folder, name, "model.files") for name in parsed.model.files]
    weights = _inside(folder, parsed.model.weights, "model.weights")
    if weights.suffix not in (".safetensors", ".npz", ".pt"):
        raise SubmissionError(f"{path}: model.weights must end in .safetensors, .npz or .pt, not {weights.name!r}.")
    _check_requirements(path, parsed.model.requires)
    return Submission(
        manifest=path.resolve(),
        defense=parsed.defense,
        model=parsed.model,
        claims=parsed.claims,
        code_sha256=_digest(*code),
        weights_sha256=_digest(weights),
    )


def _parse(path: Path) -> _Manifest:
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            raise SubmissionError(f"{path} is larger than one megabyte, so it is not a defense.toml.")
        return _Manifest.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise SubmissionError(f"There is no file {path}; give the path of a defense.toml.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SubmissionError(f"{path} cannot be read: {error}.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SubmissionError(f"{path} is not valid TOML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the manifest"
        raise SubmissionError(f"{path}: {where}: {first['msg']}.") from error


def _inside(folder: Path, name: str, key: str) -> Path:
    """The file `name` of the folder; a path or a link that leaves the folder is refused."""
    try:
        file = (folder / name).resolve()
        found = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise SubmissionError(f"{key} = {name[:80]!r} is not a file name: {first_line(error)}.") from error
    if not file.is_relative_to(folder):
        raise SubmissionError(f"{key} = {name[:80]!r} leads out of the submission's folder; keep every file inside it.")
    if not found:
        raise SubmissionError(f"{key} = {name[:80]!r}: there is no such file in {folder}.")
    return file


def _check_requirements(path: Path, requirements: tuple[str, ...]) -> None:
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise SubmissionError(f"{path}: model.requires has {text!r}, which is not a requirement.") from error
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError as error:
            raise SubmissionError(f"The submission needs {text}; install it first: pip install '{text}'.") from error
        if not requirement.specifier.contains(installed, prereleases=True):
            raise SubmissionError(f"The submission needs {text}, but version {installed} is installed.")


def _digest(*files: Path) -> str:
    """The sha256 of one file, or of the sha256 digests of several in their order."""
    digests = []
    for file in files:
        with file.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256"))
    return (
        digests[0].hexdigest()
        if len(digests) == 1
        else hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
    )


def load_model(submission: Submission) -> nn.Module:
    """Build the submitted network and load its weights, strictly by name; the result is in eval mode.

    This runs the submission's code.

    Raises:
        SubmissionError: if the factory fails, or the weights do not fit it.
    """
    model = _call_factory(submission)
    state = _read_weights(submission.folder / submission.model.weights)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise SubmissionError(
            f"{submission.model.weights} does not fit the network: it lacks {_some(missing)} and has "
            f"{_some(unknown)} that the network does not."
        )
    for name, value in state.items():
        if tuple(value.shape) != expected[name]:
            raise SubmissionError(
                f"{submission.model.weights}: {name} has shape {tuple(value.shape)}, but the network wants "
                f"{expected[name]}."
            )
        if not bool(torch.isfinite(value).all()):
            raise SubmissionError(f"{submission.model.weights}: {name} has NaN or infinite values.")
    model.load_state_dict(state)
    return model.eval()


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) if names else "nothing"


def _call_factory(submission: Submission) -> nn.Module:
    match = cast("re.Match[str]", _FACTORY.fullmatch(submission.model.factory))
    where = submission.model.factory
    try:
        module = _import_file(submission.folder, match["file"])
        factory = getattr(module, match["function"], None)
        if factory is None:
            raise SubmissionError(f"{match['file']} has no function {match['function']!r}.")
        model = factory()
    except SubmissionError:
        raise
    except (Exception, SystemExit) as error:
        raise SubmissionError(f"{where} failed to build the model: {first_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise SubmissionError(f"{where} must return a torch.nn.Module, not {type(model).__name__}.")
    return model


def _import_file(folder: Path, name: str) -> ModuleType:
    # The submission's further files are imported by their plain names, so its folder comes first on the path; its own
    # file gets a name that replaces no installed module.
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("submitted_model", folder / name)
    if spec is None or spec.loader is None:
        raise SubmissionError(f"{name} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SubmissionError(
            f"{file.name} cannot be read as weights (truncated, or not what its ending says): {first_line(error)}."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SubmissionError(f"{file.name} must hold a state_dict: names and tensors, nothing else.")
    return {str(name): value for name, value in state.items()}
