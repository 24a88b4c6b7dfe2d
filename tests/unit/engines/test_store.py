from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ctflow.engines.store import EngineKey, EngineStore
from ctflow.errors import EngineMismatch, NotWritten

KEY = EngineKey(
    kind="onnx", version="1", rewrite=1, weights_digest="d" * 64, network="SwinUNETR",
    arguments={"feature_size": 12, "depths": (2, 2)}, head="difference", roi=(96, 96, 96), batch_range=(1, 1),
    precision="fp32", device="any",
)  # fmt: skip
FORK = multiprocessing.get_context("spawn")


def write_engine(path: Path) -> None:
    path.write_bytes(b"engine")


@pytest.fixture
def store(tmp_path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


def test_what_is_put_is_found(store):
    assert store.find(KEY) is None
    assert not store.folder.exists()
    path = store.put(KEY, write_engine)
    assert store.find(KEY) == path == store.path_of(KEY)
    assert path.read_bytes() == b"engine"


def test_it_is_made_once(store):
    path = store.put(KEY, write_engine)
    assert store.put(KEY, lambda _: pytest.fail("made again")) == path


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "plan"}, {"version": "2"}, {"rewrite": 2}, {"weights_digest": "e" * 64}, {"network": "UNETR"},
        {"arguments": {"feature_size": 24}}, {"head": "all channels"}, {"roi": (64, 64, 64)}, {"batch_range": (1, 4)},
        {"precision": "bf16"}, {"device": "H200"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_everything_it_depends_on_has_another_place(store, change):
    store.put(KEY, write_engine)
    other = replace(KEY, **change)
    assert store.path_of(other) != store.path_of(KEY)
    assert store.find(other) is None


def test_a_damaged_file_is_named(store):
    path = store.put(KEY, write_engine)
    path.write_bytes(b"enginf")
    for ask in (lambda: store.find(KEY), lambda: store.put(KEY, write_engine)):
        with pytest.raises(EngineMismatch, match=f"{KEY.name}: engine.onnx is not the file.*remove that folder"):
            ask()


def test_a_file_that_is_gone_is_named(store):
    store.put(KEY, write_engine).unlink()
    with pytest.raises(EngineMismatch, match=r"engine\.onnx cannot be read \(FileNotFoundError\)"):
        store.find(KEY)


def test_a_manifest_of_another_model_names_what_differs(store):
    path = store.put(KEY, write_engine)
    other = store.put(replace(KEY, weights_digest="e" * 64, roi=(64, 64, 64)), write_engine)
    (path.parent / "manifest.json").write_bytes((other.parent / "manifest.json").read_bytes())
    with pytest.raises(EngineMismatch, match="made for another roi, weights_digest"):
        store.find(KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2, "key": {}}', '{"format": 1, "key": 3}', "\0\0"])
def test_a_foreign_manifest_is_refused(store, text):
    path = store.put(KEY, write_engine)
    (path.parent / "manifest.json").write_text(text)
    with pytest.raises(EngineMismatch, match=r"manifest\.json (cannot be read|is of another kind).*remove that folder"):
        store.find(KEY)


def test_the_manifest_says_what_the_file_is(store):
    path = store.put(KEY, write_engine)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["key"]["roi"] == [96, 96, 96]
    assert manifest["key"]["arguments"] == {"depths": [2, 2], "feature_size": 12}


def test_a_failed_making_leaves_nothing(store):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.put(KEY, fail)
    assert [path.suffix for path in store.folder.iterdir()] == [".lock"]
    assert store.find(KEY) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(NotWritten, match="folder of engines"):
        EngineStore(tmp_path / "engines").put(KEY, write_engine)


def put_slowly(folder: str, seconds: float) -> None:
    def make(path: Path) -> None:
        with (Path(folder) / "made.txt").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        path.write_bytes(b"half")
        time.sleep(seconds)
        path.write_bytes(b"engine")

    EngineStore(Path(folder)).put(KEY, make)


def test_two_processes_at_once_make_it_once(store):
    store.folder.mkdir()
    processes = [FORK.Process(target=put_slowly, args=(str(store.folder), 0.5)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len((store.folder / "made.txt").read_text().split()) == 1
    assert store.find(KEY).read_bytes() == b"engine"


def test_a_killed_maker_leaves_nothing_in_the_way(store):
    store.folder.mkdir()
    process = FORK.Process(target=put_slowly, args=(str(store.folder), 60.0))
    process.start()
    while not list(store.folder.glob(".*/engine.onnx")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.find(KEY) is None
    store.put(KEY, write_engine)
    assert store.find(KEY).read_bytes() == b"engine"
    assert not list(store.folder.glob(".*"))
