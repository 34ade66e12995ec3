"""Prints what a benchmark measured beside its time: pytest-benchmark keeps that for its JSON only."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a benchmark."""
    session = getattr(config, "_benchmarksession", None)
    for benchmark in session.benchmarks if session else ():
        values = ", ".join(f"{name} {value}" for name, value in benchmark.extra_info.items())
        terminalreporter.write_line(f"{benchmark.name}: {values}")
