"""What every destination of a cohort promises: a result whole or not at all, its marker last, and no row lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest

from ctflow.cohort.destinations import folder as folder_module
from ctflow.cohort.destinations import stow
from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.destinations.from_text import destination_from_text, text_of_destination
from ctflow.cohort.destinations.objects import ObjectDestination
from ctflow.cohort.marker import outcome_of_mark
from ctflow.cohort.outcome import MarkName, RowOutcome
from ctflow.cohort.stores.patience import StoreFault
from ctflow.core.errors import NotWritten, OutputError, SettingsInvalid
from object_store_support import BUCKET, ENVIRONMENT, object_store

FINGERPRINT, OTHER = "0123456789ab", "ffffffffffff"
OUTCOME = RowOutcome("a.b-1", FINGERPRINT, "done", "done", "", 0, 1, 1.5, digest="ab")
NAME = (OUTCOME.id, FINGERPRINT)


@dataclass
class Kind:
    """A kind of destination.

    Attributes:
        open: A destination, not entered, for a share.
        files: What is there, by name.
        without_marker: While it lasts, no marker can be written.
        without_results: While it lasts, no result can be written.
    """

    open: Callable[[str], RowDestination]
    files: Callable[[], dict[str, bytes]]
    without_marker: Callable[[], AbstractContextManager[None]]
    without_results: Callable[[], AbstractContextManager[None]]


def folder_kind(tmp_path: Path) -> Kind:
    root = tmp_path / "out"

    def files() -> dict[str, bytes]:
        found = [path for path in root.rglob("*") if path.is_file() and ".work" not in path.parts]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}

    @contextmanager
    def without(name: str):
        def refuse(*_):
            raise NotWritten("no", reason="unwritable")

        with mock.patch.object(folder_module, name, refuse):
            yield

    return Kind(
        lambda share: destination_from_text(str(root), share), files,
        lambda: without("write_result"), lambda: without("publish_folder"),
    )  # fmt: skip


def object_kind(tmp_path: Path, store) -> Kind:
    store.empty()
    prefix = "some/prefix"

    @contextmanager
    def without(part: str):
        def fault(method: str, path: str) -> int | None:
            return 503 if method in ("PUT", "POST") and f"{prefix}/{part}/" in path else None

        store.fault = fault
        yield
        store.fault = lambda _method, _path: None

    return Kind(
        lambda share: ObjectDestination(f"s3://{BUCKET}/{prefix}/", share, patience_s=0.5),
        lambda: {key.removeprefix(f"{prefix}/"): store.content(key) for key in store.keys(prefix)},
        lambda: without("rows"), lambda: without("results"),
    )  # fmt: skip


class RecordingServer:
    """Stands for a DICOMweb server, which tests/e2e/test_cohort_dicomweb.py has: keeps what it is given."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.is_down = False

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def store(self, files) -> None:
        if self.is_down:
            raise StoreFault("no-answer", "down")
        for path in files:
            place = path.as_posix().partition(".work/")[2].split("/", 2)[2]
            self.kept[f"results/{place.replace('~/', '/', 1)}"] = path.read_bytes()


