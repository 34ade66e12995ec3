"""What a result was made with: enough to make it again."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

_PACKAGES = ("robustboard", "torchvision", "pyautoattack", "auto_LiRPA", "numpy", "pandas", "pillow", "scipy")


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that a verdict can depend on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def python_version() -> str:
    """Such as `3.11.7`."""
    return platform.python_version()


def machine() -> str:
    """Operating system and processor architecture, such as `Linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Measured on two cores: on digits (64 numbers) a second thread costs more than it brings. RiFT takes 58 s with two and
# 48 s with one, convex training 41 and 18.
_TINY_IMAGE = 256


def threads_for(numbers: int, *, jobs: int = 1) -> int:
    """The threads for a model of images of so many numbers: one where images are tiny, else every core.

    With several jobs, each has its share of the cores.
    """
    return 1 if numbers <= _TINY_IMAGE else max(1, cores() // jobs)


def process_age() -> float:
    """Seconds since this process began, its imports included; where the system does not say, those it computed."""
    try:
        # The 22nd field, in ticks since the machine started; the second may hold spaces, but ends with a bracket.
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.process_time(), time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()


def installed() -> dict[str, str]:
    """Python, the machine's architecture, and every installed package by name with its version."""
    # What setuptools carries inside is on the path only once something has imported it.
    places = [place for place in sys.path if Path(place).name != "_vendor"]
    packages = {str(one.metadata["Name"]).lower(): one.version for one in importlib.metadata.distributions(path=places)}
    return {**dict(sorted(packages.items())), "python": python_version(), "machine": machine()}


def source_sha256() -> str:
    """The sha256 over the source that answers depend on, wherever it is installed."""
    digest = hashlib.sha256()
    for package in ("attacks", "defenses", "bench"):
        folder = Path(str(importlib.import_module(f"robustboard.{package}").__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def source_commit() -> tuple[str | None, bool | None]:
    """The git commit of RobustBoard's own source and whether it has uncommitted changes; None for an installed copy."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None, None
    commit = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain")
    return (commit.strip() if commit else None), (bool(changes.strip()) if changes is not None else None)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
