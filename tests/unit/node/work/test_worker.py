"""A task ends as one of three outcomes: done, set aside with the reason, or to be tried again."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pydicom
import pytest

from bundle_support import small_unet_bundle
from ctflow.bundle import read_bundle
from ctflow.core.errors import DeviceOutOfMemory
from ctflow.core.model import Model
from ctflow.node.deliver.storage import SENT_CLASSES
from ctflow.node.journal.records import InstanceRecord, Job
from ctflow.node.journal.writes import digest_of_set
from ctflow.node.rules import Rule
from ctflow.node.work import worker
from ctflow.node.work.messages import Setup, Task
from ctflow.node.work.worker import basis_of_result, run_task
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from dicom_support import small_volume, write_volumes
from enhanced_support import frames_of, write_enhanced
from marking_support import MarkingSegmenter, OnlyModel, marking_model

SETUP = Setup(None, Settings(engine="eager", cache=None, device="cpu", report="none"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    model = read_bundle(small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small"))
    with Segmenter(model, SETUP.settings) as segmenter:
        yield segmenter


@pytest.fixture
def task(series, tmp_path) -> Task:
    instances = tuple(
        InstanceRecord(f"1.2.{n}", "1.2", "1.2.1", path.name, 1, "s", 0.0)
        for n, path in enumerate(sorted(series.iterdir()))
    )
    job = Job("key", "1.2.3", digest_of_set([each.sop_instance_uid for each in instances]), instances, 1, None)
    return Task(job, series, tmp_path / "results", tmp_path / "running" / "key", "ROUTER")


def run(task, segmenter):
    return run_task(task, SETUP, OnlyModel(segmenter.model, segmenter))


def test_a_result_is_written_once_and_the_next_run_gives_the_same_answer(task, segmenter, monkeypatch):
    done = run(task, segmenter)
    assert (done.kind, [each.file for each in done.result.objects]) == (
        "done",
        ["segmentation.dcm", "measurements.dcm"],
    )
    assert (task.results / done.result.folder / "result.json").is_file()
    assert not task.scratch.exists()
    assert done.stage_seconds["segment"] > 0
    # The node ended before the journal knew: what lies there is the answer, and nothing is computed.
    monkeypatch.setattr(worker, "_compute", lambda *_: pytest.fail("it is computed again"))
    again = run(task, segmenter)
    assert replace(again.result, elapsed_s=0) == replace(done.result, elapsed_s=0)


def test_every_kind_of_object_that_is_asked_for_is_sent(task, segmenter):
    asked = replace(SETUP.settings, secondary_capture=True, rtstruct=True, pdf=True)
    done = run_task(task, replace(SETUP, settings=asked), OnlyModel(segmenter.model, segmenter))
    assert tuple(each.file for each in done.result.objects) == worker.OBJECTS
    assert {each.sop_class_uid for each in done.result.objects} < set(SENT_CLASSES)


def test_instances_with_new_content_give_objects_with_uids_of_their_own(task, segmenter):
    first = run(task, segmenter).result
    changed = (replace(task.job.instances[0], replaced=1), *task.job.instances[1:])
    digest = digest_of_set([each.identity for each in changed])
    second = run(replace(task, job=replace(task.job, instances=changed, set_digest=digest)), segmenter).result
    assert second.folder != first.folder
    uids = [{each.sop_instance_uid for each in result.objects} for result in (first, second)]
    assert not uids[0] & uids[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda setup, task: (replace(setup, settings=replace(setup.settings, overlap=0.5)), task),
        lambda setup, task: (replace(setup, settings=replace(setup.settings, secondary_capture=True)), task),
        lambda setup, task: (replace(setup, rules=(Rule("run", name="all"),)), task),
        lambda setup, task: (setup, replace(task, job=replace(task.job, earlier="key/other"))),
    ],
    ids=["overlap", "secondary capture", "rules", "earlier revision"],
)
def test_a_result_of_another_basis_that_was_never_sent_is_no_answer(task, segmenter, change):
    stale = run(task, segmenter).result
    setup, changed = change(SETUP, task)
    fresh = run_task(changed, setup, OnlyModel(segmenter.model, segmenter)).result
    assert fresh.folder != stale.folder
    assert (task.results / fresh.folder / "result.json").is_file()
    assert not (task.results / stale.folder).exists()


def test_another_ctflow_and_another_model_are_another_basis_and_another_device_is_not(task, segmenter, monkeypatch):
    basis = basis_of_result(task, SETUP, SETUP.choices[0], segmenter.model)
    other = replace(SETUP, settings=replace(SETUP.settings, device="cuda:1"))
    assert basis_of_result(task, other, other.choices[0], segmenter.model) == basis
    model = segmenter.model
    for changed in (
        Model(model.spec, model.weights, "another"), Model(replace(model.spec, threshold=0.4), {}, model.weights_digest)
    ):  # fmt: skip
        assert basis_of_result(task, SETUP, SETUP.choices[0], changed) != basis
    monkeypatch.setattr(worker, "__version__", "0.0.9")
    assert basis_of_result(task, SETUP, SETUP.choices[0], segmenter.model) != basis


def test_a_basis_is_the_same_in_another_process(task, segmenter):
    """A digest of something that holds an address, or a set, would make every restart compute again."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        theirs = pool.submit(
            basis_of_result, task, SETUP, SETUP.choices[0], Model(segmenter.model.spec, {}, "w")
        ).result()
    assert theirs == basis_of_result(task, SETUP, SETUP.choices[0], Model(segmenter.model.spec, {}, "w"))


