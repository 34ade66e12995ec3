"""What `robustboard claims` prints and runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from robustboard.bench.claims.claim import VERDICTS, Measurement, PaperClaim, Under, Verdict
from robustboard.bench.claims.laboratory import Laboratory
from robustboard.bench.claims.store import Result, committed, result_of, save_result

_STYLES: Mapping[Verdict, str] = {
    "reproduced": "green",
    "not reproduced": "red",
    "broken under the protocol": "red",
    "not transferred": "yellow",
    "refuted by the paper": "yellow",
}
_ROWS: Mapping[Under, str] = {"paper": "ours", "protocol": "protocol", "control": "control"}
_INDENT = 11


def verify(claim: PaperClaim, laboratory: Laboratory, *, out: Path) -> Result:
    """Run one experiment and write its result into `out`.

    Raises:
        RobustBoardError: if data are missing, a training fails, or the result cannot be written.
    """
    began = time.perf_counter()
    measurements = claim.measure(laboratory)
    claim.judge(measurements)  # a rule that cannot read them is a bug, and must show before the result is kept
    result = result_of(
        claim,
        measurements,
        seed=laboratory.seed,
        seconds=time.perf_counter() - began,
        device=laboratory.device,
        threads=torch.get_num_threads(),
    )
    save_result(result, out)
    return result


def disagreements(claims: Sequence[PaperClaim], results: Mapping[str, Result]) -> list[str]:
    """A sentence for each claim whose verdict differs from the committed one."""
    sentences = []
    for claim in claims:
        before = committed(claim)
        if before is None:
            continue
        old, new = claim.judge(before.measurements), claim.judge(results[claim.id].measurements)
        if old != new:
            sentences.append(f"{claim.id} is now {new!r}; the committed result says {old!r}.")
    return sentences


def show(claim: PaperClaim, result: Result | None, console: Console) -> None:
    """Print one claim: the paper's numbers, ours, the protocol's, and the verdict."""
    verdict = None if result is None else claim.judge(result.measurements)
    mark = "[dim]not measured yet[/dim]" if verdict is None else f"[{_STYLES[verdict]}]{verdict}[/]"
    console.print(f"[bold]{claim.id}[/bold]  {mark}")
    _row(console, "claim", claim.statement)
    for one in claim.paper:
        value = one.value if isinstance(one.value, str) else f"{one.value:g}"
        _row(console, "paper", f"{one.what}: {value} ({one.source})")
    _row(console, "data", claim.data)
    for under, head in _ROWS.items():
        for line in _lines(result, under):
            _row(console, head, line)
    if result is not None:
        _row(console, "made by", f"{result.made_with.get('command', '')} ({result.seconds:.0f} s)")
    _row(console, "rule", claim.rule)
    if claim.note:
        _row(console, "note", claim.note)
    console.print()


def show_legend(console: Console) -> None:
    """Print what each verdict means."""
    for verdict, meaning in VERDICTS.items():
        console.print(f"[{_STYLES[verdict]}]{verdict}[/]: {escape(meaning)}", highlight=False)


def _lines(result: Result | None, under: Under) -> list[str]:
    found: list[Measurement] = [] if result is None else [*result.measurements.values()]
    return [f"{one.what}: {one.text()}" for one in found if one.under == under]


def _row(console: Console, head: str, text: str) -> None:
    """One line, or several under one head with a hanging indent."""
    for part in Text(text).wrap(console, max(20, console.width - _INDENT)):
        part.rstrip()
        console.print(Text.assemble((f"  {head:<{_INDENT - 2}}", "dim"), part))
        head = ""
