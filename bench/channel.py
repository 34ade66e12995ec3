"""Messages between the command and the process that runs a model's code.

A message is a JSON header and named arrays, over a socket. Nothing is ever unpickled: the other side runs a stranger's
code, so what it sends is data of a few known types within known limits, or an error.

Layout: 4 magic bytes, the header's length (uint32), the length of the array bytes (uint64), the header, the arrays.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from robustboard.errors import WorkerError

Array = npt.NDArray[np.generic]

_MAGIC = b"RBm1"
_PREFIX = struct.Struct("<4sIQ")
_MAX_HEADER = 16 << 20
_MAX_ARRAYS = 16 << 30
_PART = 64 << 20
_DTYPES = {name: np.dtype(name) for name in ("<f2", "<f4", "<f8", "|u1", "|i1", "<i2", "<i4", "<i8", "|b1")}


class ChannelClosedError(Exception):
    """The other side has gone."""


class Channel:
    """One end of a socket that carries messages; closing it is the caller's."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> None:
        """Send one message.

        Raises:
            ChannelClosedError: if the other side has gone.
        """
        self._socket.settimeout(None)
        try:
            for part in _packed(header, arrays or {}):
                self._socket.sendall(part)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error

    def receive(self, timeout: float | None = None) -> tuple[dict[str, Any], dict[str, Array]]:
        """Wait for one message.

        Args:
            timeout: seconds of silence that are too long; None waits for ever.

        Raises:
            TimeoutError: after `timeout` seconds without a byte.
            ChannelClosedError: if the other side has gone.
            WorkerError: if what came is not a message.
        """
        self._socket.settimeout(timeout)
        header_length, array_length = _lengths(self._read(_PREFIX.size))
        return _parsed(self._read(header_length), self._read(array_length))

    def _read(self, count: int) -> bytearray:
        buffer = bytearray()
        while len(buffer) < count:
            # Memory is taken as bytes arrive, not on the other side's word.
            part = bytearray(min(_PART, count - len(buffer)))
            view, done = memoryview(part), 0
            while done < len(part):
                try:
                    got = self._socket.recv_into(view[done:])
                except TimeoutError:
                    raise
                except OSError as error:
                    raise ChannelClosedError(str(error)) from error
                if got == 0:
                    raise ChannelClosedError("end of stream")
                done += got
            buffer += part
        return buffer


def encoded(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """A message as it is sent: equal headers and arrays, in any order of the header's names, give equal bytes."""
    return b"".join(_packed(header, arrays))


def decoded(message: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `encoded` was given.

    Raises:
        WorkerError: if it is not a message.
    """
    if len(message) < _PREFIX.size:
        raise WorkerError("What should be a message is too short for one; it is not used.")
    header_length, array_length = _lengths(message[: _PREFIX.size])
    if len(message) != _PREFIX.size + header_length + array_length:
        raise WorkerError("A message is of another length than it says; it is not used.")
    first = _PREFIX.size + header_length
    return _parsed(message[_PREFIX.size : first], bytearray(message[first:]))


def _packed(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    blobs, specs = [], []
    for name, array in arrays.items():
        little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        specs.append({"name": name, "dtype": little.dtype.str, "shape": list(array.shape)})
        blobs.append(little.reshape(-1).view(np.uint8).data if little.size else b"")
    text = json.dumps({"header": dict(header), "arrays": specs}, sort_keys=True).encode()
    yield _PREFIX.pack(_MAGIC, len(text), sum(len(blob) for blob in blobs)) + text
    yield from blobs


def _lengths(prefix: bytes | bytearray) -> tuple[int, int]:
    magic, header_length, array_length = _PREFIX.unpack(prefix)
    if magic != _MAGIC or header_length > _MAX_HEADER or array_length > _MAX_ARRAYS:
        raise WorkerError("The model's process sent something that is not a message; its answer is not used.")
    return header_length, array_length


def _parsed(text: bytes | bytearray, body: bytearray) -> tuple[dict[str, Any], dict[str, Array]]:
    try:
        # Not the json module: nesting deep enough overruns its stack where some import has raised Python's limit.
        parsed = from_json(bytes(text))
        return dict(parsed["header"]), _unpack(parsed["arrays"], body)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise WorkerError("The model's process sent a damaged message; its answer is not used.") from error


def _unpack(specs: list[dict[str, Any]], body: bytearray) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    offset = 0
    for spec in specs:
        dtype = _DTYPES[spec["dtype"]]
        shape = tuple(int(side) for side in spec["shape"])
        if any(side < 0 for side in shape):
            raise ValueError("negative shape")
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        if end > len(body):
            raise ValueError("array outside the message")
        arrays[str(spec["name"])] = np.frombuffer(body, dtype=dtype, count=count, offset=offset).reshape(shape)
        offset = end
    if offset != len(body):
        raise ValueError("bytes left over")
    return arrays
