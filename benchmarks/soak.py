"""An evaluation that is killed at random moments, for minutes, and has to end as if nobody had touched it.

    python benchmarks/soak.py --minutes 5 --seed 0 --jobs 2

First the evaluation runs undisturbed. Then it runs again and again into a run directory of its own: at moments drawn by
the seed one of the model's processes, the parent, or all of them at once are ended, and the same command is given again
until it ends by itself. Each round's outcome table, stored images and counted passes must be those of the undisturbed
run, and no process, journal or lock may be left over. Exit code 1 where anything differs.

The network is trained in the run itself on the embedded digits, or with `--network mnist` is mnist_cnn_a_adv of the
folders of ROBUSTBOARD_DATA. Reads /proc, so it runs on Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cases import handed_in, third_party
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from robustboard.attacks.keyed import derive_seed
from robustboard.bench.datasets import data_folders
from robustboard.bench.journal import FILE as JOURNAL
from robustboard.bench.journal import LOCK
from robustboard.bench.retrying import LOST, RETRIES
from robustboard.errors import RobustBoardError
from robustboard.leaderboard.record import Record, load

KINDS = ("a worker killed", "parent killed", "all killed", "parent terminated", "parent interrupted")
ODDS = (0.36, 0.16, 0.16, 0.16, 0.16)
"""Where a lost worker is replaced, its run goes on, so this is done more often than what ends it."""
KILLS_A_ROUND = 8
"""After so many a round is left to end, so that there are several rounds."""
PATIENCE = 600.0
"""Seconds without an end after which an undisturbed process counts as hanging."""
LINGER = 15.0
"""Seconds that processes may take to end after their parent did."""
TOKEN = "ROBUSTBOARD_SOAK"
"""The environment variable by which the processes of a run are found, whoever their parent is by then."""
TRACK = """
id = "sdp-mnist-linf@1"
dataset = {{npz = "{images}"}}
threat = {{norm = "linf", eps = "3/10"}}
"""


class SoakError(RobustBoardError):
    """The evaluation did not survive what was done to it."""

    exit_code = 1


@dataclass
class Life:
    """One process of the command, from its start to its end.

    Attributes:
        process: the parent.
        token: is in the environment of all processes that it starts.
        kills: what was done to it.
    """

    process: subprocess.Popen[bytes]
    token: str
    log: Path
    kills: Counter[str] = field(default_factory=Counter)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it lives on."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def hit(self, kind: str, draw: np.random.Generator) -> None:
        """Do one thing to it; where no worker lives yet, the parent is killed instead."""
        workers = [pid for pid in processes(self.token) if pid != self.process.pid]
        if kind == "a worker killed" and not workers:
            kind = "parent killed"
        targets, number = {
            "a worker killed": ([workers[draw.integers(len(workers))]] if workers else [], signal.SIGKILL),
            "parent killed": ([self.process.pid], signal.SIGKILL),
            "all killed": ([self.process.pid, *workers], signal.SIGKILL),
            "parent terminated": ([self.process.pid], signal.SIGTERM),
            "parent interrupted": ([self.process.pid], signal.SIGINT),
        }[kind]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        self.kills[kind] += 1

    def said(self) -> str:
        """What it wrote on its error stream last."""
        return self.log.read_text(errors="replace")[-2000:].strip()

    def check_end(self, code: int) -> None:
        """An end that nothing of what was done explains is a defect, and so is a traceback or a survivor."""
        # A lost worker is replaced, so its run ends well, but for one that is lost again and again.
        explained = {0, 2} if self.kills["a worker killed"] > RETRIES else {0}
        for kind, codes in {
            "parent killed": {-signal.SIGKILL},
            "all killed": {-signal.SIGKILL},
            # Python gives its signal handlers back before the last of its end.
            "parent terminated": {128 + signal.SIGTERM, -signal.SIGTERM},
            "parent interrupted": {128 + signal.SIGINT, -signal.SIGINT},
        }.items():
            explained |= codes if self.kills[kind] else set()
        if code not in explained or "Traceback" in self.said() or "bug of RobustBoard" in self.said():
            raise SoakError(f"After {dict(self.kills)} the command ended with {code} and said: {self.said()}")
        deadline = time.monotonic() + LINGER
        while left := processes(self.token):
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise SoakError(f"After {dict(self.kills)} the processes {left} were left over.")
            time.sleep(0.05)


def processes(token: str) -> list[int]:
    """All living processes whose environment holds the token, in the order of their ids."""
    wanted = f"{TOKEN}={token}\0".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # A process that has ended has no environment any more.
                if wanted in (folder / "environ").read_bytes() + b"\0":
                    found.append(int(folder.name))
    return sorted(found)


@dataclass(frozen=True)
class Soak:
    """What is run, and where.

    Attributes:
        command: of the evaluation, without its run directory.
        folder: for the run directories and logs.
        seed: of all draws.
    """

    command: Sequence[str]
    folder: Path
    seed: int

    def begin(self, name: str) -> Life:
        """Give the command, with a run directory of this name."""
        token, log = f"{os.getpid()}-{name}", self.folder / f"{name}.log"
        code = "import sys; from robustboard.bench.cli import main; main()"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, *self.command, "--run-dir", str(self.folder / name)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                env={**os.environ, TOKEN: token},
            )
        return Life(process, token, log)

    def undisturbed(self) -> float:
        """Run it in peace; how many seconds that takes."""
        began = time.monotonic()
        life = self.begin("undisturbed")
        self._end(life, life.wait(PATIENCE))
        return time.monotonic() - began

    def disturbed(self, number: int, whole: float, tell: Callable[[Counter[str]], None]) -> Counter[str]:
        """One round: kill, and give the command again, until it has ended by itself; what was done."""
        name, kills, lives = f"round-{number}", Counter[str](), 0
        while True:
            life, draw = self.begin(name), np.random.default_rng(derive_seed("soak", self.seed, number, lives))
            lives += 1
            code = None
            while code is None and kills.total() + life.kills.total() < KILLS_A_ROUND:
                code = life.wait(draw.uniform(0.1, 1.0) * whole)
                if code is None:
                    life.hit(str(draw.choice(KINDS, p=ODDS)), draw)
                    tell(kills + life.kills)
                    # What ends by this ends soon; what replaces a lost worker goes on to the next moment.
                    code = life.wait(2.0)
            code = life.wait(PATIENCE) if code is None else code
            self._end(life, code)
            kills += life.kills
            if code == 0:
                return kills

    def _end(self, life: Life, code: int | None) -> None:
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                life.hit("all killed", np.random.default_rng(0))
            raise SoakError(f"The command had not ended after {PATIENCE:.0f} seconds: {life.said()}")
        life.check_end(code)
        if code == 0 or life.kills:
            return
        raise SoakError(f"Undisturbed, the command ended with {code}: {life.said()}")


def differences(one: Path, other: Path) -> list[str]:
    """What tells two run directories apart that must be alike: sentences."""
    found = []
    first, second = load(one / "record"), load(other / "record")
    for column in sorted({*first.outcomes, *second.outcomes}):
        if column not in first.outcomes or column not in second.outcomes:
            found.append(f"only one table has the column {column}")
        elif not first.outcomes[column].equals(second.outcomes[column]):
            found.append(f"the column {column} differs")
    found += [f"{name} differ" for name in ("checkpoint_sha256", "metrics", "audit", "status", "bound_methods")
              if getattr(first, name) != getattr(second, name)]  # fmt: skip
    if _notes(first) != _notes(second):
        found.append("notes differ")
    found += [f"the passes of {stage} differ" for stage in _different_passes(first, second)]
    found += _different_images(one / "adversarial.npz", other / "adversarial.npz")
    left = (folder / name for folder in (one, other) for name in (LOCK, JOURNAL))
    found += [f"{path} was left over" for path in left if path.exists()]
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (one, other)]
    found += [f"only one folder has {name}" for name in sorted(names[0] ^ names[1])]
    return found


def _notes(record: Record) -> list[str]:
    """Without the one that counts lost workers, which is there because they were killed."""
    return [note for note in record.notes if not note.startswith(LOST)]


def _different_passes(first: Record, second: Record) -> list[str]:
    costs = [
        {stage: (cost.forwards, cost.backwards) for stage, cost in record.cost.items()} for record in (first, second)
    ]
    return [stage for stage in sorted({*costs[0], *costs[1]}) if costs[0].get(stage) != costs[1].get(stage)]


def _different_images(one: Path, other: Path) -> list[str]:
    with np.load(one) as first, np.load(other) as second:
        if sorted(first.files) != sorted(second.files):
            return ["the stored images have other fields"]
        return [f"{name} of the stored images differ" for name in first.files if not _same(first[name], second[name])]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def command(network: str, folder: Path, *, track: str, n: int, jobs: int) -> list[str]:
    """The words after `robustboard`; the files of a third-party network are written into the folder."""
    common = ["--n", str(n), "--jobs", str(jobs), "--threads", "1", "--no-mlflow"]
    if network != "mnist":
        return ["score", network, "--track", track, *common]
    submission = folder / "submission"
    submission.mkdir()
    manifest = handed_in(third_party("mnist", "3/10", n), submission)
    images = next(path for path in data_folders() if (path / "sdp_mnist_200.npz").is_file()) / "sdp_mnist_200.npz"
    own = folder / "track.toml"
    own.write_text(TRACK.format(images=images.absolute()))
    return ["score", str(manifest), "--track", str(own), *common]


def run(soak: Soak, *, minutes: float, console: Console) -> Counter[str]:
    """Rounds until the time is over; all that was done.

    Raises:
        SoakError: as soon as a round ends in another way than the undisturbed run.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("undisturbed", total=minutes * 60, note="")
        whole = soak.undisturbed()
        console.print(f"undisturbed: {whole:.1f} s")
        began, kills, rounds = time.monotonic(), Counter[str](), 0
        while time.monotonic() - began < minutes * 60:
            rounds += 1
            since = time.monotonic()

            def tell(so_far: Counter[str], earlier: Counter[str] = kills, number: int = rounds) -> None:
                progress.update(
                    bar,
                    description=f"round {number}",
                    completed=time.monotonic() - began,
                    note=f"{(earlier + so_far).total()} kills",
                )

            tell(Counter())
            done = soak.disturbed(rounds, whole, tell)
            found = differences(soak.folder / "undisturbed", soak.folder / f"round-{rounds}")
            if found:
                raise SoakError(f"Round {rounds} differs after {told(done)}: {'; '.join(found)}.")
            console.print(f"round {rounds}: {told(done)}; {time.monotonic() - since:.1f} s; equal", soft_wrap=True)
            kills = kills + done
            if not done:
                # The machine is faster than it was, so that the moments came too late.
                whole = min(whole, time.monotonic() - since)
    console.print(
        f"{rounds} rounds, {kills.total()} kills: {told(kills)}; every round ended like the undisturbed run",
        soft_wrap=True,
    )
    return kills


def told(kills: Counter[str]) -> str:
    """Such as `parent killed 2, all killed 1`."""
    return ", ".join(f"{kind} {kills[kind]}" for kind in KINDS if kills[kind]) or "nothing done"


def main(words: Sequence[str] | None = None) -> int:
    """Run the soak; its exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--network", default="fgsm-at", help="a defense to be trained, or mnist")
    parser.add_argument("--track", default="digits-linf@1")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="a new folder for the run directories, which are else removed")
    options = parser.parse_args(words)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            given = command(options.network, folder, track=options.track, n=options.n, jobs=options.jobs)
            run(Soak(given, folder, options.seed), minutes=options.minutes, console=Console(highlight=False))
        except RobustBoardError as error:
            sys.stderr.write(f"soak: {error}\n")
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
