"""The model's process: whatever a model's code does, the command gets one sentence and lives on."""

from __future__ import annotations

import time

import numpy as np
import pytest

from robustboard.bench.process import WorkerProcess
from robustboard.errors import ModelError, SubmissionError, WorkerError

IMAGES = {"images": np.linspace(0, 1, 5 * 16, dtype=np.float32).reshape(5, 1, 4, 4)}


def test_a_model_predicts_in_its_own_process_as_it_would_here(make_submission):
    import torch

    from robustboard.defenses.submission import load_model, read_manifest

    manifest = make_submission()
    with WorkerProcess() as worker:
        assert worker.load(manifest).values["parameters"] == 68
        logits = worker.call("predict", {}, IMAGES).arrays["logits"]
    here = load_model(read_manifest(manifest))(torch.from_numpy(IMAGES["images"]))
    np.testing.assert_allclose(logits, here.detach().numpy(), rtol=1e-5)


def test_passes_are_counted_where_the_model_runs(make_submission):
    with WorkerProcess() as worker:
        worker.load(make_submission())
        reply = worker.call("predict", {}, IMAGES)
    assert (reply.forwards, reply.backwards) == (5, 0)


@pytest.mark.parametrize(
    ("code", "error", "sentence"),
    [
        ("def build(): raise ValueError('no luck')", SubmissionError, "ValueError: no luck"),
        ("import os\ndef build(): os._exit(7)", WorkerError, "exit code 7 during load"),
        ("import os, signal\ndef build(): os.kill(os.getpid(), signal.SIGKILL)", WorkerError, "SIGKILL during load"),
        ("import ctypes\ndef build(): ctypes.string_at(0)", WorkerError, "SIGSEGV during load"),
        ("import time\ndef build(): time.sleep(600)", WorkerError, "silent for 2 seconds during load"),
    ],
    ids=["raises", "exits", "kills itself", "segfaults", "hangs"],
)
def test_a_model_that_fails_to_load_is_one_sentence(make_submission, code, error, sentence):
    began = time.monotonic()
    with WorkerProcess(load_seconds=2) as worker, pytest.raises(error, match=sentence) as caught:
        worker.load(make_submission(code))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 60


FORWARD = """
import os, time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        {body}
        return self.layer(x.flatten(1))

def build():
    return Net()
"""


@pytest.mark.parametrize(
    ("body", "error", "sentence"),
    [
        ("os._exit(9)", WorkerError, "exit code 9 during check"),
        ("time.sleep(600)", WorkerError, "silent for 2 seconds during check"),
        ("raise RuntimeError('bad size')", ModelError, "RuntimeError: bad size"),
        ("print('noise' * 100)", None, ""),
    ],
    ids=["exits", "hangs", "raises", "prints"],
)
def test_a_forward_pass_that_fails_is_one_sentence(make_submission, body, error, sentence, capfd):
    with WorkerProcess(load_seconds=2) as worker:
        worker.load(make_submission(FORWARD.format(body=body)))
        if error is None:
            worker.call("check", {"classes": 4}, IMAGES)
        else:
            with pytest.raises(error, match=sentence):
                worker.call("check", {"classes": 4}, IMAGES)
    assert capfd.readouterr() == ("", ""), "what a model prints must not reach the command's output"


def test_closing_ends_what_a_model_started(make_submission, tmp_path):
    """A model's own child processes must not outlive the run."""
    code = f"""
import subprocess, sys
from torch import nn
def build():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
"""
    weights = {"1.weight": np.zeros((4, 16), dtype=np.float32), "1.bias": np.zeros(4, dtype=np.float32)}
    with WorkerProcess() as worker:
        worker.load(make_submission(code, weights=weights))
    status = f"/proc/{(tmp_path / 'child').read_text()}/stat"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(status):
        time.sleep(0.05)
    assert not _runs(status)


def _runs(stat: str) -> bool:
    try:
        with open(stat) as file:  # noqa: PTH123 - a path of the kernel
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
