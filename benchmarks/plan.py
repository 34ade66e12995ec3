"""The arithmetic of docs/cluster.md: what scoring many submissions on images of ImageNet's size would take.

    python benchmarks/plan.py --page docs/cluster.md

Nothing here was run at that size. Every input is a number that was measured on small networks, with the page or command
that tells it, or one that is assumed, with its source; the tables between the page's markers follow from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- plan: {} -->", "<!-- end of plan: {} -->"


@dataclass(frozen=True)
class Input:
    """One number, and where it is from.

    Attributes:
        value: what the arithmetic uses.
        unit: of it.
        kind: `measured` here, `counted`, or `assumed`.
        source: the page, command or publication.
        low, high: the range, where there is one.
    """

    value: float
    unit: str
    kind: str
    source: str
    low: float | None = None
    high: float | None = None


SUBMISSIONS = 10_000
EXAMPLES = 5_000
PIXELS = 3 * 224 * 224

INPUTS: dict[str, Input] = {
    "AutoAttack, an example that survives": Input(
        (1_502_914 + 365_416) / 191, "passes", "measured", "docs/performance.md, CROWN-IBP, 191 of 200 survive"
    ),
    "AutoAttack, an example that breaks at once": Input(
        (105_370 + 99_990) / 1000, "passes", "measured", "docs/performance.md, undefended"
    ),
    "cascade, an example that survives uncertified": Input(
        (8_713_618 + 2_583_034) / (3 * 344), "passes", "measured", "docs/fast.md, pgd-at on digits at 1/20, standard"
    ),
    "cascade, an example that breaks at once": Input(
        (9_455 + 3_919) / 1000, "passes", "measured", "docs/performance.md, undefended"
    ),
    "fast mode, each survivor, the broken included": Input(
        164 + 154, "passes", "measured", "docs/fast.md, pooled over 18480 pairs"
    ),
    "corruptions, each example": Input(75, "passes", "counted", "15 corruptions at 5 severities"),
    "examples that survive": Input(0.45, "share", "assumed", "the middle of robust models at 4/255", 0.30, 0.60),
    "examples classified correctly": Input(0.73, "share", "assumed", "the middle of robust models", 0.65, 0.80),
    "ResNet-50, float32, one A100": Input(
        367 * 3 * 19.5 / 15.7,
        "passes/s",
        "assumed",
        "NVIDIA: 367 img/s of training on a V100, 3 passes an image, scaled by peak float32 (19.5 / 15.7 TFLOPS)",
    ),
    "ResNet-50, TF32, one A100": Input(938 * 3, "passes/s", "assumed", "NVIDIA: 938 img/s of training, 3 passes each"),
    "ResNet-50, mixed precision, one A100": Input(
        2470 * 3, "passes/s", "assumed", "NVIDIA: 2470 img/s of training, 3 passes each"
    ),
    "parent's peak memory": Input(4.3, "float32 images", "measured", "benchmarks/footprint.py, each example"),
    "journal at its end": Input(5.36, "float32 images", "measured", "benchmarks/footprint.py, each example"),
    "stored adversarial image": Input(0.38, "float32 images", "measured", "benchmarks/footprint.py, digits", 0.38, 1.0),
    "outcome table": Input(39.1, "bytes", "measured", "benchmarks/footprint.py, each example, one corruption", 39, 150),
    "record.json": Input(17_000, "bytes", "measured", "benchmarks/footprint.py", 17_000, 21_000),
    "rows of a record in the MLflow store": Input(307, "rows", "measured", "benchmarks/footprint.py", 307, 570),
    "a record on the static site": Input(67_240, "bytes", "measured", "benchmarks/footprint.py, 400 records"),
    "price of an A100": Input(1.50, "USD/h", "assumed", "list prices of 2026 by provider", 0.80, 3.00),
}
"""A pass is one example once forward, or once backward to the input, which is taken to cost as much as forward."""


def passes(mode: str, survive: float) -> float:
    """Passes of one submission.

    Args:
        mode: `AutoAttack`, `cascade` or `fast mode`.
        survive: the share of examples that survive.
    """
    if mode == "fast mode":
        attacks = survive * INPUTS["fast mode, each survivor, the broken included"].value
    else:
        ends = "survives uncertified" if mode == "cascade" else "survives"
        attacks = survive * INPUTS[f"{mode}, an example that {ends}"].value
        attacks += (1 - survive) * INPUTS[f"{mode}, an example that breaks at once"].value
    corruptions = 0.0 if mode == "AutoAttack" else INPUTS["corruptions, each example"].value
    return EXAMPLES * (attacks + corruptions)


MODES = ("AutoAttack", "cascade", "fast mode")
SPEEDS = ("float32", "TF32", "mixed precision")


def gpu_hours(mode: str, speed: str, survive: float) -> float:
    """A100 hours for all submissions, were they all of ResNet-50's size and the card never idle."""
    rate = INPUTS[f"ResNet-50, {speed}, one A100"].value
    return SUBMISSIONS * passes(mode, survive) / rate / 3600


