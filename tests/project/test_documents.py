"""README and docs: what they tell a reader to type or to open exists."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{target} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"(?:^    |`)make ([a-z -]+?)(?:`|  |\s*#|$)", document.read_text(), flags=re.MULTILINE)
    assert {word for words in named for word in words.split()} <= targets


def _command_lines() -> list[tuple[str, str]]:
    return [
        (_ids(document), line.split("#")[0].strip())
        for document in DOCUMENTS
        for line in re.findall(r"^    robustboard (.+)$", document.read_text(), flags=re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help text of every command that a document names."""
    commands = {line.split()[0] for _, line in _command_lines()}
    run = [sys.executable, "-c", "from robustboard.bench.cli import main; main()"]
    return {
        command: subprocess.run(
            [*run, command, "--help"], capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": ""}
        ).stdout
        for command in commands
    }


@pytest.mark.parametrize(("document", "line"), _command_lines())
def test_commands_have_the_options_that_documents_give_them(document, line, helps):
    command, *words = line.split()
    for option in (word for word in words if word.startswith("--")):
        assert option in helps[command], f"{document}: `robustboard {command}` has no {option}"


def test_documents_name_commands():
    assert len(_command_lines()) >= 5


def test_every_make_target_that_tox_mirrors_is_there():
    tox = (ROOT / "tox.ini").read_text()
    for name in ("tests", "lint", "types", "docs", "benchmarks", "site"):
        assert f"[testenv:{name}]" in tox
    assert tox.count("env_dir") == 1, "one environment of 7 GB serves all"


def test_constraints_pin_what_is_declared():
    """CI installs exact versions: every declared dependency has a pin."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*declared["dependencies"], *(d for extra in declared["optional-dependencies"].values() for d in extra)]
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = re.split(r"[<>=\[; ]", requirement)[0].lower().replace("_", "-")
        assert name in pins or name == "setuptools", f"{name} has no pin"
