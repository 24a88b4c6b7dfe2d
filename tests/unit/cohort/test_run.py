"""A cohort's run: every row ends once, whatever becomes of it, and the next start goes on where this one ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from cohort_support import SETTINGS, run_marking, write_cohort
from ctflow.cohort.destinations import folder
from ctflow.cohort.manifest.rows import CohortRow, ManifestPart, manifest_from_file, write_manifest
from ctflow.cohort.shares import attempt, in_flight
from ctflow.core.errors import BackendUnavailable, SettingsInvalid, StorageFull, StoreFailed, Unexpected
from ctflow.dicom.read.scan import Instance, Scan
from ctflow.dicom.read.select.series import Candidate, Selection, Series
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline.case import Case, Found
from ctflow.pipeline.overlap import processes
from ctflow.pipeline.overlap.finding import CaseFinder, LookResult
from dicom_support import small_volume, spec_of
from marking_support import LUNG, MarkingSegmenter, marking_model

COUNT = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("cohort")
    write_cohort(place, COUNT)
    return place


@pytest.fixture
def manifest(made, tmp_path):
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in" / "manifest.csv"


def marks(output) -> dict[str, dict]:
    """The markers by row; one a row."""
    found = [json.loads(path.read_text()) for path in (output / "rows").iterdir()]
    assert len({each["id"] for each in found}) == len(found)
    return {each["id"]: each for each in found}


def digests(output) -> dict[str, str]:
    return {row: mark["digest"] for row, mark in marks(output).items()}


def assert_nothing_is_left(output):
    assert not [each for each in (output / ".work").iterdir() if each.is_dir()]
    assert not multiprocessing.active_children()
    assert not list(output.rglob(".row-*"))
    assert not list((output / "begun").iterdir())


def assert_marker_repeats_result(mark, result):
    (series,) = result["series"]
    (segment,), (kept,) = series["segments"], mark["segments"]
    assert kept == {
        "folder": series["folder"],
        "label": segment["label"],
        "volume_ml": segment["volume_ml"],
        "findings": segment["components"],
    }
    assert [each["number"] for each in mark["findings"]] == list(range(1, segment["components"] + 1))
    for finding, own in zip(segment["findings"], mark["findings"], strict=True):
        assert {name: own[name] for name in own.keys() & finding.keys()} == {
            name: finding[name] for name in own.keys() & finding.keys()
        }
    assert mark["stage_seconds"] == series["stage_seconds"]


def test_every_row_is_done_once_and_a_second_run_does_nothing(manifest, tmp_path, monkeypatch):
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, report.rows, report.skipped, dict(report.counts)) == (0, COUNT, 0, {"done": COUNT})
    found = marks(tmp_path / "out")
    assert found.keys() == {f"row-{number}" for number in range(COUNT)}
    assert all(each["attempt"] == 1 and each["seconds"] > 0 and len(each["digest"]) == 64 for each in found.values())
    for row, mark in found.items():
        (key,) = mark["folders"]
        assert_marker_repeats_result(mark, json.loads((tmp_path / "out" / "results" / row / "result.json").read_text()))
        assert (tmp_path / "out" / "results" / row / key / "segmentation.dcm").is_file()
        assert json.loads((tmp_path / "out" / "results" / row / "result.json").read_text())["exit_code"] == 0
    assert_nothing_is_left(tmp_path / "out")
    monkeypatch.setattr(processes, "started_process", lambda: pytest.fail("nothing is to be done"))
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, report.skipped, dict(report.counts)) == (0, COUNT, {"done": COUNT})


def test_parts_give_the_results_of_one_run(manifest, tmp_path):
    whole = run_marking(manifest, tmp_path / "1")
    parts = [run_marking(manifest, tmp_path / "2", ManifestPart(number, 2)) for number in (1, 2)]
    assert sum(part.rows for part in parts) == whole.rows
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert {mark["part"] for mark in marks(tmp_path / "2").values()} == {"1/2", "2/2"}


def test_a_part_without_rows_is_done(manifest, tmp_path):
    numbers = [number for number in range(1, 60) if run_part_is_empty(number)]
    report = run_marking(manifest, tmp_path / "out", ManifestPart(numbers[0], 59))
    assert (report.exit_code, report.rows, dict(report.counts)) == (0, 0, {})


def run_part_is_empty(number: int) -> bool:
    return not any(ManifestPart(number, 59).holds(f"row-{row}") for row in range(COUNT))


def test_a_rejected_row_is_told_once_and_costs_one_attempt(manifest, tmp_path):
    damaged = sorted((manifest.parent / "s1").iterdir())[4]
    damaged.unlink()
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"done": COUNT - 1, "rejected": 1})
    mark = marks(tmp_path / "out")["row-1"]
    assert (mark["reason"], mark["attempt"], mark["exit_code"], mark["digest"]) == ("gap", 1, 2, "")
    document = json.loads((tmp_path / "out" / "results" / "row-1" / "result.json").read_text())
    assert document["series"][0]["error"]["reason"] == "gap"
    assert run_marking(manifest, tmp_path / "out", retry_failed=True).skipped == COUNT  # its content has not changed


def test_a_row_without_its_folder_is_tried_three_times(manifest, tmp_path, caplog):
    shutil.rmtree(manifest.parent / "s2")
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"done": COUNT - 1, "failed": 1})
    mark = marks(tmp_path / "out")["row-2"]
    assert (mark["reason"], mark["attempt"], mark["status"]) == ("not-a-folder", 3, "failed")
    assert caplog.text.count("row row-2: attempt") == 2
    assert run_marking(manifest, tmp_path / "out").skipped == COUNT
    write_ct_series(small_volume(seed=2, shape=(8, 32, 32)), manifest.parent / "s2", seed=2)
    report = run_marking(manifest, tmp_path / "out", retry_failed=True)
    assert (report.exit_code, report.skipped) == (0, COUNT - 1)
    assert (tmp_path / "out" / "results" / "row-2").is_dir()


class FailingSegmenter(MarkingSegmenter):
    """Fails on some calls as a bug would."""

    calls = 0
    failing = frozenset({1})

    def segment(self, *arguments, **options):
        type(self).calls += 1
        if type(self).calls in self.failing:
            raise ZeroDivisionError("Muster^Max")
        return super().segment(*arguments, **options)


def test_a_row_that_fails_once_is_done_at_its_second_attempt(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("cohort_support.MarkingSegmenter", FailingSegmenter)
    FailingSegmenter.calls = 0
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (0, {"done": COUNT})
    assert Counter(mark["attempt"] for mark in marks(tmp_path / "out").values()) == {1: COUNT - 1, 2: 1}


class Watching:
    """Keeps what it is told, in order."""

    def __init__(self):
        self.began_with, self.outcomes, self.retries, self.states = [], [], [], []

    def began(self, rows, before):
        self.began_with.append((rows, dict(before)))

    def committed(self, outcome):
        self.outcomes.append(outcome)

    def retried(self, row_id, reason, attempt):
        self.retries.append((row_id, reason, attempt))

    def node(self, state):
        self.states.append(state)


def test_a_watcher_is_told_of_every_row_attempt_and_machine(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("cohort_support.MarkingSegmenter", FailingSegmenter)
    FailingSegmenter.calls, watching = 0, Watching()
    run_marking(manifest, tmp_path / "out", watcher=watching)
    assert watching.began_with == [(COUNT, {})]
    assert [json.loads(json.dumps(outcome.document)) for outcome in watching.outcomes] == sorted(
        marks(tmp_path / "out").values(), key=lambda mark: [o.id for o in watching.outcomes].index(mark["id"])
    )
    ((row_id, reason, attempt),) = watching.retries
    assert (reason, attempt) == ("unexpected", 1)
    assert row_id in digests(tmp_path / "out")
    last = watching.states[-1]
    assert (last.under_way, last.done, last.gpu_busy) == (0, COUNT, None)
    assert last.name == watching.outcomes[0].node
    assert max(state.under_way for state in watching.states) > 1
    again = Watching()
    run_marking(manifest, tmp_path / "out", watcher=again)
    assert (again.began_with, again.outcomes, again.states) == ([(COUNT, {"done": COUNT})], [], [])


def test_a_row_whose_location_is_slow_holds_up_no_other(manifest, tmp_path, monkeypatch):
    others_are_done, original = threading.Event(), attempt.RowAttempt._files_of_series
    waited = []

    class UntilOthersAreDone(Watching):
        def committed(self, outcome):
            super().committed(outcome)
            if len(self.outcomes) == COUNT - 1:
                others_are_done.set()

    def files_of_series(self, base):
        if self.row.id == "row-0":
            waited.append(others_are_done.wait(60))
        return original(self, base)

    monkeypatch.setattr(attempt.RowAttempt, "_files_of_series", files_of_series)
    report = run_marking(manifest, tmp_path / "out", watcher=(watching := UntilOthersAreDone()))
    assert (report.exit_code, waited) == (0, [True])
    assert watching.outcomes[-1].id == "row-0"


def test_a_row_that_always_fails_is_set_aside_without_its_text(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("cohort_support.MarkingSegmenter", FailingSegmenter)
    monkeypatch.setattr(FailingSegmenter, "failing", range(1, 100))
    monkeypatch.setattr(in_flight, "_MOST_IN_SUCCESSION", 2)  # which is of machines that fail, not of rows
    FailingSegmenter.calls = 0
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"failed": COUNT})
    assert FailingSegmenter.calls == 3 * COUNT
    assert {(mark["reason"], mark["attempt"]) for mark in marks(tmp_path / "out").values()} == {("unexpected", 3)}
    assert not any("Muster" in path.read_text() for path in (tmp_path / "out" / "rows").iterdir())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (BackendUnavailable("the GPU has gone", reason="device-failed"), BackendUnavailable),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Unexpected),
    ],
    ids=["named", "of torch"],
)
def test_a_machine_that_fails_ends_the_run_and_sets_no_row_aside(manifest, tmp_path, monkeypatch, error, raised):
    class Gone(MarkingSegmenter):
        def segment(self, *_, **__):
            raise error

    monkeypatch.setattr("cohort_support.MarkingSegmenter", Gone)
    monkeypatch.setattr(in_flight, "_MOST_IN_SUCCESSION", 4)
    with pytest.raises(raised):
        run_marking(manifest, tmp_path / "out")
    assert marks(tmp_path / "out") == {}
    assert_nothing_is_left(tmp_path / "out")


def test_a_full_disk_ends_the_run_and_the_next_start_goes_on(manifest, tmp_path, monkeypatch):
    original, calls = folder.FolderDestination.commit, []

    def commit(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise StorageFull("no space left")
        original(self, *arguments)

    monkeypatch.setattr(folder.FolderDestination, "commit", commit)
    with pytest.raises(StorageFull):
        run_marking(manifest, tmp_path / "out")
    assert len(marks(tmp_path / "out")) == 2
    assert_nothing_is_left(tmp_path / "out")
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, report.skipped) == (0, 2)


@pytest.mark.parametrize("most", [20, 1])
def test_a_result_that_the_destination_refuses_ends_its_row_and_not_the_run(manifest, tmp_path, monkeypatch, most):
    original = folder.FolderDestination.commit

    def commit(self, workspace, outcome, earlier=()):
        if outcome.id == "row-1" and list(workspace.rglob("*.dcm")):
            raise StoreFailed("too large", reason="store-refused")
        original(self, workspace, outcome, earlier)

    write_manifest([CohortRow(f"row-{number}", f"s{number}") for number in range(2)], manifest)
    monkeypatch.setattr(folder.FolderDestination, "commit", commit)
    monkeypatch.setattr(in_flight, "_MOST_IN_SUCCESSION", most)
    if most == 1:
        with pytest.raises(StoreFailed):
            run_marking(manifest, tmp_path / "out")
        assert "row-1" not in marks(tmp_path / "out")
        return
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"done": 1, "failed": 1})
    mark = marks(tmp_path / "out")["row-1"]
    assert (mark["reason"], mark["digest"], mark["folders"], mark["segments"]) == ("store-refused", "", [], [])
    document = json.loads((tmp_path / "out" / "results" / "row-1" / "result.json").read_text())
    assert document["error"]["reason"] == "store-refused"
    assert_nothing_is_left(tmp_path / "out")


def test_an_interrupt_leaves_nothing_half_written_and_the_next_start_goes_on(manifest, tmp_path):
    def interrupt(stage, done, total):
        if stage == "rows" and done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_marking(manifest, tmp_path / "out", progress=interrupt)
    before = marks(tmp_path / "out")
    assert 1 <= len(before) < COUNT
    assert_nothing_is_left(tmp_path / "out")
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, report.skipped) == (0, len(before))
    assert {row: marks(tmp_path / "out")[row] for row in before} == before


def test_a_location_of_several_series_needs_the_column_series(tmp_path):
    for seed in (0, 1):
        write_ct_series(small_volume(seed=seed, shape=(8, 32, 32)), tmp_path / "in" / str(seed), seed=seed)
    uid = dcmread(next((tmp_path / "in" / "1").iterdir())).SeriesInstanceUID
    write_manifest([CohortRow("both", "in"), CohortRow("one", "in", series=uid)], tmp_path / "m.csv")
    report = run_marking(tmp_path / "m.csv", tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"done": 1, "rejected": 1})
    assert marks(tmp_path / "out")["both"]["reason"] == "several-series"
    assert marks(tmp_path / "out")["one"]["folders"][0].startswith(uid)


def test_a_row_whose_files_are_others_than_expected_is_set_aside(manifest, tmp_path):
    write_manifest([CohortRow("a", "s0", digest="0" * 64)], manifest)
    assert run_marking(manifest, tmp_path / "out").exit_code == 6, "every row is accounted for, though none is done"
    mark = marks(tmp_path / "out")["a"]
    assert (mark["status"], mark["reason"], mark["attempt"]) == ("failed", "other-content", 3)


def test_a_row_that_is_changed_is_computed_again_and_its_old_result_goes(manifest, tmp_path):
    write_manifest([CohortRow("a", "s0"), CohortRow("b", "s1")], manifest)
    run_marking(manifest, tmp_path / "out")
    before = digests(tmp_path / "out")
    write_manifest([CohortRow("a", "s3"), CohortRow("b", "s1")], manifest)
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, report.skipped, dict(report.counts)) == (0, 1, {"done": 2})
    after = digests(tmp_path / "out")
    assert (after["a"] != before["a"], after["b"] == before["b"]) == (True, True)
    write_manifest([CohortRow("a", "none"), CohortRow("b", "s1")], manifest)
    assert run_marking(manifest, tmp_path / "out").exit_code == 6
    assert not list((tmp_path / "out" / "results" / "a").rglob("*.dcm"))


def test_a_damaged_file_beside_a_series_makes_its_row_partly_done(manifest, tmp_path):
    (manifest.parent / "s0" / "damaged.dcm").write_bytes(b"\0" * 128 + b"DICM\2\0")
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"done": COUNT - 1, "partly": 1})
    mark = marks(tmp_path / "out")["row-0"]
    assert (mark["reason"], len(mark["folders"])) == ("unreadable-files", 1)


def test_results_of_another_model_or_settings_are_not_mixed(manifest, tmp_path):
    write_manifest([CohortRow("a", "s0")], manifest)
    run_marking(manifest, tmp_path / "out")
    with pytest.raises(SettingsInvalid) as raised:
        run_marking(manifest, tmp_path / "out", model=marking_model(replace(spec_of((LUNG,)), version="9")))
    assert raised.value.reason == "other-model"
    with pytest.raises(SettingsInvalid, match="rtstruct") as raised:
        run_marking(manifest, tmp_path / "out", settings=replace(SETTINGS, rtstruct=True))
    assert raised.value.reason == "conflict"
    assert run_marking(manifest, tmp_path / "out", settings=replace(SETTINGS, cases_in_flight=1)).skipped == 1


def test_a_fault_in_one_row_ends_that_row(manifest, tmp_path, monkeypatch):
    original = attempt.look_for_cases

    def look(folder, *arguments):
        if folder.name == "s1":
            raise ZeroDivisionError
        return original(folder, *arguments)

    monkeypatch.setattr(attempt, "look_for_cases", look)
    report = run_marking(manifest, tmp_path / "out")
    assert dict(report.counts) == {"done": COUNT - 1, "failed": 1}
    assert marks(tmp_path / "out")["row-1"]["reason"] == "unexpected"


def test_rows_whose_processes_are_killed_are_tried_again(manifest, tmp_path, monkeypatch):
    killed = []

    class Killing(MarkingSegmenter):
        def segment(self, *arguments, **options):
            if not killed:
                killed.extend(each.pid for each in multiprocessing.active_children() if each.name == "case")
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            return super().segment(*arguments, **options)

    monkeypatch.setattr("cohort_support.MarkingSegmenter", Killing)
    report = run_marking(manifest, tmp_path / "out")
    assert killed
    assert (report.exit_code, dict(report.counts)) == (0, {"done": COUNT})
    assert 1 <= sum(mark["attempt"] > 1 for mark in marks(tmp_path / "out").values()) <= len(killed)
    assert_nothing_is_left(tmp_path / "out")


def begun(manifest, output, row: str, count: int):
    """As processes that were killed at a row leave it."""
    name = next(each for each in manifest_from_file(manifest).rows if each.id == row)
    (output / "begun").mkdir(parents=True)
    (output / "begun" / f"{row}.{name.fingerprint}").write_bytes(b"." * count)


def test_a_row_at_which_a_process_was_killed_comes_last_and_alone(manifest, tmp_path, monkeypatch):
    begun(manifest, tmp_path / "out", "row-0", 1)
    seen, original = [], attempt.look_for_cases

    def look(folder, *arguments):
        seen.append((folder.name, len(list((tmp_path / "out" / "begun").iterdir())), len(marks(tmp_path / "out"))))
        return original(folder, *arguments)

    monkeypatch.setattr(attempt, "look_for_cases", look)
    assert run_marking(manifest, tmp_path / "out").exit_code == 0
    assert seen[-1] == ("s0", 1, COUNT - 1)
    assert marks(tmp_path / "out")["row-0"]["attempt"] == 2
    assert_nothing_is_left(tmp_path / "out")


def test_a_row_at_which_processes_are_killed_again_and_again_is_set_aside(manifest, tmp_path):
    begun(manifest, tmp_path / "out", "row-0", 3)
    report = run_marking(manifest, tmp_path / "out")
    assert (report.exit_code, dict(report.counts)) == (6, {"done": COUNT - 1, "failed": 1})
    mark = marks(tmp_path / "out")["row-0"]
    assert (mark["reason"], mark["attempt"], mark["exit_code"]) == ("worker-ended", 3, 4)
    assert run_marking(manifest, tmp_path / "out", retry_failed=True).exit_code == 0


def test_a_note_of_a_row_that_is_committed_goes(manifest, tmp_path):
    run_marking(manifest, tmp_path / "out")
    (tmp_path / "out" / "begun").rmdir()
    begun(manifest, tmp_path / "out", "row-0", 1)
    assert run_marking(manifest, tmp_path / "out").skipped == COUNT
    assert_nothing_is_left(tmp_path / "out")


@pytest.fixture
def finders(monkeypatch):
    """Headers are read in processes, as on a machine of many CPUs."""
    monkeypatch.setattr(in_flight, "usable_cpus", lambda: 8)


def test_headers_read_in_other_processes_give_the_same_files(manifest, tmp_path, finders, monkeypatch):
    run_marking(manifest, tmp_path / "apart")
    monkeypatch.undo()
    run_marking(manifest, tmp_path / "here")
    assert digests(tmp_path / "apart") == digests(tmp_path / "here")
    assert_nothing_is_left(tmp_path / "apart")


def test_a_row_is_repeated_whose_headers_process_is_killed(manifest, tmp_path, finders, monkeypatch):
    find, killed = CaseFinder.find, []

    def kill_once(self, look):
        if not killed:
            killed.append(look)
            look = kill_this_process
        return find(self, look)

    monkeypatch.setattr(CaseFinder, "find", kill_once)
    assert run_marking(manifest, tmp_path / "out").counts == {"done": COUNT}
    assert sorted(mark["attempt"] for mark in marks(tmp_path / "out").values()) == [1] * (COUNT - 1) + [2]


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rejected_series_keeps_its_reason_when_headers_are_read_elsewhere(manifest, tmp_path, finders):
    for path in sorted((manifest.parent / "s0").iterdir()):
        image = dcmread(path)
        image.Modality = "MR"
        image.save_as(path)
    run_marking(manifest, tmp_path / "out")
    found = marks(tmp_path / "out")
    assert (found["row-0"]["status"], found["row-0"]["reason"]) == ("rejected", "none-eligible")
    assert Counter(mark["status"] for mark in found.values()) == {"rejected": 1, "done": COUNT - 1}
    document = json.loads((tmp_path / "out" / "results" / "row-0" / "result.json").read_text())
    assert [each["reason"] for each in document["set_aside"]] == ["modality"]


def test_headers_nested_too_deeply_for_pickle_are_read_in_this_process(caplog):
    with CaseFinder() as finder:
        found, error = finder.find(found_with_deep_headers)
    assert error is None
    assert found.cases[0].packed is None
    assert "do not leave their process" in caplog.text


def found_with_deep_headers() -> LookResult:
    header = Dataset()
    for _ in range(2000):
        outer = Dataset()
        outer.ReferencedSeriesSequence = [header]
        header = outer
    instance = Instance(Path("/x"), "x", header, "1.2.840.10008.1.2.1", has_pixels=True)
    candidate = Candidate(Series("1.2", "digest", "1.3", (instance,)), True, "selected", "eligible", False, {})
    return Found((Case(candidate, "key"),), Scan(Path("/x"), (), (), 0), Selection((candidate,))), None
