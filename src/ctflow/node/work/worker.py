"""One worker: a separate process that opens the engine once and runs one series after another.

The node's own process imports no torch: it stays small, and a driver crash loses no acknowledged instance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pydicom
from pydicom.dataset import Dataset

from ctflow import __version__
from ctflow.compat.monai import import_lean
from ctflow.core.entry_point import show_tracebacks, unexpected
from ctflow.core.errors import CtflowError, InputError, ModelError, Unexpected
from ctflow.core.processes import begin_child, log_to_parent
from ctflow.node.journal.records import Job, ObjectRecord, Why, WorkerResult
from ctflow.node.rules import Rule, Verdict
from ctflow.report.result import run_result, write_result
from ctflow.settings.run import Settings

if TYPE_CHECKING:
    from ctflow.core.model import Model
    from ctflow.dicom.read.select.series import VolumePart
    from ctflow.pipeline.case import Case
    from ctflow.pipeline.segmenter import Segmenter

MOST_FAULTS = 2  # attempts that end in an unexpected error
# In sending order.
OBJECTS = ("segmentation.dcm", "measurements.dcm", "structures.dcm", "secondary_capture.dcm", "report.dcm")
_NICENESS = 5  # on a CPU it takes all cores, and an incoming instance must not wait for a window

log = logging.getLogger(__name__)
_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True)
class Setup:
    """Everything that a worker opens at its start."""

    bundle: Path | None
    settings: Settings
    rules: tuple[Rule, ...] = ()
    log_level: int = logging.INFO


@dataclass(frozen=True)
class Ready:
    """A worker's first message: what it opened.

    Attributes:
        model: Its name.
        version: Its version.
        demonstration: Whether it is a demonstration model.
        gpus: How many there are, even if only one is used.
        tasks: How many tasks the worker takes at a time.
    """

    model: str
    version: str
    demonstration: bool
    gpus: int
    tasks: int = 1


@dataclass(frozen=True)
class NotReady:
    """A worker's first message if it could not open: the reason."""

    error: CtflowError


@dataclass(frozen=True)
class Task:
    """One series to run.

    Attributes:
        job: From the journal.
        inbox: Folder of its files.
        results: Gets the result, under `<key>/<set digest>-<basis digest>` (see `basis_of_result`).
        scratch: A folder for links to the files; made and removed.
        calling_ae: AE title of the sender.
    """

    job: Job
    inbox: Path
    results: Path
    scratch: Path
    calling_ae: str


_DONE = Why("done", "")


@dataclass(frozen=True)
class TaskOutcome:
    """A task's outcome: done, set aside (a retry changes nothing), or to be retried.

    After an unexpected error a worker is no longer sound (its process may have lost the GPU) and is replaced.
    """

    kind: Literal["done", "aside", "again"]
    why: Why = _DONE
    result: WorkerResult | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    is_sound: bool = True


@dataclass(frozen=True)
class Answer:
    """The outcome of the task with this job's key."""

    key: str
    outcome: TaskOutcome


def run_worker(connection: Connection, setup: Setup) -> None:
    """The process: send `Ready` or `NotReady`, then an `Answer` to each `Task`, until the pipe closes."""
    begin_child()
    import_lean()
    os.nice(_NICENESS)
    log_to_parent(connection, setup.log_level)
    send = _send_beside_the_log(connection)
    show_tracebacks()
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            model, segmenter = _open(setup)
        except CtflowError as error:
            send(NotReady(error))
            return
        import torch  # noqa: PLC0415  # it is loaded by now

        from ctflow.node.work.overlapping import OverlappingTasks, tasks_at_a_time  # noqa: PLC0415

        gpus = torch.cuda.device_count()
        count = tasks_at_a_time(setup.settings, workers=gpus if setup.settings.device != "cpu" else 1)
        send(Ready(model.spec.name, model.spec.version, model.spec.demonstration, gpus, count))
        with segmenter:
            if count > 1:
                OverlappingTasks(connection, send, setup, model, segmenter, count).run()
                return
            while True:
                task = connection.recv()
                send(Answer(task.job.key, run_task(task, setup, model, segmenter)))


def _send_beside_the_log(connection: Connection) -> Callable[[object], None]:
    """Sends from any thread, and never while another one sends, or logs: both words would be garbled."""
    (handler,) = logging.getLogger().handlers  # of `log_to_parent`

    def send(word: object) -> None:
        handler.acquire()  # it has it while it sends
        try:
            connection.send(word)
        finally:
            handler.release()

    return send


def _open(setup: Setup) -> tuple[Model, Segmenter]:
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415  # torch: seconds
    from ctflow.pipeline.run import announce  # noqa: PLC0415
    from ctflow.pipeline.segmenter import Segmenter  # noqa: PLC0415

    bundle, settings = find_bundle(setup.bundle) if setup.bundle else demonstration_bundle(), setup.settings
    model = read_bundle(bundle, settings.config, allow_code=settings.allow_code)
    announce(model)
    segmenter = Segmenter(model, setup.settings)
    segmenter.open()
    return model, segmenter


