"""What an evaluation leaves and holds, in units that larger images share: for the arithmetic of docs/cluster.md.

    python benchmarks/footprint.py

Digits are enlarged to 64 x 64 x 3 and judged with a linear network of their averages, once for few images and once for
many. What grows between the two is told for each example and in copies of one float32 image: the parent's peak memory,
the journal when it is complete, the stored adversarial images, and the outcome table. Then the time and size of a site
with many records, and the rows of a record in an MLflow store. Takes a few minutes on one core.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from robustboard.leaderboard.record import Record, attach, load
from robustboard.leaderboard.site import build_site

SIDE, FEW, MANY = 64, 200, 800
RECORDS = (100, 400)

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.AvgPool2d((8, 8)), nn.Flatten(), nn.Linear(192, 10))
"""
MANIFEST = """
[defense]
name = "averages"
title = "A linear network of averages"
[model]
factory = "model.py:build"
weights = "weights.npz"
"""
TRACK = """
id = "enlarged-linf@1"
dataset = {npz = "images.npz"}
threat = {norm = "linf", eps = "1/20"}
n = 800
bounds = {methods = []}
corruptions = {names = ["contrast"], severities = [1]}
audit = {certified_sample = 0, smallest_margins = 0}
"""
# The journal is taken away with the record, so its size is told at that moment.
WATCHED = """
import json, resource
from robustboard.bench.journal import Journal
from robustboard.bench.cli import main
remove, told = Journal.remove, {}

def watched(self):
    told["journal"] = self._end
    remove(self)

Journal.remove = watched
try:
    main()
finally:
    told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("told.json", "w") as file:
        json.dump(told, file)
"""


def prepare(folder: Path) -> None:
    """The submission and the track."""
    digits, labels = load_digits(return_X_y=True)
    small = np.repeat((digits / 16).reshape(-1, 1, 8, 8), 3, axis=1)
    images = np.kron(small, np.ones((1, 1, SIDE // 8, SIDE // 8)))
    np.savez(folder / "images.npz", images=np.round(images * 255).astype(np.uint8), labels=labels.astype(np.int64))
    fitted = LogisticRegression(max_iter=500).fit(small.reshape(len(small), -1), labels)
    weights = {"2.weight": fitted.coef_.astype(np.float32), "2.bias": fitted.intercept_.astype(np.float32)}
    np.savez(folder / "weights.npz", **weights)
    for name, text in (("model.py", MODEL), ("defense.toml", MANIFEST), ("track.toml", TRACK)):
        (folder / name).write_text(text)


def judged(folder: Path, n: int) -> dict[str, float]:
    """Bytes of an evaluation of n images."""
    run = folder / f"run-{n}"
    command = [
        "score",
        "defense.toml",
        "--track",
        "./track.toml",
        "--n",
        str(n),
        "--threads",
        "1",
    ]
    subprocess.run(
        [sys.executable, "-P", "-c", WATCHED, *command, "--run-dir", str(run), "--no-mlflow"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    told = json.loads((folder / "told.json").read_text())
    record = load(run / "record")
    return {
        **told,
        "adversarial": (run / "adversarial.npz").stat().st_size,
        "broken": float((record.outcomes["verdict"] == "broken").sum()),
        "open": float((record.outcomes["verdict"] == "undecided").sum()),
        "outcomes": (run / "record" / "outcomes.parquet").stat().st_size,
        "record": (run / "record" / "record.json").stat().st_size,
        "passes": float(sum((cost.forwards or 0) + (cost.backwards or 0) for cost in record.cost.values())),
    }


def site(record: Record, count: int, folder: Path) -> tuple[float, int]:
    """Seconds and bytes of a site with so many records that differ in name and weights."""
    records = []
    for number in range(count):
        info = record.defense.model_copy(update={"name": f"copy-{number}", "title": f"Copy {number}"})
        changes = {"defense": info, "checkpoint_sha256": f"{number:064x}"}
        records.append(attach(record.model_copy(update=changes), record.outcomes))
    began = time.perf_counter()
    build_site(records, folder)
    seconds = time.perf_counter() - began
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows(folder: Path) -> tuple[int, int]:
    """Rows and bytes of one record in a store of its own."""
    run = [sys.executable, "-P", "-c", "from robustboard.bench.cli import main; main()"]
    command = ["score", "defense.toml", "--track", "./track.toml", "--n", "20", "--threads", "1", "--runs", "runs"]
    subprocess.run([*run, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with closing(sqlite3.connect(folder / "runs" / "mlflow.db")) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        count = sum(store.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables)
    return count, sum(
        path.stat().st_size for path in (folder / "runs" / "mlflow-artifacts").rglob("*") if path.is_file()
    )


def main() -> int:
    """Measure everything and print it."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    image = 3 * SIDE * SIDE * 4
    with tempfile.TemporaryDirectory(prefix="footprint-") as name:
        folder = Path(name)
        prepare(folder)
        few, many = judged(folder, FEW), judged(folder, MANY)
        sys.stdout.write(f"few {few}\nmany {many}\n")
        added = {key: many[key] - few[key] for key in many}
        copies = {key: added[key] / (MANY - FEW) / image for key in ("peak", "journal")}
        sys.stdout.write(f"parent's peak memory: {copies['peak']:.1f} float32 copies of each image\n")
        sys.stdout.write(f"journal: {copies['journal']:.2f} float32 copies of each image\n")
        stored = added["adversarial"] / added["broken"] / image
        sys.stdout.write(f"stored adversarial images: {stored:.2f} float32 copies of each broken image\n")
        sys.stdout.write(f"outcome table: {added['outcomes'] / (MANY - FEW):.1f} bytes an example\n")
        count, artifacts = rows(folder)
        sys.stdout.write(f"MLflow: {count} rows and {artifacts} bytes of artifacts a record\n")
        record = load(folder / f"run-{MANY}" / "record")
        for number in RECORDS:
            seconds, size = site(record, number, folder / f"site-{number}")
            sys.stdout.write(f"site of {number} records: {seconds:.1f} s, {size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
