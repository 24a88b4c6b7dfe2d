from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ctflow.core import atomic
from ctflow.core.errors import CtflowError, EngineMismatch, ExportFailed, NotWritten, StorageFull
from ctflow.engines.store.manifest import Difference, read_json_object
from ctflow.engines.store.store import EngineKey, EngineStore
from reasons import raises_reason

KEY = EngineKey(
    kind="onnx", version="1", rewrite=1, weights_digest="d" * 64, network="SwinUNETR",
    arguments={"feature_size": 12, "depths": (2, 2)}, head="difference", roi=(96, 96, 96), batch_range=(1, 1),
    precision="fp32", device="any",
)  # fmt: skip
H200 = "NVIDIA H200, compute capability 9.0, driver 580.159.04"
PLAN = replace(KEY, kind="plan", version="tensorrt 8.5.3.1", precision="fp16", device=H200)
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
        with raises_reason(EngineMismatch, "stored-engine", names=(KEY.name, "engine.onnx")):
            ask()


def test_a_file_that_is_gone_is_named(store):
    store.put(KEY, write_engine).unlink()
    with raises_reason(EngineMismatch, "stored-engine", names=("engine.onnx", "FileNotFoundError")):
        store.find(KEY)


def test_a_manifest_of_another_model_names_what_differs(store):
    path = store.put(KEY, write_engine)
    other = store.put(replace(KEY, weights_digest="e" * 64, roi=(64, 64, 64)), write_engine)
    (path.parent / "manifest.json").write_bytes((other.parent / "manifest.json").read_bytes())
    wanted = r"differs in roi \(\[64, 64, 64\] is stored, \[96, 96, 96\] is wanted\), "
    with pytest.raises(EngineMismatch, match=wanted + r"weights digest \(eeeeeeeeeeee is stored, d{12} is wanted\);"):
        store.find(KEY)


def test_a_plan_of_another_gpu_or_driver_names_both(store):
    path = store.put(PLAN, write_engine)
    other = store.put(replace(PLAN, device=H200.replace("580.159.04", "550.54"), version="tensorrt 10.1"), write_engine)
    (path.parent / "manifest.json").write_bytes((other.parent / "manifest.json").read_bytes())
    with raises_reason(EngineMismatch, "stored-engine") as caught:
        store.find(PLAN)
    assert "device (made for driver 550.54, this machine has driver 580.159.04)" in str(caught.value)
    assert "version (made by tensorrt 10.1, this machine has tensorrt 8.5.3.1)" in str(caught.value)
    assert "remove that folder and run `ctflow export`" in str(caught.value)


def test_a_message_stays_short_and_plain_whatever_is_stored(store):
    path = store.put(KEY, write_engine)
    fields = {**KEY.fields, "device": "\x1b[2J\ud800" + "x" * 9999, **{f"field {n}": "y" * 9999 for n in range(50)}}
    (path.parent / "manifest.json").write_text(json.dumps({"format": 1, "key": fields}))
    with pytest.raises(EngineMismatch, match=r"\?\[2J\?xxx.* and 45 more; remove") as caught:
        store.find(KEY)
    assert len(str(caught.value)) < 1200
    assert str(caught.value).isprintable()


MANIFESTS = [
    "", "{", "[]", "{}", '{"format": 2, "key": {}}', '{"format": 1, "key": 3}', "\0\0", "[" * 100_000,
    '{"format": 1, "key": ' + '{"a":' * 400 + "1" + "}" * 401, "{}" + " " * (1 << 20), "1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_foreign_manifest_is_refused(store, text):
    path = store.put(KEY, write_engine)
    (path.parent / "manifest.json").write_text(text)
    with raises_reason(EngineMismatch, "stored-engine", names="manifest.json"):
        store.find(KEY)
    for check in (True, False):
        (entry,) = store.entries(check=check)
        assert entry.state in {"damaged", "foreign"}
        assert entry.reason.startswith("manifest.json ")
    assert store.nearest(replace(KEY, precision="bf16")) is None


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"a file")