def run_task(task: Task, setup: Setup, model: Model, segmenter: Segmenter) -> TaskOutcome:
    """Run one series: decide, segment, write; an error becomes an outcome."""
    started = time.monotonic()
    folder = folder_of_result(task, setup, model)

    def run() -> TaskOutcome:
        if is_answered(task, folder):
            return answered(folder, model, started)
        return _compute(task, setup, model, segmenter, folder) or answered(folder, model, started)

    return outcome_of(task, run)


def folder_of_result(task: Task, setup: Setup, model: Model) -> Path:
    """The result's folder, named by everything that decides it."""
    return task.results / task.job.key / f"{task.job.set_digest}-{basis_of_result(task, setup, model)}"


def is_answered(task: Task, folder: Path) -> bool:
    """Whether the node ended between writing and updating the journal: the same answer, not a second one."""
    if (folder / "result.json").is_file():
        return True
    _remove_other_answers(folder, task.job.set_digest)
    return False


def answered(folder: Path, model: Model, started: float) -> TaskOutcome:
    """The outcome of a task whose result is there; it was begun at this `time.monotonic`."""
    document = json.loads((folder / "result.json").read_bytes())
    volumes = document["series"] if "set_aside" in document else [document]  # of a series that holds several volumes
    answer = _answer(folder, volumes, model, time.monotonic() - started)
    stages = dict.fromkeys(stage for each in volumes for stage in each["stage_seconds"])
    seconds = {stage: sum(each["stage_seconds"].get(stage, 0.0) for each in volumes) for stage in stages}
    return TaskOutcome("done", result=answer, stage_seconds=seconds)


def outcome_of(task: Task, run: Callable[[], _Outcome]) -> _Outcome | TaskOutcome:
    """What `run` returns; an error becomes an outcome."""
    try:
        return run()
    except Unexpected as error:
        return _fault(error, task)
    except (InputError, ModelError) as error:
        return TaskOutcome("aside", Why(error.reason, error.described))
    except CtflowError as error:
        return TaskOutcome("again", Why(error.reason, error.described))
    except Exception as error:  # noqa: BLE001  # the worker has other series to run
        fault = unexpected(error, f"series {task.job.digest}")
        log.error("%s", fault)  # noqa: TRY400  # `unexpected` logs the traceback
        return _fault(fault, task)


def _fault(error: Unexpected, task: Task) -> TaskOutcome:
    """Retry the series once in a new process, then set it aside: a driver may fail by chance, a header never."""
    kind: Literal["aside", "again"] = "again" if task.job.attempts < MOST_FAULTS else "aside"
    return TaskOutcome(kind, Why(error.reason, error.described), is_sound=False)


def basis_of_result(task: Task, setup: Setup, model: Model) -> str:
    """Digest of everything that decides a result besides its instances: 16 hexadecimal digits.

    After a change of the settings, the rules, the model or ctflow, an earlier result that was never sent is outdated.
    The device is not part of it: after a crash, another worker may take the series.
    """
    settings = replace(setup.settings, device=None, cache=None, cases_in_flight=None)
    parts = [__version__, model.weights_digest, model.spec, settings, setup.rules, task.calling_ae, task.job.earlier]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _remove_other_answers(folder: Path, set_digest: str) -> None:
    """Remove results for the same instances on another basis, which the journal never recorded."""
    for each in folder.parent.glob(f"{set_digest}*"):
        shutil.rmtree(each)


def _compute(task: Task, setup: Setup, model: Model, segmenter: Segmenter, result: Path) -> TaskOutcome | None:
    """Write the result's folder; return an outcome if there is none to write."""
    from ctflow.pipeline.run import run_case  # noqa: PLC0415  # it is loaded by now

    with _links(task) as folder:
        cases = cases_of_task(task, folder, setup, model, result)
        if isinstance(cases, TaskOutcome):
            return cases
        done = [run_case(case, segmenter, setup.settings, place_of_cases(cases, result)) for case in cases]
    complete(done, result)
    return None


def place_of_cases(cases: Sequence[Case], result: Path) -> Path:
    """The folder that gets the folders of a task's cases."""
    return result.parent if len(cases) == 1 else result


def complete(cases: Sequence[Case], result: Path) -> None:
    """Complete the result of a task's cases; of several volumes, its result.json lists them.

    Raises:
        CtflowError: Of a case: a series has all its results or none.
    """
    errors = [case.error for case in cases if case.error is not None]
    if errors and len(cases) > 1:
        shutil.rmtree(result, ignore_errors=True)
    if errors:
        raise errors[0]
    if len(cases) > 1:
        documents = [json.loads((result / case.key / "result.json").read_bytes()) for case in cases]
        notice = documents[0]["research_only"]
        write_result(
            run_result(status="done", exit_code=0, series=documents, research_only=notice), result / "result.json"
        )


