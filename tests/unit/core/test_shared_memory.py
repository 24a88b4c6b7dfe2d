"""Shared memory that grows, and outlives its owner where it is used."""

from __future__ import annotations

import multiprocessing
import os
import resource
from contextlib import closing

import numpy as np
import pytest

from ctflow.compat.python import bare_start
from ctflow.core.shared_memory import SharedMemory


def double(memory: SharedMemory, shape: tuple[int, ...]) -> None:
    memory.array(shape, np.int16)[:] *= 2


def test_another_process_sees_and_changes_it():
    with closing(SharedMemory()) as memory:
        values = memory.allocate((3, 4), np.int16)
        values[:] = np.arange(12).reshape(3, 4)
        process = multiprocessing.get_context("spawn").Process(target=double, args=(memory, (3, 4)))
        with bare_start():
            process.start()
        process.join()
        assert process.exitcode == 0
    assert values.tolist() == (2 * np.arange(12).reshape(3, 4)).tolist()  # still there


def test_it_grows_and_keeps_its_size():
    with closing(SharedMemory()) as memory:
        memory.allocate((2,), np.uint8)
        large = memory.allocate((1000, 1000), np.float32)
        large[:] = 1
        small = memory.allocate((10,), np.float32)
        assert small.sum() == 10
        assert memory.array((1000, 1000), np.float32).all()


def test_an_empty_array_has_a_place():
    with closing(SharedMemory()) as memory:
        assert memory.allocate((0, 5), np.uint8).shape == (0, 5)


def test_each_view_is_pinned_once_and_unpinned_before_it_is_given_up():
    said: list[tuple[str, int]] = []

    def pin(address: int, size: int):
        said.append(("pin", size))
        return lambda: said.append(("unpin", memory.array((1,), np.uint8).ctypes.data - address))  # 0: still mapped

    memory = SharedMemory()
    memory.pin(pin)
    assert said == []  # nothing is mapped yet
    memory.allocate((1000,), np.uint8)
    for _ in range(2):
        memory.pin(pin)
    memory.allocate((500,), np.uint8)
    assert said == [("pin", 1000)]
    memory.allocate((2000,), np.uint8)
    memory.pin(pin)
    memory.close()
    assert said == [("pin", 1000), ("unpin", 0), ("pin", 2000), ("unpin", 0)]


def test_what_cannot_be_pinned_is_not_asked_again():
    said: list[int] = []
    with closing(SharedMemory()) as memory:
        memory.allocate((1000,), np.uint8)
        for _ in range(2):
            memory.pin(lambda _, size: said.append(size))
    assert said == [1000]


def test_a_closed_one_takes_nothing(monkeypatch):
    memory = SharedMemory()
    memory.close()
    monkeypatch.setattr(os, "ftruncate", None)
    try:
        memory.allocate((2,), np.uint8)
    except OSError:
        return
    raise AssertionError


def test_too_little_memory_is_a_memory_error():
    most, limit = resource.getrlimit(resource.RLIMIT_AS)
    with closing(SharedMemory()) as memory:
        resource.setrlimit(resource.RLIMIT_AS, (2**34, limit))
        try:
            with pytest.raises(MemoryError):
                memory.allocate((2**35,), np.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (most, limit))
        assert memory.allocate((2,), np.uint8).size == 2