def stow_kind(tmp_path: Path, monkeypatch) -> Kind:
    server, journal = RecordingServer(), folder_kind(tmp_path)
    monkeypatch.setattr(stow, "DicomWeb", lambda _url, _patience: server)

    @contextmanager
    def without_results():
        server.is_down = True
        yield
        server.is_down = False

    text = text_of_destination("dicomweb+http://127.0.0.1/dicom-web", str(tmp_path / "out"))
    return Kind(
        lambda share: destination_from_text(text, share), lambda: {**journal.files(), **server.kept},
        journal.without_marker, without_results,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store():
    with object_store() as running:
        yield running


@pytest.fixture(params=["folder", "objects", "stow"])
def kind(request, tmp_path, monkeypatch, store) -> Kind:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": store.url}.items():
        monkeypatch.setenv(name, value)
    if request.param == "stow":
        return stow_kind(tmp_path, monkeypatch)
    return folder_kind(tmp_path) if request.param == "folder" else object_kind(tmp_path, store)


@pytest.fixture
def destination(kind):
    with kind.open("whole") as entered:
        yield entered


def workspace_with(destination: RowDestination, text: str, row_id: str = OUTCOME.id) -> Path:
    folder = destination.workspace(row_id)
    assert not list(folder.iterdir())
    (folder / "series").mkdir()
    (folder / "series" / "segmentation.dcm").write_text(text)
    (folder / "result.json").write_text("{}")
    return folder


def result_of(kind: Kind, row_id: str = OUTCOME.id) -> dict[str, bytes]:
    start = f"results/{row_id}/"
    return {name.removeprefix(start): content for name, content in kind.files().items() if name.startswith(start)}


def test_a_committed_row_has_its_result_and_a_marker_that_is_listed(kind, destination):
    folder = workspace_with(destination, "x")
    destination.commit(folder, OUTCOME)
    assert not folder.exists()
    assert list(destination.marks()) == [OUTCOME.name]
    assert result_of(kind) == {"series/segmentation.dcm": b"x", "result.json": b"{}"}
    mark = json.loads(kind.files()[f"rows/{OUTCOME.name}"])
    assert (mark["id"], mark["status"], mark["attempt"], mark["seconds"]) == ("a.b-1", "done", 1, 1.5)
    with kind.open("another") as later:
        assert list(later.marks()) == [OUTCOME.name]
        assert outcome_of_mark(later, OUTCOME.name) == OUTCOME


def test_a_destination_is_read_without_entering_it(kind, destination, tmp_path):
    destination.agree({"model": "a"})
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    reading = kind.open("report")
    assert list(reading.marks()) == [OUTCOME.name]
    assert json.loads(reading.read("cohort.json")) == {"model": "a"}
    assert reading.read("results/a.b-1/result.json") == b"{}"
    assert reading.read("results/none/preview.png") is None
    (tmp_path / "page").write_text("page")
    reading.keep(tmp_path / "page", "cohort.html")
    assert reading.read("cohort.html") == kind.files()["cohort.html"] == b"page"


def test_an_empty_destination_has_no_markers_and_nothing_begun(destination):
    assert list(destination.marks()) == []
    assert destination.begun() == {}


def test_a_row_that_is_computed_twice_has_one_result_and_one_marker(kind, destination):
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    before = kind.files()
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    assert kind.files() == before


@pytest.mark.parametrize("is_named", [False, True])
def test_a_worse_outcome_does_not_replace_a_better_result(kind, destination, is_named):
    partly, failed = replace(OUTCOME, status="partly"), replace(OUTCOME, status="failed", exit_code=4)
    destination.commit(workspace_with(destination, "x"), partly)
    before = kind.files()
    folder = workspace_with(destination, "y")
    destination.commit(folder, failed, list(destination.marks()) if is_named else ())
    assert kind.files()["results/a.b-1/result.json"] == before["results/a.b-1/result.json"]
    assert list(destination.marks()) == [partly.name]
    assert not folder.exists()
    destination.commit(workspace_with(destination, "z"), OUTCOME, list(destination.marks()))
    assert list(destination.marks()) == [OUTCOME.name]
    assert result_of(kind)["series/segmentation.dcm"] == b"z"


def test_no_id_meets_what_another_row_is_renamed_to(kind, destination):
    beside = workspace_with(destination, "beside", "a.b-1.old")
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    again = replace(OUTCOME, fingerprint=OTHER)
    destination.commit(workspace_with(destination, "y"), again, list(destination.marks()))
    destination.commit(beside, replace(OUTCOME, id="a.b-1.old"))
    assert result_of(kind, "a.b-1.old")["series/segmentation.dcm"] == b"beside"


def test_another_result_replaces_the_first_with_all_its_files(kind, destination):
    folder = workspace_with(destination, "x")
    (folder / "series" / "extra.json").write_text("of the first")
    destination.commit(folder, OUTCOME)
    failed = replace(OUTCOME, fingerprint=OTHER, status="failed", exit_code=4)
    destination.commit(workspace_with(destination, "y"), failed, list(destination.marks()))
    assert list(destination.marks()) == [failed.name]
    assert outcome_of_mark(destination, failed.name) == failed
    assert result_of(kind) == {"series/segmentation.dcm": b"y", "result.json": b"{}"}


def test_a_process_that_ends_between_the_result_and_its_marker_leaves_the_row_open(kind):
    with kind.open("whole") as destination:
        folder = workspace_with(destination, "x")
        with kind.without_marker(), pytest.raises(OutputError):
            destination.commit(folder, OUTCOME)
    with kind.open("whole") as destination:
        assert list(destination.marks()) == []
        destination.commit(workspace_with(destination, "x"), OUTCOME)
        assert list(destination.marks()) == [OUTCOME.name]
    assert result_of(kind) == {"series/segmentation.dcm": b"x", "result.json": b"{}"}


def test_without_its_result_a_row_gets_no_marker_and_an_earlier_one_speaks_of_what_is_there(kind, destination):
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    before = result_of(kind)
    folder = workspace_with(destination, "y")
    with kind.without_results(), pytest.raises(OutputError):
        destination.commit(folder, replace(OUTCOME, fingerprint=OTHER), list(destination.marks()))
    assert list(destination.marks()) in ([], [OUTCOME.name])
    assert not list(destination.marks()) or result_of(kind) == before


def test_of_several_processes_one_says_what_results_have_in_common(kind):
    answers = []
    with ExitStack() as stack:
        entered = [stack.enter_context(kind.open(f"share-{number}")) for number in range(6)]
        threads = [
            threading.Thread(target=lambda each=each, n=n: answers.append(each.agree({"model": n})))
            for n, each in enumerate(entered)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == len(entered)
    assert all(answer == answers[0] for answer in answers)
    with kind.open("later") as later:
        assert later.agree({"model": "later"}) == answers[0]


def test_a_damaged_description_is_named(kind, destination):
    destination.agree({"model": "a"})
    with mock.patch("json.loads", side_effect=ValueError), pytest.raises(NotWritten, match=r"cohort\.json"):
        destination.agree({})


def test_notes_count_the_attempts_that_have_not_ended(kind):
    with kind.open("whole") as destination:
        assert destination.begun() == {}
        destination.begin(NAME)
        destination.begin(("other", OTHER))
        destination.end(("other", OTHER))
    with kind.open("whole") as destination:  # the process was killed, and is at it again
        assert destination.begun() == {NAME: 1}
        destination.begin(NAME)
    with kind.open("whole") as destination:
        assert destination.begun() == {NAME: 2}
        destination.end(NAME)
        assert destination.begun() == {}


def test_whoever_ends_an_attempt_removes_the_notes_of_all_earlier_ones(kind):
    longer = (f"{NAME[0]}.{FINGERPRINT}", FINGERPRINT)  # another row, whose note begins as this one's
    with kind.open("worker-1") as killed, kind.open("worker-2") as second, kind.open("end") as driver:
        for begun in (killed, killed, second):
            begun.begin(NAME)
        second.begin(longer)
        assert driver.begun() == {NAME: 3, longer: 1}
        second.end(NAME)
        assert driver.begun() == {longer: 1}
        driver.end(longer)
        assert driver.begun() == {}
    assert not [name for name in kind.files() if name.startswith("begun/")]


def test_one_process_computes_a_share(kind):
    with kind.open("part-1-of-2"):
        with pytest.raises(SettingsInvalid, match="part-1-of-2") as raised, kind.open("part-1-of-2"):
            pytest.fail("two compute it")
        assert raised.value.reason == "folder-in-use"
        with kind.open("part-2-of-2"):
            pass
    with kind.open("part-1-of-2"):
        pass


def test_nothing_of_the_work_is_left(kind, tmp_path):
    with kind.open("whole") as destination:
        folder = workspace_with(destination, "x")
        destination.discard(folder)
        assert not folder.exists()
        workspace_with(destination, "x", "never-committed")
    assert not list(tmp_path.rglob("segmentation.dcm"))


def test_files_of_others_are_no_markers(kind, destination, tmp_path):
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    for name in ("notes.txt", ".half.json", "a.json"):
        assert MarkName.from_text(name) is None
    assert [mark.id for mark in destination.marks()] == [OUTCOME.id]
