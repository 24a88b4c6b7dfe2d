"""A backup is a data folder, consistent with its journal, whole or absent; a node that starts from it loses nothing."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from ctflow.cli.main import main
from ctflow.core.errors import SettingsInvalid, StorageFull
from ctflow.node.journal.journal import Journal
from ctflow.node.keeping import backup as module
from ctflow.node.keeping.backup import back_up
from ctflow.node.receive.inbox import Inbox
from node_support import Ward
from reasons import raises_reason
from service_support import instance, store


@pytest.fixture
def ward(tmp_path):
    ward = Ward(tmp_path / "data")
    for name in ("1", "2"):
        ward.delivered(name, 2)
    ward.complete("3")
    for file in ward.journal.files():
        (ward.settings.data / "inbox" / file).parent.mkdir(parents=True, exist_ok=True)
        (ward.settings.data / "inbox" / file).write_bytes(file.encode())
    for each in ward.journal.series():
        for result in ward.journal.results(each.key):
            (ward.results / result.folder / "volume").mkdir(parents=True)
            (ward.results / result.folder / "volume" / "segmentation.dcm").write_bytes(b"seg")
    yield ward
    ward.close()


def below(folder) -> dict[str, bytes]:
    files = [path for part in ("inbox", "results") for path in (folder / part).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("copy", [False, True])
def test_a_backup_has_what_the_journal_names_and_nothing_else(ward, tmp_path, copy):
    data = ward.settings.data
    (data / "inbox" / "ab" / "1" / "unacknowledged.dcm").write_bytes(b"x")
    found = back_up(data, tmp_path / "backup", copy=copy)
    assert (found["instances"], found["results"], found["missing"]) == (5, 2, 0)
    assert found["hard_links"] == (0 if copy else 7)
    expected = below(data)
    del expected["inbox/ab/1/unacknowledged.dcm"]
    assert below(tmp_path / "backup") == expected
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert (data / "inbox/ab/1/0.dcm").samefile(tmp_path / "backup/inbox/ab/1/0.dcm") is not copy
    journal = Journal(tmp_path / "backup" / "journal.sqlite3")
    assert journal.counts() == ward.journal.counts()
    assert journal.events() == ward.journal.events()
    assert Inbox(tmp_path / "backup" / "inbox", 0).sweep(journal.files()) == 0
    journal.close()


def test_a_node_starts_from_a_backup_that_was_made_while_it_received(scp, tmp_path):
    node = scp()
    data = node.journal.path.parent
    acknowledged: list[int] = []
    done = threading.Event()

    def send() -> None:
        for number in range(1, 200):
            if store(node.port, instance(number)) == [0]:
                acknowledged.append(number)
            if done.is_set():
                return

    sender = threading.Thread(target=send)
    sender.start()
    while len(acknowledged) < 5:
        assert sender.is_alive()
    before = len(acknowledged)
    found = back_up(data, tmp_path / "backup")
    done.set()
    sender.join()
    assert found["missing"] == 0
    assert found["instances"] >= before
    # The way back: a copy of the backup is the data folder.
    shutil.copytree(tmp_path / "backup", tmp_path / "restored")
    journal = Journal(tmp_path / "restored" / "journal.sqlite3")
    inbox = Inbox(tmp_path / "restored" / "inbox", 0)
    assert inbox.sweep(journal.files()) == 0
    (series,) = journal.series()
    records = journal.instances(series.key)
    assert len(records) == found["instances"] == series.instances
    for record in records:
        assert (inbox.folder / record.file).stat().st_size > record.bytes  # the file also has its meta information
    journal.complete_quiet(0)
    assert journal.claim() is not None
    journal.close()


def test_a_backup_of_a_damaged_folder_names_what_is_missing(ward, tmp_path, capsys):
    (ward.settings.data / "inbox/ab/1/0.dcm").unlink()
    config = tmp_path / "node.yaml"
    config.write_text(f"data: {ward.settings.data}\n")
    assert main(["node", "backup", str(tmp_path / "backup"), "-c", str(config)]) == 6
    assert "1 file or folder is missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "backup" / "backup.json").read_text())["missing"] == 1


def test_nothing_stays_of_a_backup_that_fails(ward, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "link", full)
    with pytest.raises(StorageFull):
        back_up(ward.settings.data, tmp_path / "backup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_place_that_will_not_do_is_named(ward, tmp_path):
    (tmp_path / "there").mkdir()
    with raises_reason(SettingsInvalid, "backup-place"):
        back_up(ward.settings.data, tmp_path / "there")
    with raises_reason(SettingsInvalid, "backup-place"):
        back_up(ward.settings.data, ward.settings.data / "backup")
    with raises_reason(SettingsInvalid, "journal"):
        back_up(tmp_path / "there", tmp_path / "backup")
    with raises_reason(SettingsInvalid, "missing-folder", names="data"):  # as a folder that is closed to this user
        back_up(tmp_path / ("x" * 300), tmp_path / "backup")
