"""Messages between the command and the model's process: data of known types and sizes, or an error."""

from __future__ import annotations

import json
import socket
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from robustboard.bench.channel import Channel, ChannelClosedError
from robustboard.errors import WorkerError

_PREFIX = struct.Struct("<4sIQ")


def _pair():
    ours, theirs = socket.socketpair()
    return Channel(ours), Channel(theirs), ours, theirs


@given(
    array=arrays_of.arrays(
        dtype=st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.bool_]),
        shape=arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    note=st.text(max_size=50),
)
@settings(max_examples=60, deadline=None)
def test_a_message_arrives_as_it_was_sent(array, note):
    ours, theirs, one, two = _pair()
    with one, two:
        ours.send({"note": note}, {"array": array})
        header, got = theirs.receive(timeout=5)
    assert header == {"note": note}
    assert got["array"].dtype == array.dtype
    np.testing.assert_array_equal(got["array"], array)


def _raw(header: object, body: bytes = b"", *, magic: bytes = b"RBm1", lengths: tuple[int, int] | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _PREFIX.pack(magic, *(lengths or (len(text), len(body)))) + text + body


def _array(**changes: object) -> dict:
    return {"header": {}, "arrays": [{"name": "a", "dtype": "<f4", "shape": [1], **changes}]}


@pytest.mark.parametrize(
    "raw",
    [
        _raw({}, magic=b"evil"),
        _raw({}, lengths=(1 << 31, 0)),
        _raw({}, lengths=(2, 1 << 60)),
        _raw(b"not json"),
        _raw(b"[" * 100_000),
        _raw({"arrays": []}),
        _raw(_array(dtype="|O"), b"\0" * 8),
        _raw(_array(shape=[-1]), b"\0" * 4),
        _raw(_array(shape=[1 << 62]), b"\0" * 4),
        _raw(_array(shape=["x"]), b"\0" * 4),
        _raw(_array(), b"\0" * 8),
    ],
    ids=[
        "magic", "huge header", "huge arrays", "not json", "deep json", "no header", "object dtype", "negative shape",
        "more than was sent", "shape of text", "bytes left over",
    ],
)  # fmt: skip
def test_what_is_not_a_message_is_refused(raw):
    """A hostile model's process can send any bytes; the command must answer with a sentence, not with a crash."""
    ours, _, one, two = _pair()
    with one, two:
        two.sendall(raw)
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(1_000_000)  # as some libraries do on import; the parser must not rely on it
        try:
            with pytest.raises(WorkerError):
                ours.receive(timeout=5)
        finally:
            sys.setrecursionlimit(before)


def test_a_torn_message_is_a_closed_channel():
    ours, _, one, two = _pair()
    with one:
        two.sendall(_raw(_array(), b"\0" * 4)[:-2])
        two.close()
        with pytest.raises(ChannelClosedError):
            ours.receive(timeout=5)


def test_silence_times_out():
    ours, _, one, two = _pair()
    with one, two, pytest.raises(TimeoutError):
        ours.receive(timeout=0.05)