@contextlib.contextmanager
def _links(task: Task) -> Iterator[Path]:
    try:
        yield link_files(task)
    finally:
        shutil.rmtree(task.scratch, ignore_errors=True)


def link_files(task: Task) -> Path:
    """Make a folder with exactly the set of instances: the series' own may hold more by now."""
    shutil.rmtree(task.scratch, ignore_errors=True)
    task.scratch.mkdir(parents=True)
    for number, instance in enumerate(task.job.instances):
        (task.scratch / f"{number:05d}.dcm").symlink_to(task.inbox / instance.file)
    return task.scratch


def cases_of_task(task: Task, folder: Path, setup: Setup, model: Model, result: Path) -> tuple[Case, ...] | TaskOutcome:
    """The cases of a folder of links, one for each volume of its series; an outcome if none runs.

    A single case is named as the result's folder; several are named by volume.
    """
    verdicts = _verdicts(task, folder, setup, model)
    if isinstance(verdicts, TaskOutcome):
        return verdicts
    running = [verdict for verdict in verdicts if verdict.run]
    cases = []
    for verdict in running:
        part = verdict.candidate.series.part
        name = part.name if part and len(running) > 1 else ""
        cases.append(_case(task, verdict, setup, result.name, name))
    others = [each for each in verdicts if not each.run and each.reason != "not-asked-for"]
    aside = tuple(f"{part.label} is set aside: {each.message}" for each in others if (part := _part(each)))
    return (replace(cases[0], warnings=(*cases[0].warnings, *aside)), *cases[1:])


def _part(verdict: Verdict) -> VolumePart | None:
    return verdict.candidate.series.part


def _verdicts(task: Task, folder: Path, setup: Setup, model: Model) -> tuple[Verdict, ...] | TaskOutcome:
    """The verdicts on the series' volumes, of which at least one runs."""
    from ctflow.dicom.read.scan import scan_folder  # noqa: PLC0415
    from ctflow.node.rules import verdicts_of_scan  # noqa: PLC0415

    scan = scan_folder(folder)
    if scan.unreadable or scan.ignored:
        flaw = scan.unreadable[0].message if scan.unreadable else "not DICOM"
        text = f"{len(scan.unreadable) + scan.ignored} instances cannot be read ({flaw})"
        return TaskOutcome("aside", Why("unreadable", text))
    verdicts = verdicts_of_scan(
        scan,
        setup.rules,
        calling_ae=task.calling_ae,
        body_parts=model.spec.body_parts,
        volume=setup.settings.volume,
    )
    series = {(each.candidate.series.study_uid, each.candidate.series.uid) for each in verdicts}
    if len(series) != 1:  # one SeriesInstanceUID and study give one, unless readers differ on what a UID is
        return TaskOutcome("aside", Why("mixed-series", f"its instances belong to {len(series)} series"))
    if any(verdict.run for verdict in verdicts):
        return verdicts
    return TaskOutcome("aside", Why(verdicts[0].reason, verdicts[0].message))


def _case(task: Task, verdict: Verdict, setup: Setup, name: str, volume: str) -> Case:
    """A volume's case; `volume` names it among several, and is empty for the only one."""
    from ctflow.pipeline.case import case_from_candidate  # noqa: PLC0415

    case = case_from_candidate(verdict.candidate, volume or name, setup.settings)
    if any(each.replaced for each in task.job.instances):
        case = replace(case, replaced=task.job.set_digest)
    if task.job.earlier is None:
        return case
    report = task.results / task.job.earlier / volume / "measurements.dcm"
    return replace(case, previous=(pydicom.dcmread(report),)) if report.is_file() else case


def _answer(folder: Path, volumes: Sequence[Mapping[str, Any]], model: Model, elapsed_s: float) -> WorkerResult:
    places = [""] if len(volumes) == 1 else [f"{each['folder']}/" for each in volumes]
    objects = []
    for name in (f"{place}{name}" for place in places for name in OBJECTS):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            header: Dataset = pydicom.dcmread(folder / name, specific_tags=["SOPClassUID", "SOPInstanceUID"])
            digest = hashlib.sha256(content).hexdigest()
            objects.append(ObjectRecord(name, str(header.SOPClassUID), str(header.SOPInstanceUID), digest))
    document = volumes[0]
    return WorkerResult(
        folder=f"{folder.parent.name}/{folder.name}",
        model=str(document["model"]["name"]),
        version=str(document["model"]["version"]),
        weights=model.weights_digest,
        demonstration=model.spec.demonstration,
        elapsed_s=elapsed_s,
        objects=tuple(objects),
    )