@pytest.mark.parametrize(
    ("place", "damage", "state", "words"),
    [
        ("engine.onnx", cut, "damaged", "engine.onnx is not the file that was stored"),
        ("engine.onnx", Path.unlink, "damaged", "engine.onnx"),
        ("engine.onnx", link, "damaged", "engine.onnx"),
        ("engine.onnx", pipe, "damaged", "engine.onnx"),
        ("engine.onnx", folder_instead, "damaged", "engine.onnx"),
        ("manifest.json", cut, "damaged", "manifest.json cannot be read"),
        ("manifest.json", Path.unlink, "damaged", "manifest.json cannot be read (FileNotFoundError)"),
        ("manifest.json", link, "damaged", "manifest.json cannot be read"),
        ("manifest.json", pipe, "damaged", "manifest.json cannot be read"),
        (".", link, "foreign", "it is not a folder"),
        (".", file_instead, "foreign", "it is not a folder"),
    ],
)
def test_whatever_is_done_to_a_stored_engine_is_refused_and_listed(store, place, damage, state, words):
    folder = store.put(KEY, write_engine).parent
    if damage is cut and place == "manifest.json":
        (folder / place).write_text((folder / place).read_text().rstrip())
    damage(folder / place if place != "." else folder)
    for ask in (lambda: store.find(KEY), lambda: store.put(KEY, write_engine)):
        with raises_reason(EngineMismatch, "stored-engine", names=KEY.name) as caught:
            ask()
        assert words in str(caught.value)
    entry = next(entry for entry in store.entries() if entry.name == KEY.name)
    assert entry.state == state
    assert words in entry.reason


def test_a_link_to_nothing_is_refused(store):
    store.folder.mkdir()
    (store.folder / KEY.name).symlink_to("nowhere")
    with raises_reason(EngineMismatch, "stored-engine"):
        store.put(KEY, write_engine)


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


@pytest.mark.parametrize(
    ("number", "named", "reason"),
    [
        (errno.ENOSPC, StorageFull, "disk-full"),
        (errno.EDQUOT, StorageFull, "disk-full"),
        (errno.EIO, NotWritten, "unwritable"),
    ],
)
def test_a_disk_that_fails_the_maker_is_named_and_leaves_nothing(store, number, named, reason):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with raises_reason(named, reason, names="engine.plan"):
        store.put(PLAN, fail)
    assert [path.suffix for path in store.folder.iterdir()] == [".lock"]