def inputs_table() -> Iterator[str]:
    """Every input."""
    yield "| input | value | range | unit | kind | source |"
    yield "|---|---|---|---|---|---|"
    for name, given in INPUTS.items():
        limits = "" if given.low is None or given.high is None else f"{given.low:g} to {given.high:g}"
        yield f"| {name} | {_short(given.value)} | {limits} | {given.unit} | {given.kind} | {given.source} |"


def hours_table() -> Iterator[str]:
    """GPU-hours and price by mode and precision."""
    survive, price = INPUTS["examples that survive"], INPUTS["price of an A100"]
    yield "| mode | precision | passes a submission | GPU-hours a submission | GPU-hours in all | USD in all |"
    yield "|---|---|---|---|---|---|"
    for mode in MODES:
        for speed in SPEEDS:
            hours = [gpu_hours(mode, speed, _of(share)) for share in (survive.value, survive.low, survive.high)]
            dollars = [hours[0] * price.value, hours[1] * _of(price.low), hours[2] * _of(price.high)]
            each = f"{passes(mode, survive.value) / 1e6:.2f} million | {hours[0] / SUBMISSIONS:.2f}"
            yield f"| {mode} | {speed} | {each} | {_range(hours)} | {_range(dollars)} |"


def _of(value: float | None) -> float:
    assert value is not None
    return value


def _range(values: Sequence[float]) -> str:
    middle, low, high = (f"{float(f'{value:.2g}'):,.0f}" for value in values)
    return f"{middle} ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def storage_table() -> Iterator[str]:
    """What is kept, and what is there for a while, for one submission and for all."""
    whole = EXAMPLES * PIXELS * 4
    broken = INPUTS["examples classified correctly"].value - INPUTS["examples that survive"].value
    stored = INPUTS["stored adversarial image"]
    lasting = {
        "adversarial.npz, kept": [whole * broken * share for share in (stored.value, _of(stored.high))],
        "record, outcome table included, kept": [
            INPUTS["record.json"].value + EXAMPLES * size
            for size in (INPUTS["outcome table"].value, _of(INPUTS["outcome table"].high))
        ],
        "page of the static site, kept": [INPUTS["a record on the static site"].value] * 2,
        "weights in float32, ResNet-50, kept": [25_557_032 * 4.0] * 2,
    }
    yield "| what | a submission | all |"
    yield "|---|---|---|"
    for name, sizes in lasting.items():
        yield f"| {name} | {_spread(sizes)} | {_spread([size * SUBMISSIONS for size in sizes])} |"
    journal = whole * INPUTS["journal at its end"].value
    memory = whole * INPUTS["parent's peak memory"].value
    yield f"| one copy of the judged images in float32 | {_bytes(whole)} | the same for all |"
    yield f"| the parent's memory, while it runs | {_bytes(memory)} | for each that runs |"
    yield (
        f"| journal.bin, until the record is there; flushed to the disk | {_bytes(journal)} | "
        f"{_bytes(journal * SUBMISSIONS)} written |"
    )
    rows = INPUTS["rows of a record in the MLflow store"]
    yield (
        f"| rows in PostgreSQL, kept | {rows.value:.0f} to {_of(rows.high):.0f} | "
        f"{rows.value * SUBMISSIONS / 1e6:.1f} to {_of(rows.high) * SUBMISSIONS / 1e6:.1f} million |"
    )


def _spread(sizes: Sequence[float]) -> str:
    low, high = (_bytes(size) for size in sizes)
    return low if low == high else f"{low} to {high}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


TABLES = {"inputs": inputs_table, "hours": hours_table, "storage": storage_table}


def filled(page: str) -> str:
    """The page with its tables made anew, between `BEGIN` and `END` of each."""
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"The page must have {begin} and {end} once.")
        parts = (begin, *table(), end)
        before, after = page.split(begin)[0], page.split(end)[1]
        page = before + "\n".join(parts) + after
    return page


def main() -> int:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--page", type=Path)
    page = parser.parse_args().page
    if page is None:
        sys.stdout.write("\n\n".join("\n".join(table()) for table in TABLES.values()) + "\n")
    else:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
