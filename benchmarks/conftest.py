"""Prints what a benchmark measured beside its time, and writes it to a page: pytest-benchmark keeps it for its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robustboard.bench.environment import cores, machine, package_versions, python_version

HEAD = """# Performance

This page is written by `make bench`. Each line is one network: the whole verdict (contract, attacks, IBP, CROWN-IBP
and CROWN bounds, crossed audit; no diagnostics and no corruptions) beside unmodified AutoAttack alone, at the best of
its batch sizes, one of theirs before each of ours, medians of {rounds} runs. Both have {cores} cores: AutoAttack as so
many threads, we as so many processes of one thread each (`score --jobs {cores}`). `ratio` is their time over ours.
Passes are examples forward and backward through the network. AutoAttack draws with seed 0; examples are the track's
first n. In the fast mode no bounds are tried. Our processes keep the memory that they free, by two settings of the GNU
allocator; `keeping memory` is what AutoAttack takes, once, in a process with the same two.

Made with {what}.

| network | n | AutoAttack s | keeping memory | our s | ratio | passes | our passes | AutoAttack | ours | certified |
|---|---|---|---|---|---|---|---|---|---|---|
"""
FOOT = """
Where our time went, in seconds of the last run, added up over the processes:

"""
GROWTH = """
## With more examples

The verdicts of CROWN-IBP on MNIST at 1/10 for the first n images, each n in a process of its own, one thread, one run.
Peak memory is the process's largest resident set, the loaded data set, torch and auto_LiRPA included.

| n | seconds | milliseconds an example | passes an example | peak memory |
|---|---|---|---|---|
"""
PROCESSES = """
## With more processes

The whole verdict by processes of one thread each, one run with one process before each with all, medians of 3 runs. The
outcome tables are equal.

| network | n | one process s | processes | their s | ratio |
|---|---|---|---|---|---|
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The page to write."""
    parser.addoption("--page", type=Path, default=None, help="write the ratios as Markdown to this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a benchmark, and the page."""
    session = getattr(config, "_benchmarksession", None)
    measured = [benchmark for benchmark in (session.benchmarks if session else ()) if benchmark.extra_info]
    for benchmark in measured:
        values = ", ".join(f"{name} {value}" for name, value in benchmark.extra_info.items())
        terminalreporter.write_line(f"{benchmark.name}: {values}")
    page = config.getoption("--page")
    if page is not None and measured:
        page.write_text(_page([benchmark.extra_info for benchmark in measured]), encoding="utf-8")
        terminalreporter.write_line(f"Written to {page}.")


def _page(found: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    what = f"Python {python_version()}, torch {torch.__version__}, {versions} on {machine()}, {cores()} cores"
    growth = [one for one in found if "peak_mebibytes" in one]
    processes = [one for one in found if "speedup" in one]
    found = [one for one in found if "ratio" in one]
    lines = []
    for one in found:
        theirs = _passes(one["autoattack_forwards"], one["autoattack_backwards"])
        ours = _passes(one["ours_forwards"], one["ours_backwards"])
        names = ("autoattack_seconds", "autoattack_keeping_memory", "ours_seconds", "ratio")
        seconds = " | ".join(str(one[name]) for name in names)
        shares = " | ".join(f"{one[name]:.1%}" for name in ("autoattack", "robust", "certified"))
        lines.append(f"| {one['case']} | {one['n']} | {seconds} | {theirs} | {ours} | {shares} |")
    stages = [f"- {one['case']}: {', '.join(f'{name} {s}' for name, s in one['stages'].items())}" for one in found]
    page = HEAD.format(rounds=found[0]["rounds"], cores=found[0]["cores"], what=what) if found else "# Performance\n"
    page += "\n".join([*lines, FOOT.rstrip("\n"), "", *stages]) + "\n" if found else ""
    page += PROCESSES + "\n".join(map(_processes, processes)) + "\n" if processes else ""
    return page + (GROWTH + "\n".join(map(_growth, growth)) + "\n" if growth else "")


def _processes(one: dict[str, Any]) -> str:
    names = ("case", "n", "one_process_seconds", "processes", "processes_seconds", "speedup")
    return "| " + " | ".join(str(one[name]) for name in names) + " |"


def _growth(one: dict[str, Any]) -> str:
    each = f"{1000 * one['seconds'] / one['n']:.1f} | {one['passes'] / one['n']:.0f}"
    return f"| {one['n']} | {one['seconds']:.1f} | {each} | {one['peak_mebibytes']:.0f} MiB |"


def _passes(forwards: int, backwards: int) -> str:
    return f"{forwards:,} + {backwards:,}"