def test_a_disk_that_is_full_when_the_manifest_is_written_leaves_nothing(store, monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with raises_reason(StorageFull, "disk-full", names="folder"):
        store.put(KEY, write_engine)
    assert [path.suffix for path in store.folder.iterdir()] == [".lock"]


def test_a_library_that_does_not_load_is_not_the_disk(store):
    def fail(_path: Path) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    with pytest.raises(OSError, match="libnvinfer"):
        store.put(KEY, fail)


@pytest.mark.parametrize("make", [lambda _: None, Path.touch, Path.mkdir], ids=["nothing", "empty", "folder"])
def test_a_maker_that_makes_no_file_is_named(store, make):
    with raises_reason(ExportFailed, "nothing-made", names="engine.onnx"):
        store.put(KEY, make)
    assert store.find(KEY) is None


def test_every_file_and_folder_is_synced_before_and_after_the_rename(store, monkeypatch):
    """The engine, its manifest and their folder before it has its name, and the store's folder after that."""
    store.folder.mkdir()
    sync, synced = os.fsync, []

    def record(handle):
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        synced.append(("temporary" if name.startswith(f".{KEY.name}") else name, store.path_of(KEY).exists()))
        sync(handle)

    monkeypatch.setattr(atomic.os, "fsync", record)
    store.put(KEY, write_engine)
    before = [name for name, published in synced if not published]
    assert {"engine.onnx", "manifest.json", "temporary"} <= set(before)
    assert before[-1] == "temporary", "the folder after its files"
    assert [name for name, published in synced if published] == ["engines"]


def as_another_user(folder: str, answer) -> None:
    """Root may do anything, so it asks as nobody; the path is relative, as nobody may not enter the test's folders."""
    os.chdir(folder)
    if os.geteuid() == 0:
        os.seteuid(65534)
    store, words = EngineStore(Path()), []
    for ask in (lambda: store.find(KEY), lambda: store.put(replace(KEY, precision="bf16"), write_engine)):
        try:
            words.append(str(ask()))
        except CtflowError as error:
            words.append(error.described)
    answer.put((words, [asdict(entry) for entry in store.entries()], store.problem()))


def answer_of_another_user(store: EngineStore):
    answer = FORK.Queue()
    process = FORK.Process(target=as_another_user, args=(str(store.folder), answer))
    process.start()
    said = answer.get(timeout=60)
    process.join()
    return said


def test_a_folder_that_can_only_be_read_serves_what_it_has(store):
    store.put(KEY, write_engine)
    store.folder.chmod(0o555)
    (found, put), entries, problem = answer_of_another_user(store)
    store.folder.chmod(0o755)
    assert found == f"{KEY.name}/engine.onnx"
    assert put.startswith("NotWritten [unwritable]: the folder of engines cannot be written (Permission denied)")
    assert [entry["state"] for entry in entries] == ["ready"]
    assert problem is None


def test_another_users_engine_is_listed_as_unreadable(store):
    folder = store.put(KEY, write_engine).parent
    folder.chmod(0)
    (found, _), (entry,), _ = answer_of_another_user(store)
    folder.chmod(0o755)
    assert "cannot be read (PermissionError)" in found
    assert (entry["state"], entry["key"]) == ("unreadable", None)


def test_another_users_file_is_listed_as_unreadable(store):
    path = store.put(KEY, write_engine)
    path.chmod(0)
    (found, _), (entry,), _ = answer_of_another_user(store)
    assert "engine.onnx cannot be read (PermissionError)" in found
    assert (entry["state"], entry["size"] > 6) == ("unreadable", True)


def test_a_store_that_cannot_be_listed_says_so(store, tmp_path):
    assert (store.problem(), store.entries()) == (None, ())
    (tmp_path / "engines").write_text("a file")
    assert "Not a directory" in store.problem()
    assert store.entries() == ()
    assert store.nearest(KEY) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "engines").write_text("a file")
    with raises_reason(NotWritten, "unwritable", names=("folder of engines", "-o of `ctflow export`")):
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


def test_who_waits_for_a_cache_that_is_emptied_takes_the_new_lock(store):
    store.folder.mkdir()
    lock = store.folder / f"{KEY.name}.lock"
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=store.put, args=(KEY, write_engine))
        waiting.start()
        time.sleep(0.2)
        shutil.rmtree(store.folder)
    waiting.join()
    assert lock.exists()
    assert store.find(KEY).read_bytes() == b"engine"


def test_a_killed_maker_leaves_nothing_in_the_way(store):
    store.folder.mkdir()
    process = FORK.Process(target=put_slowly, args=(str(store.folder), 60.0))
    process.start()
    while not list(store.folder.glob(".*/engine.onnx")):
        time.sleep(0.02)
    (making,) = store.entries()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (making.state, making.reason, making.key) == ("being made", None, None)
    assert store.find(KEY) is None
    (left,) = store.entries()
    assert (left.state, left.size, left.name) == ("left over", 4, making.name)
    assert "was killed" in left.reason
    store.put(KEY, write_engine)
    assert store.find(KEY).read_bytes() == b"engine"
    assert not list(store.folder.glob(".*"))


def test_who_waits_for_a_maker_that_is_killed_makes_it(store):
    store.folder.mkdir()
    first, second = (FORK.Process(target=put_slowly, args=(str(store.folder), seconds)) for seconds in (60.0, 0.0))
    first.start()
    while not list(store.folder.glob(".*/engine.onnx")):
        time.sleep(0.02)
    second.start()
    second.join(timeout=2)
    assert second.exitcode is None, "it waits"
    os.kill(first.pid, signal.SIGKILL)
    second.join()
    first.join()
    assert second.exitcode == 0
    assert (store.folder / "made.txt").read_text().split() == [str(first.pid), str(second.pid)]
    assert [entry.state for entry in store.entries()] == ["ready"]