def test_a_file_that_cannot_be_read_sets_the_series_aside(task, segmenter, series, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for path in series.iterdir():
        (inbox / path.name).write_bytes(path.read_bytes())
    next(inbox.iterdir()).write_bytes(b"damaged")
    outcome = run(replace(task, inbox=inbox), segmenter)
    assert outcome.kind == "aside"
    assert outcome.why.reason == "unreadable"
    assert not task.results.exists()


def test_a_gap_sets_the_series_aside_by_name(task, segmenter):
    kept = task.job.instances[:8] + task.job.instances[10:]
    outcome = run(replace(task, job=replace(task.job, instances=kept)), segmenter)
    assert outcome.kind == "aside"
    assert outcome.why.reason == "gap"


@pytest.mark.parametrize(
    ("error", "reason", "kinds"),
    [
        (DeviceOutOfMemory("too little memory"), "out-of-memory", ["again", "again"]),
        (RuntimeError("SECRET^NAME"), "unexpected", ["again", "aside"]),
    ],
)
def test_what_may_pass_is_tried_again_and_a_fault_once_only_and_texts_of_others_are_not_told(
    task, segmenter, monkeypatch, error, reason, kinds, caplog
):
    def fail(*_args):
        raise error

    monkeypatch.setattr(worker, "_compute", fail)
    with caplog.at_level(logging.ERROR):
        outcomes = [run(replace(task, job=replace(task.job, attempts=n)), segmenter) for n in (1, 2)]
    assert [outcome.kind for outcome in outcomes] == kinds
    assert [outcome.why.reason for outcome in outcomes] == [reason, reason]
    assert all("SECRET" not in outcome.why.message for outcome in outcomes)
    assert all(outcome.is_sound is not (kinds[1] == "aside") for outcome in outcomes)


def test_a_series_that_is_refused_leaves_no_answer_that_was_written_on_another_basis(task, segmenter):
    stale = run(task, segmenter).result
    only_others = replace(SETUP, rules=(Rule("ignore", name="all"),))
    assert run_task(task, only_others, OnlyModel(segmenter.model, segmenter)).kind == "aside"
    assert [path for path in task.results.rglob("*") if path.is_file()] == [], stale.folder


def phases_task(tmp_path, **choice) -> tuple[Task, Setup]:
    write_volumes(tmp_path / "in", *({"NominalPercentageOfCardiacPhase": percent} for percent in (40, 75)))
    instances = tuple(
        InstanceRecord(f"1.2.{n}", "1.2", "1.2.1", path.name, 1, "s", 0.0)
        for n, path in enumerate(sorted((tmp_path / "in").iterdir()))
    )
    job = Job("key", "1.2.4", digest_of_set([each.sop_instance_uid for each in instances]), instances, 1, None)
    task = Task(job, tmp_path / "in", tmp_path / "results", tmp_path / "running" / "key", "ROUTER")
    return task, replace(SETUP, settings=replace(SETUP.settings, **choice))


def test_each_volume_of_a_series_has_its_objects_in_the_result(tmp_path):
    task, setup = phases_task(tmp_path)
    model = marking_model()
    done = run_task(task, setup, OnlyModel(model, MarkingSegmenter(model, setup.settings)))
    folder = task.results / done.result.folder
    assert [each.file for each in done.result.objects] == [
        f"phase-{percent}/{name}" for percent in (40, 75) for name in ("segmentation.dcm", "measurements.dcm")
    ]
    assert len({each.sop_instance_uid for each in done.result.objects}) == 4
    document = json.loads((folder / "result.json").read_text())
    assert [each["series"]["volume"]["label"] for each in document["series"]] == ["phase 40 %", "phase 75 %"]
    again = run_task(task, setup, OnlyModel(model, MarkingSegmenter(model, setup.settings)))
    assert replace(again.result, elapsed_s=0) == replace(done.result, elapsed_s=0)


def test_a_single_volume_that_is_asked_for_is_the_whole_result(tmp_path):
    task, setup = phases_task(tmp_path, volume="phase=75")
    model = marking_model()
    done = run_task(task, setup, OnlyModel(model, MarkingSegmenter(model, setup.settings)))
    assert [each.file for each in done.result.objects] == ["segmentation.dcm", "measurements.dcm"]
    document = json.loads((task.results / done.result.folder / "result.json").read_text())
    assert document["series"]["volume"]["name"] == "phase-75"


def test_a_volume_that_cannot_be_read_leaves_no_part_of_a_result(tmp_path):
    task, setup = phases_task(tmp_path)
    path = tmp_path / "in" / "1-00005.dcm"
    dataset = pydicom.dcmread(path)
    dataset.RescaleType = "US"
    dataset.save_as(path)
    model = marking_model()
    outcome = run_task(task, setup, OnlyModel(model, MarkingSegmenter(model, setup.settings)))
    assert (outcome.kind, outcome.why.reason) == ("aside", "not-hu")
    assert not list(task.results.rglob("*.dcm"))


def test_an_enhanced_ct_has_a_result(tmp_path):
    (tmp_path / "in").mkdir()
    write_enhanced(tmp_path / "in" / "e.dcm", frames_of(small_volume()))
    instances = (InstanceRecord("1.2.4.1", "1.2", "1.2.1", "e.dcm", 1, "s", 0.0),)
    job = Job("key", "1.2.4", digest_of_set(["1.2.4.1"]), instances, 1, None)
    task = Task(job, tmp_path / "in", tmp_path / "results", tmp_path / "running" / "key", "ROUTER")
    model = marking_model()
    done = run_task(task, SETUP, OnlyModel(model, MarkingSegmenter(model, SETUP.settings)))
    assert [each.file for each in done.result.objects] == ["segmentation.dcm", "measurements.dcm"]
