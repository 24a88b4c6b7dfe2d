"""Decoders that go wrong, each a process's whole work in place of `ctflow.dicom.read.pixels.decode.run_decoder`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from ctflow.core.shared_memory import SharedMemory
from ctflow.dicom.read.pixels import decode

SPECIAL = "00005.dcm"


def _with(on_special: Callable[[], object], connection: Connection, shared: SharedMemory) -> None:
    real = decode.read_stored

    def read(instance, form, rows, columns):
        if instance.name == SPECIAL:
            on_special()
        return real(instance, form, rows, columns)

    decode.read_stored = read
    decode.run_decoder(connection, shared)


def dies_of_a_slice(connection: Connection, shared: SharedMemory) -> None:
    _with(lambda: os._exit(1), connection, shared)


def hangs_in_a_slice(connection: Connection, shared: SharedMemory) -> None:
    _with(threading.Event().wait, connection, shared)


def fails_unexpectedly(connection: Connection, shared: SharedMemory) -> None:
    def fail() -> None:
        raise ZeroDivisionError("nobody thought of it")

    _with(fail, connection, shared)


def never_begins(_connection: Connection, _shared: SharedMemory) -> None:
    os._exit(1)