def test_what_is_stored_is_listed_and_nothing_else(store):
    assert store.entries() == ()
    path = store.put(PLAN, write_engine)
    store.put(KEY, write_engine)
    (store.folder / "choice-0123456789abcdef0123456789abcdef.json").write_text("{}")
    (store.folder / "notes").mkdir()
    (store.folder / f".{PLAN.name[:9]}.file").write_text("")
    first, second = store.entries()
    assert (first.name, second.name) == (KEY.name, PLAN.name)
    assert (second.state, second.reason, second.key.fields) == ("ready", None, PLAN.fields)
    assert second.key.name == PLAN.name
    assert second.size == sum(file.stat().st_size for file in path.parent.iterdir())
    assert abs(second.made - time.time()) < 60


def test_a_copy_under_another_name_is_foreign(store):
    folder = store.put(KEY, write_engine).parent
    shutil.copytree(folder, store.folder / "a copy")
    shutil.copytree(folder, store.folder / f"onnx-{'0' * 32}")
    copy, other, whole = store.entries()
    assert (copy.state, other.state, whole.state) == ("foreign", "foreign", "ready")
    assert copy.reason == f"it belongs under the name {KEY.name}"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "../../x"}, {"kind": 3}, {"rewrite": True}, {"rewrite": "1"}, {"roi": [1, 2]}, {"roi": [1, 2, 3.0]},
        {"batch_range": "11"}, {"arguments": []}, {"device": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_key_of_another_kind_is_foreign(store, change):
    path = store.put(KEY, write_engine)
    (path.parent / "manifest.json").write_text(json.dumps({"format": 1, "key": {**KEY.fields, **change}}))
    (entry,) = store.entries()
    assert (entry.state, entry.key) == ("foreign", None)


def test_a_listing_without_a_check_reads_no_engine(store):
    path = store.put(KEY, write_engine)
    path.write_bytes(b"enginf")
    assert [entry.state for entry in store.entries(check=False)] == ["ready"]
    assert [(entry.state, entry.key.name) for entry in store.entries()] == [("damaged", KEY.name)]


def test_the_nearest_names_another_driver_and_another_gpu(store):
    assert store.nearest(PLAN) is None
    store.put(replace(PLAN, device=H200.replace("H200", "H100"), precision="fp32"), write_engine)
    near = store.nearest(PLAN)
    assert near.differing == (
        Difference("device", "NVIDIA H100", "NVIDIA H200"),
        Difference("precision", "fp32", "fp16"),
    )
    store.put(replace(PLAN, device=H200.replace("580.159.04", "550.54")), write_engine)
    near = store.nearest(PLAN)
    assert near.text == "a stored one differs in device (made for driver 550.54, this machine has driver 580.159.04)"
    assert near.engine.key.device.endswith("driver 550.54")


def test_the_nearest_is_of_the_same_kind_and_weights_and_whole(store):
    store.put(replace(PLAN, kind="onnx"), write_engine)
    store.put(replace(PLAN, weights_digest="e" * 64), write_engine)
    store.put(replace(PLAN, precision="fp32"), write_engine).unlink()
    store.put(PLAN, write_engine)
    assert store.nearest(PLAN) is None


def test_of_two_as_near_the_newest_is_named(store):
    for age, roi in enumerate(((32, 32, 32), (64, 64, 64), (128, 128, 128))):
        path = store.put(replace(PLAN, roi=roi), write_engine)
        os.utime(path.parent / "manifest.json", (1e9, 1e9 - abs(age - 1)))
    assert store.nearest(PLAN).text == "a stored one differs in roi ([64, 64, 64] is stored, [96, 96, 96] is wanted)"


def test_a_document_is_a_small_plain_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json_object(tmp_path / "a.json") == {"a": [1]}
    (tmp_path / "b.json").symlink_to("a.json")
    for name, error in (("b.json", OSError), ("absent.json", FileNotFoundError), (".", OSError)):
        with pytest.raises(error):
            read_json_object(tmp_path / name)
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="utf-8"):
        read_json_object(tmp_path / "a.json")
