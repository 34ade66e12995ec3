"""A run on a Ray cluster: the table of one process, whoever is killed, and one sentence for whatever is not there.

All but two tests share one cluster of this machine, whose CPUs and GPUs are claims that Ray does not check.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from robustboard.bench import ray_cluster
from robustboard.bench.ray_cluster import Demand, connected
from robustboard.bench.ray_host import software
from robustboard.bench.ray_worker import Needs, RayWorker
from robustboard.bench.request import Request
from robustboard.bench.score import score_defense
from robustboard.defenses.adapter import NoProgress
from robustboard.errors import ClusterError, LostWorkerError
from robustboard.leaderboard.record import Record, load

ZEROS = np.zeros((4, 16), dtype=np.float32)

# Every stage of the protocol, and of each the cheapest.
TRACK = """
id = "small-linf@1"
dataset = {dataset}
threat = {{norm = "linf", eps = "1/20"}}
n = 40
bounds = {{methods = ["ibp"]}}
audit = {{certified_sample = 1, smallest_margins = 0}}
corruptions = {{names = ["contrast"], severities = [1]}}
training = {{train = 600, validation = 60}}
"""

HONEST = """
import os
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return self.layer(x.flatten(1))

def build():
    open(f"{folder}/{{os.getppid()}}", "w").close()
    return Net()
"""

# The first gradient of all ends a process, and after that everybody lives.
MORTAL = """
import os, signal, torch
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        if x.requires_grad:
            try:
                Path({flag!r}).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill({victim}, signal.SIGKILL)
        return self.layer(x.flatten(1))

def build():
    return Net()
"""


@pytest.fixture
def small_track(quadrant_track: Path) -> Path:
    """The quadrant images, with little to do."""
    quadrant_track.write_text(TRACK.format(dataset='{npz = "data.npz"}').replace("training =", "# training ="))
    return quadrant_track


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The head of a cluster that is open to this test alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
        )
        yield cluster.address
        cluster.shutdown()


def scored(tmp_path: Path, name: str, manifest: Path, track: Path, **options: object) -> Record:
    request = Request(defense=str(manifest), track=track, run_dir=tmp_path / name, threads=1, **options)
    return score_defense(request).record


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        ("os.getpid()", "ended by SIGKILL during"),
        ("os.getppid()", "gone with its Ray actor or node during"),
    ],
    ids=["the model's process", "Ray's worker"],
)
def test_a_worker_that_is_killed_in_the_middle_is_replaced(
    address, make_submission, small_track, tmp_path, victim, how
):
    """The table is that of a run in one process, and the record tells of the loss."""
    manifest = make_submission(MORTAL.format(flag=str(tmp_path / "flag"), victim=victim))
    record = scored(tmp_path, "ray", manifest, small_track, ray=address, jobs=2)
    assert (tmp_path / "flag").exists()
    quiet = scored(tmp_path, "quiet", manifest, small_track)
    assert record.outcomes.equals(quiet.outcomes)
    (note,) = (note for note in record.notes if "lost" in note)
    assert f"lost 1 time ({how}" in note
    assert not [note for note in quiet.notes if "lost" in note]


def test_a_model_that_ends_its_process_every_time_is_one_sentence(address, make_submission, small_track, tmp_path):
    manifest = make_submission("import os\ndef build(): os._exit(7)")
    with pytest.raises(LostWorkerError, match=r"exit code 7 during load, 3 times in a row\.$"):
        scored(tmp_path, "run", manifest, small_track, ray=address, jobs=1)
    assert not (tmp_path / "run" / "record").exists()


def test_each_worker_has_a_gpu_of_its_own_and_the_files_that_the_manifest_names(address, make_submission, tmp_path):
    """The node's copy of a submission is all that its process needs of the machine that the command runs on."""
    code = f"""
import os, tempfile
from pathlib import Path
from torch import nn
import helper

def build():
    handle, _ = tempfile.mkstemp(dir={str(tmp_path)!r}, prefix="seen-")
    os.write(handle, f"{{os.environ['CUDA_VISIBLE_DEVICES']}} {{sorted(os.listdir(Path(__file__).parent))}}".encode())
    return helper.network()
"""
    manifest = make_submission(code, weights={"1.weight": ZEROS, "1.bias": ZEROS[:, 0]})
    (manifest.parent / "helper.py").write_text(
        "from torch import nn\ndef network(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))\n"
    )
    (manifest.parent / "private.txt").write_text("not named by the manifest")
    manifest.write_text(manifest.read_text() + 'files = ["helper.py"]\n')
    demand = Demand("cuda", 1, 2, 40, 60)
    with connected(address, demand):
        # There is no GPU here, so the device is another than what is asked for.
        needs = Needs("cpu", 1, demand.gpus, 60, software())
        with RayWorker(needs) as first, RayWorker(needs) as second:
            for worker in (first, second):
                assert worker.load(manifest).count("parameters") == 68
    seen = sorted(path.read_text() for path in tmp_path.glob("seen-*"))
    files = "['defense.toml', 'helper.py', 'model.py', 'weights.npz']"
    assert seen == [f"0 {files}", f"1 {files}"]


