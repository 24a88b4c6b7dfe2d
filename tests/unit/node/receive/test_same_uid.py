"""A router's habits: other content under a known UID, and objects that are no CT images on the same association."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.node.journal.records import WorkerResult
from ctflow.node.journal.retention import prune_instances
from ctflow.node.journal.writes import digest_of_set, key_of
from ctflow.node.receive import intake
from ctflow.node.settings.groups import Peer
from ctflow.node.settings.service import read_settings, same_uid_of
from service_support import association, dcmtk, instance, store, storescu

KEY = key_of("1.2.826.0.2", "1.2.826.0.3", 1)
SECOND = key_of("1.2.826.0.2", "1.2.826.0.3", 2)
SC, DOSE = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.67"


def kinds(node) -> list[str]:
    return [event.kind for event in node.journal.events()]


def number_in_file(node, key: str = KEY) -> list[int]:
    files = [node.inbox.folder / each.file for each in node.journal.instances(key)]
    return [int(pydicom.dcmread(file).InstanceNumber) for file in files]


def finish(node) -> str:
    """A result of what was received."""
    node.journal.complete_quiet(0)
    job = node.journal.claim()
    assert node.journal.commit(job, WorkerResult(f"{job.key}/x", "m", "1", "w", False, 0.1, ()), ())
    return job.key


def test_keep_first_answers_success_and_keeps_what_it_has(scp):
    node = scp(same_uid="keep_first")
    changed = [instance(number, InstanceNumber=70 + number) for number in (1, 2)]
    assert store(node.port, instance(1), instance(2), *changed) == [0, 0, 0, 0]
    assert sorted(number_in_file(node)) == [1, 2]
    assert len(node.files) == 2
    assert kinds(node) == ["kept-first", "received"]  # one line, not one for each instance
    assert all("1.2.826" not in event.text for event in node.journal.events())


def test_newest_replaces_an_instance_before_there_is_a_result(scp):
    node = scp(same_uid="newest")
    assert store(node.port, instance(1), instance(1, InstanceNumber=7), instance(1, InstanceNumber=7)) == [0, 0, 0]
    assert number_in_file(node) == [7]
    (file,) = node.files  # the earlier one is gone
    found = node.journal.find(KEY)
    assert (found.instances, found.duplicates, found.state) == (1, 1, "received")
    assert found.bytes == node.journal.instances(KEY)[0].bytes
    assert kinds(node) == ["replaced", "received"]
    assert node.inbox.sweep(node.journal.files()) == 0
    assert file.exists()


def test_newest_makes_a_revision_after_a_result_and_the_earlier_one_keeps_its_files(scp):
    node = scp(same_uid="newest")
    store(node.port, instance(1), instance(2))
    assert finish(node) == KEY
    assert store(node.port, instance(1, InstanceNumber=7), instance(2, InstanceNumber=8)) == [0, 0]
    assert sorted(number_in_file(node)) == [1, 2]
    assert sorted(number_in_file(node, SECOND)) == [7, 8]
    assert len(node.files) == 4
    assert node.journal.find(SECOND).instances == 2
    assert kinds(node).count("replaced") == 1


def test_a_result_of_the_earlier_content_is_not_taken_for_one_of_the_newest(scp):
    node = scp(same_uid="newest")
    store(node.port, instance(1))
    node.journal.complete_quiet(0)
    early = node.journal.claim()
    assert early.set_digest == digest_of_set(["1.2.826.0.1.1"])
    store(node.port, instance(1, InstanceNumber=7))
    assert node.journal.find(KEY).state == "received"
    node.journal.complete_quiet(0)
    late = node.journal.claim()
    assert late.set_digest != early.set_digest
    answer = WorkerResult(f"{KEY}/x", "m", "1", "w", False, 0.1, ())
    assert not node.journal.commit(early, answer, ())
    assert node.journal.commit(late, answer, ())


def test_refuse_is_what_holds_unless_a_site_chooses(scp, tmp_path):
    node = scp()
    assert store(node.port, instance(1), instance(1, InstanceNumber=7)) == [0, intake.CONFLICT]
    (tmp_path / "node.yaml").write_text(
        "same_uid: keep_first\npeers:\n"
        "  - {host: 10.1.0.0/16, ae_title: CT1, same_uid: newest}\n  - {host: 10.0.0.0/8}\n"
    )
    settings = read_settings(tmp_path / "node.yaml", {"HOME": "/none"})
    assert same_uid_of(settings, "CT1", "10.1.2.3") == "newest"
    assert same_uid_of(settings, "CT2", "10.1.2.3") == "keep_first"
    assert same_uid_of(settings, "CT1", "nowhere") == "keep_first"
    assert (
        same_uid_of(replace(settings, same_uid="refuse", peers=(Peer(settings.peers[1].host),)), "A", "10.1.2.3")
        == "refuse"
    )


def test_many_at_once_leave_one_file_and_one_instance(scp):
    node = scp(same_uid="newest")
    with ThreadPoolExecutor(6) as pool:
        statuses = [
            each
            for found in pool.map(
                lambda n: store(node.port, *(instance(1, InstanceNumber=n * 10 + m) for m in range(5))), range(6)
            )
            for each in found
        ]
    assert statuses == [0] * 30
    assert len(node.files) == 1
    assert [node.inbox.folder / each.file for each in node.journal.instances(KEY)] == node.files


def test_a_newest_that_finds_no_space_is_refused_and_the_first_stays(scp, monkeypatch):
    node = scp(same_uid="newest")
    store(node.port, instance(1))
    monkeypatch.setattr(node.inbox, "has_space", lambda _count: False)
    assert store(node.port, instance(1, InstanceNumber=7), instance(1)) == [intake.OUT_OF_RESOURCES, 0]
    assert number_in_file(node) == [1]
    assert node.journal.find(KEY).refused == 0  # the sender went back to the content that is kept


def test_a_count_completes_a_series_only_where_it_does_not_wait_for_its_study(scp):
    for by_study, state in ((False, "complete"), (True, "received")):
        node = scp(by_study=by_study)
        store(node.port, instance(1, NumberOfSeriesRelatedInstances=1))
        assert node.journal.find(KEY).state == state


def other(number: int, sop_class: str, **changes):
    dataset = instance(number, SOPClassUID=sop_class, **changes)
    if sop_class == DOSE:
        del dataset.PixelData
        dataset.Modality = "SR"
        dataset.ValueType = "CONTAINER"
    return dataset


def test_captures_and_dose_reports_are_kept_and_left_out_of_the_series(scp):
    node = scp()
    sent = [instance(1), other(2, SC), other(3, SC), other(4, DOSE, SeriesInstanceUID="1.2.9"), other(2, SC)]
    assert store(node.port, *sent) == [0] * 5
    assert len(node.files) == 4
    assert node.inbox.sweep(node.journal.files()) == 0
    assert [each.instances for each in node.journal.series()] == [1]  # the dose report is no series
    assert kinds(node).count("left-out") == 2  # one for each series, not one for each object
    exposition = node.journal, node.intake._metrics.exposition()[0].decode()
    assert "ctflow_objects_left_out_total 3.0" in exposition[1]
    assert store(node.port, other(2, SC, InstanceNumber=9)) == [intake.CONFLICT]
    assert json.dumps([event.text for event in node.journal.events()]).count("1.2.826") == 0


@pytest.mark.parametrize(("policy", "number"), [("keep_first", 1), ("newest", 9)])
def test_a_left_out_object_that_changes_follows_the_same_rule(scp, policy, number):
    node = scp(same_uid=policy)
    assert store(node.port, other(1, SC), other(1, SC, InstanceNumber=9)) == [0, 0]
    (file,) = node.files
    assert pydicom.dcmread(file).InstanceNumber == number


def test_left_out_objects_have_limits_too(scp):
    node = scp(most_instances=2)
    assert store(node.port, *(other(number, SC) for number in (1, 2, 3))) == [0, 0, intake.TOO_MUCH]
    assert len(node.files) == 2


def test_a_router_finishes_a_study_with_a_dose_report(scp, tmp_path: Path):
    dcmtk("storescu")
    node = scp(same_uid="keep_first")
    for number, dataset in enumerate([instance(1), other(2, SC), other(3, DOSE), instance(1, InstanceNumber=5)]):
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    done = storescu(node.port, tmp_path)
    assert done.returncode == 0
    assert node.journal.find(KEY).instances == 1
    with association(node.port, contexts={CT_IMAGE_STORAGE: [ExplicitVRLittleEndian]}) as found:
        assert found.is_established


def test_an_instance_of_an_earlier_revision_comes_again_after_the_files_of_the_newest_went(scp):
    """The earlier one still has it, as its results are not delivered; so it seemed known, and was never recorded."""
    node = scp()
    assert store(node.port, instance(1)) == [0]
    finish(node)
    assert store(node.port, instance(2)) == [0]
    assert finish(node) == SECOND
    assert len(node.journal.change(lambda db, now: prune_instances(db, now, SECOND, "a test"))) == 1
    assert store(node.port, instance(1)) == [0]
    newest = node.journal.find(key_of("1.2.826.0.2", "1.2.826.0.3", 3))
    assert (newest.instances, newest.state) == (1, "received")
