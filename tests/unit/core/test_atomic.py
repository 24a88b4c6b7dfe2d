from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

import pytest
from pydicom import dcmwrite
from pydicom.dataset import Dataset

from ctflow.core import atomic
from ctflow.core.atomic import (
    SUPERSEDED,
    make_output_folder,
    output_error_from_oserror,
    publish_folder,
    supersede_folder,
    temporary_folder,
    write_atomically,
)
from ctflow.core.errors import NotWritten, StorageFull
from reasons import raises_reason


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_readable_by_others(tmp_path):
    write_atomically(tmp_path / "a.bin", lambda stream: stream.write(b"content"))
    assert (tmp_path / "a.bin").read_bytes() == b"content"
    assert mode(tmp_path / "a.bin") == 0o644
    assert names(tmp_path) == ["a.bin"]


def test_an_older_file_is_replaced(tmp_path):
    for content in (b"a much longer old content", b"new"):
        write_atomically(tmp_path / "a.bin", lambda stream, content=content: stream.write(content))
    assert (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_writer_that_raises_leaves_what_was_there(tmp_path, old):
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def write(stream):
        stream.write(b"half")
        raise ValueError("the writer's own mistake")

    with pytest.raises(ValueError, match="own mistake"):
        write_atomically(path, write)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize(
    ("number", "named", "reason"),
    [
        (errno.ENOSPC, StorageFull, "disk-full"),
        (errno.EDQUOT, StorageFull, "disk-full"),
        (errno.EIO, NotWritten, "unwritable"),
        (errno.EACCES, NotWritten, "unwritable"),
        (errno.EROFS, NotWritten, "unwritable"),
    ],
)
def test_a_failing_disk_is_named_and_leaves_nothing(tmp_path, number, named, reason):
    def write(stream):
        stream.write(b"half")
        raise OSError(number, os.strerror(number))

    with raises_reason(named, reason, names="a.bin") as caught:
        write_atomically(tmp_path / "a.bin", write)
    assert str(tmp_path) not in str(caught.value), "a path may hold a patient's name"
    assert list(tmp_path.iterdir()) == []


def test_an_oserror_without_words_is_still_explained():
    error = output_error_from_oserror(OSError(), "a.bin")
    assert isinstance(error, NotWritten)
    assert "OSError" in str(error)


def test_a_file_in_the_place_of_a_folder_is_said_to_be_one(tmp_path):
    (tmp_path / "out").touch()
    with raises_reason(NotWritten, "unwritable", names="the output folder is a file and not a folder"):
        make_output_folder(tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_named_with_its_option(tmp_path):
    (tmp_path / "file").touch()
    with raises_reason(NotWritten, "unwritable", names=("the data folder cannot be written", "check --data")) as caught:
        make_output_folder(tmp_path / "file" / "data", "the data folder", option="--data")
    assert "output" not in str(caught.value)


def test_a_missing_folder_is_not_written(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="a.bin"):
        write_atomically(tmp_path / "absent" / "a.bin", lambda stream: stream.write(b""))


def test_a_folder_in_the_files_place_is_not_written(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with raises_reason(NotWritten, "unwritable"):
        write_atomically(tmp_path / "a.bin", lambda stream: stream.write(b"content"))
    assert names(tmp_path) == ["a.bin"]


def test_a_published_folder_is_whole_and_readable_by_others(tmp_path):
    with temporary_folder(tmp_path, "1.2.3") as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".1.2.3.")
        (folder / "a").write_text("a")
        publish_folder(folder, tmp_path / "1.2.3")
    assert names(tmp_path) == ["1.2.3"]
    assert (tmp_path / "1.2.3" / "a").read_text() == "a"
    assert mode(tmp_path / "1.2.3") == 0o755


def test_an_older_folder_is_replaced_and_not_mixed(tmp_path):
    for name in ("old", "new"):
        with temporary_folder(tmp_path, "key") as folder:
            (folder / name).write_text(name)
            publish_folder(folder, tmp_path / "key")
    assert names(tmp_path) == ["key"]
    assert names(tmp_path / "key") == ["new"]


def test_parents_are_made_for_a_result(tmp_path):
    final = tmp_path / "a" / "b" / "key"
    with temporary_folder(final.parent, "key") as folder:
        publish_folder(folder, final)
    assert final.is_dir()


def test_without_a_result_no_made_folder_stays(tmp_path):
    with temporary_folder(tmp_path / "a" / "b", "key") as folder:
        (folder / "half").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_was_there_stays_though_empty(tmp_path):
    (tmp_path / "output").mkdir()
    with temporary_folder(tmp_path / "output", "key"):
        pass
    assert names(tmp_path) == ["output"]


def test_another_writers_folder_in_a_made_parent_stays(tmp_path):
    with temporary_folder(tmp_path / "a", "key"):
        (tmp_path / "a" / "other").mkdir()
    assert names(tmp_path / "a") == ["other"]


def test_a_file_in_the_parents_place_is_not_written(tmp_path):
    (tmp_path / "a").write_text("a file")
    with (
        raises_reason(NotWritten, "unwritable", names="the folder of key"),
        temporary_folder(tmp_path / "a" / "b", "key"),
    ):
        raise AssertionError
    assert names(tmp_path) == ["a"]


def test_a_failed_rename_puts_the_older_result_back(tmp_path, monkeypatch):
    final = tmp_path / "key"
    final.mkdir()
    (final / "old").write_text("old")
    rename = type(final).rename

    def rename_of_full_disk(path, target):
        if path.name.endswith(".old") or path == final:
            return rename(path, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    with temporary_folder(tmp_path, "key") as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(type(final), "rename", rename_of_full_disk)
        with raises_reason(StorageFull, "disk-full", names="the folder key"):
            publish_folder(folder, final)
    assert names(tmp_path) == ["key"]
    assert names(final) == ["old"]


def test_a_rename_that_fails_without_an_older_result_leaves_nothing(tmp_path, monkeypatch):
    def no_rename(path, target):
        raise OSError(errno.EIO, "Input/output error")

    with temporary_folder(tmp_path, "key") as folder:
        monkeypatch.setattr(type(tmp_path), "rename", no_rename)
        with raises_reason(NotWritten, "unwritable", names=("the folder key", "Input/output error")):
            publish_folder(folder, tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_cannot_be_published(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="the folder key"):
        publish_folder(tmp_path / "absent", tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def folder_with(path, content: str):
    path.mkdir()
    (path / "result.json").write_text(content)
    return path


def test_a_superseded_folder_gets_the_next_number_and_nothing_of_it_is_lost(tmp_path):
    for number in ("1", "2", "3"):
        target = supersede_folder(folder_with(tmp_path / "1.2.3", number))
        assert target == tmp_path / SUPERSEDED / f"1.2.3-{number}"
    assert names(tmp_path) == [SUPERSEDED]
    assert [(tmp_path / SUPERSEDED / f"1.2.3-{n}" / "result.json").read_text() for n in "123"] == ["1", "2", "3"]


def test_where_nothing_is_to_be_superseded_nothing_is_made(tmp_path):
    assert supersede_folder(tmp_path / "1.2.3") is None
    assert supersede_folder(tmp_path / "absent" / "1.2.3") is None
    assert names(tmp_path) == []


def test_a_number_that_another_run_takes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "1.2.3", "mine")
    (tmp_path / SUPERSEDED).mkdir()
    theirs = folder_with(tmp_path / SUPERSEDED / "1.2.3-1", "theirs")
    exists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: path != theirs and exists(path))
    assert supersede_folder(folder) == tmp_path / SUPERSEDED / "1.2.3-2"
    assert (theirs / "result.json").read_text() == "theirs"


def test_a_folder_that_another_run_superseded_meanwhile_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "lexists", lambda path: path == tmp_path / "1.2.3")
    assert supersede_folder(tmp_path / "1.2.3") is None


def test_superseding_is_one_rename_and_both_folders_are_synced_after_it(tmp_path, monkeypatch):
    folder, calls = folder_with(tmp_path / "1.2.3", "old"), []
    rename, sync = type(folder).rename, atomic.sync_folder
    monkeypatch.setattr(type(folder), "rename", lambda *paths: (calls.append("rename"), rename(*paths))[1])
    monkeypatch.setattr(atomic, "sync_folder", lambda path: (calls.append(path.name), sync(path)))
    supersede_folder(folder)
    assert calls == ["rename", SUPERSEDED, tmp_path.name]


def test_what_cannot_be_superseded_stays_and_is_named(tmp_path):
    folder = folder_with(tmp_path / "1.2.3", "old")
    (tmp_path / SUPERSEDED).write_text("a file in the way")
    with raises_reason(NotWritten, "unwritable", names=".superseded"):
        supersede_folder(folder)
    assert (folder / "result.json").read_text() == "old"


def test_all_of_a_folder_is_synced_once_before_it_has_its_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append((Path(f"/proc/self/fd/{handle}").readlink().name, final.exists()))
        real(handle)

    final = tmp_path / "final"
    monkeypatch.setattr(os, "fsync", fsync)
    with temporary_folder(tmp_path, "final") as folder:
        for name in ("a", "b"):
            write_atomically(folder / name, lambda stream: stream.write(b"all of it"))
        assert synced == []
        publish_folder(folder, final)
    assert sorted(synced[:2]) == [("a", False), ("b", False)]
    assert synced[2:] == [(folder.name, False), (tmp_path.name, True)]
    write_atomically(final / "c", lambda stream: stream.write(b"later"))
    assert len(synced) == 6, "a file of a folder that has its name is synced, and then its folder"


def test_a_disk_that_is_full_while_pydicom_writes_is_named(tmp_path):
    dataset = Dataset()
    dataset.Rows = 512

    class Full(io.BytesIO):
        def write(self, data) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with raises_reason(StorageFull, "disk-full", names="seg.dcm"):
        write_atomically(
            tmp_path / "seg.dcm", lambda _: dcmwrite(Full(), dataset, implicit_vr=False, little_endian=True)
        )


def test_a_result_that_another_process_publishes_meanwhile_stays_and_nothing_is_left_aside(tmp_path, monkeypatch):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()
    folder = tmp_path / "new"
    folder.mkdir()
    rename = Path.rename

    def raced(self, target):
        if self == folder:
            final.mkdir()
            (final / "faster").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", raced)
    with pytest.raises(NotWritten):
        publish_folder(folder, final)
    monkeypatch.undo()
    assert [path.name for path in final.iterdir()] == ["faster"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "new"]
    publish_folder(folder, final)
    assert list(final.iterdir()) == []