def test_a_node_with_other_software_is_refused(address, make_submission, small_track, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "software", lambda: {**software(), "numpy": "1.0"})
    with pytest.raises(ClusterError, match=r"has numpy .* where this machine has 1\.0 \(1 diff"):
        scored(tmp_path, "run", make_submission(), small_track, ray=address, jobs=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"jobs": 5}, "has room for 4 workers with 1 CPU each, and this run needs 5"),
        ({"jobs": 3, "device": "cuda"}, "has room for 2 workers with 1 CPU and a GPU each"),
        ({"device": "cuda:1"}, "give --device cuda"),
    ],
)
def test_a_cluster_that_is_too_small_is_one_sentence(
    address, make_submission, small_track, tmp_path, options, sentence
):
    with pytest.raises(ClusterError, match=sentence):
        scored(tmp_path, "run", make_submission(), small_track, ray=address, **options)


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("127.0.0.1:1", "Nothing answers at 127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "--ray takes HOST:PORT"),
        ("somewhere", "--ray takes HOST:PORT"),
        ("127.0.0.1:99999", "Nothing answers"),
    ],
)
def test_an_address_where_nobody_is_is_one_sentence(make_submission, small_track, tmp_path, where, sentence):
    with pytest.raises(ClusterError, match=sentence):
        scored(tmp_path, "run", make_submission(), small_track, ray=where)


def test_without_ray_one_sentence_says_how_to_install_it(make_submission, small_track, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install 'robustboard\[ray\]'"):
        scored(tmp_path, "run", make_submission(), small_track, ray="auto")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Request:
    """A short training on the digits, scored in one process."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits.toml").write_text(TRACK.format(dataset='"digits"'))
    request = Request(
        defense="standard",
        track=folder / "digits.toml",
        overrides={"epochs": 2},
        threads=1,
        run_dir=folder / "one",
    )
    score_defense(request)
    return request


def again(digits: Request, folder: Path) -> Path:
    """A run directory for the same, with the surrogates of the diagnostics that are trained already."""
    shutil.copytree(digits.run_dir / "surrogates", folder / "surrogates")
    return folder


def test_a_training_on_a_node_that_does_not_see_the_run_directory_comes_back(address, digits, tmp_path, monkeypatch):
    """Its checkpoints arrive here, and from here they reach the next worker, which does not train again."""
    ask = RayWorker.messages

    def elsewhere(worker, operation, params, arrays, patience):
        hidden = {"run": "/nowhere", "checkpoints": "/nowhere/checkpoints"} if operation == "train" else {}
        return ask(worker, operation, {**params, **hidden}, arrays, patience)

    monkeypatch.setattr(RayWorker, "messages", elsewhere)
    folder = again(digits, tmp_path / "away")
    away = score_defense(dataclasses.replace(digits, run_dir=folder, ray=address, jobs=2)).record
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.stat().st_size > 1000
    here = load(digits.run_dir / "record")
    assert away.checkpoint_sha256 == here.checkpoint_sha256
    assert away.outcomes.equals(here.outcomes)


@pytest.mark.slow
def test_a_node_that_is_lost_leaves_its_work_to_the_others(make_submission, small_track, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_cluster, "REPLACE_SECONDS", 5.0)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    (tmp_path / "hosts").mkdir()
    code = HONEST.format(folder=tmp_path / "hosts")

    class Removing(NoProgress):
        """Takes a node away when the attacks have begun."""

        def begin(self, stage, total):
            if stage == "PGD" and other in cluster.worker_nodes:
                hosts = [Path("/proc") / path.name for path in (tmp_path / "hosts").iterdir()]
                assert len(hosts) == 2
                cluster.remove_node(other, allow_graceful=False)
                while all(host.exists() for host in hosts):
                    time.sleep(0.1)

    request = Request(defense=str(make_submission(code)), track=small_track, threads=1)
    try:
        lossy = score_defense(
            dataclasses.replace(request, run_dir=tmp_path / "lossy", ray=cluster.address, jobs=2), Removing()
        ).record
    finally:
        cluster.shutdown()
    quiet = score_defense(dataclasses.replace(request, run_dir=tmp_path / "quiet")).record
    assert lossy.outcomes.equals(quiet.outcomes)
    assert any("lost 1 time (gone with its Ray actor or node" in note for note in lossy.notes)


def command(digits: Request, folder: Path, *options: str, mark: str) -> subprocess.Popen[str]:
    """The command itself on a cluster of this machine; all that it starts has a mark in its environment."""
    code = "from robustboard.bench.cli import main; main()"
    words = ["standard", "--track", str(digits.track), "--set", "epochs=2", "--threads", "1", "--no-mlflow"]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, "score", *words, "--ray", "auto", "--run-dir", str(folder), *options],
        env={**os.environ, "ROBUSTBOARD_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left(mark: str) -> list[str]:
    """The command lines of what is still there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_text(errors="replace"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def gone(mark: str, seconds: float) -> list[str]:
    """What is left after so many seconds at most."""
    deadline = time.monotonic() + seconds
    while left(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left(mark)


def test_a_cluster_of_this_machine_gives_the_table_of_one_process_and_leaves_nothing(digits, tmp_path):
    """And so do two processes without a cluster."""
    mark = uuid.uuid4().hex
    process = command(digits, again(digits, tmp_path / "ray"), mark=mark)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    # Of Ray nothing is heard.
    assert [line for line in errors.splitlines() if not line.startswith("standard: ")] == []
    assert gone(mark, 10) == []
    score_defense(dataclasses.replace(digits, run_dir=again(digits, tmp_path / "two"), jobs=2))
    one = load(digits.run_dir / "record").outcomes
    for name in ("two", "ray"):
        assert load(tmp_path / name / "record").outcomes.equals(one)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_is_left_of_a_cluster_whose_command_is_ended(digits, tmp_path, number, code):
    """After SIGKILL two of Ray's own agents take their time, up to minutes; the model's processes do not."""
    mark = uuid.uuid4().hex
    process = command(digits, tmp_path / "run", "--complete", "100000", mark=mark)
    for line in process.stderr:
        if line.startswith("standard: PGD"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    remain = gone(mark, 20)
    if number == signal.SIGKILL:
        assert [line for line in remain if "Agent" not in line] == []
    else:
        assert remain == []
        assert errors.splitlines()[-1].startswith("robustboard: Interrupted;")
