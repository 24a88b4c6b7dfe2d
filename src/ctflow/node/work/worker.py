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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pydicom
from pydicom.dataset import Dataset

from ctflow import __version__
from ctflow.compat.monai import import_lean
from ctflow.core.entry_point import show_tracebacks, unexpected
from ctflow.core.errors import CtflowError, DeviceOutOfMemory, InputError, ModelError, Unexpected
from ctflow.core.processes import begin_child, log_to_parent
from ctflow.node.journal.records import ObjectRecord, Why, WorkerResult
from ctflow.node.rules import Verdict
from ctflow.node.work.deciding import decided, settings_of, verdicts_on
from ctflow.node.work.messages import Answer, HeldModels, ModelChoice, NotReady, Ready, Setup, Task, TaskOutcome
from ctflow.node.work.models import OpenModels
from ctflow.report.result import run_result, write_result
from ctflow.settings.run import Settings

if TYPE_CHECKING:
    from ctflow.core.model import Model
    from ctflow.dicom.read.select.series import VolumePart
    from ctflow.pipeline.case import Case

MOST_FAULTS = 2  # attempts that end in an unexpected error
# In sending order.
OBJECTS = ("segmentation.dcm", "measurements.dcm", "structures.dcm", "secondary_capture.dcm", "report.dcm")
_NICENESS = 5  # on a CPU it takes all cores, and an incoming instance must not wait for a window

log = logging.getLogger(__name__)
_Outcome = TypeVar("_Outcome")


def run_worker(connection: Connection, setup: Setup) -> None:
    """The process: send `Ready` or `NotReady`, then an `Answer` to each `Task`, until the pipe closes."""
    begin_child()
    import_lean()
    os.nice(_NICENESS)
    log_to_parent(connection, setup.log_level)
    send = _send_beside_the_log(connection)
    show_tracebacks()
    with contextlib.suppress(EOFError, BrokenPipeError):
        models = OpenModels(setup)
        with models:
            try:
                opened = models.open_first()
            except CtflowError as error:
                send(NotReady(error))
                return
            import torch  # noqa: PLC0415  # it is loaded by now

            from ctflow.node.work.overlapping import OverlappingTasks, tasks_at_a_time  # noqa: PLC0415

            gpus = torch.cuda.device_count()
            count = tasks_at_a_time(setup.settings, workers=gpus if setup.settings.device != "cpu" else 1)
            told = _AnswersWithNews(send, models, is_wanted=bool(setup.models))
            send(told.ready(opened, gpus, count))
            if count > 1:
                OverlappingTasks(connection, told.send, setup, models, count).run()
                return
            while True:
                task = connection.recv()
                told.send(Answer(task.job.key, run_task(task, setup, models)))


class _AnswersWithNews:
    """Tells which models are open before an answer, if they are others than before."""

    def __init__(self, send: Callable[[object], None], models: OpenModels, *, is_wanted: bool) -> None:
        self._send, self._models, self._is_wanted = send, models, is_wanted
        self._told: HeldModels | None = None

    def ready(self, opened: Model, gpus: int, count: int) -> Ready:
        """The worker's first message."""
        held, spec = self._models.held, opened.spec
        if not self._is_wanted:
            return Ready(spec.name, spec.version, spec.demonstration, gpus, count)
        self._told = held
        demonstrations = self._models.demonstrations
        return Ready(
            spec.name, spec.version, bool(demonstrations), gpus, count, held.models, held.failed, demonstrations
        )

    def send(self, answer: object) -> None:
        """Send an answer."""
        held = self._models.held
        if self._is_wanted and held != self._told:
            self._told = held
            self._send(held)
        self._send(answer)


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


@dataclass(frozen=True)
class CaseWork:
    """A case of a task, with what computes it."""

    case: Case
    choice: ModelChoice
    settings: Settings


def run_task(task: Task, setup: Setup, models: OpenModels) -> TaskOutcome:
    """Run one series: decide, segment, write; an error becomes an outcome."""
    started = time.monotonic()

    def run() -> TaskOutcome:
        choice = model_of_task(task, setup, models)
        if isinstance(choice, TaskOutcome):
            return choice
        model = models.facts(choice, choice.settings)
        folder = folder_of_result(task, setup, choice, model)
        if is_answered(task, folder):
            return answered(task, folder, model, started)
        return _compute(task, setup, choice, models, folder) or answered(task, folder, model, started)

    return outcome_of(task, run)


def model_of_task(task: Task, setup: Setup, models: OpenModels) -> ModelChoice | TaskOutcome:
    """The model of a task; the outcome if it is only decided now, or is not in the settings any more."""
    if setup.decides and not task.job.is_decided:
        with _links(task) as folder:
            return decided(task, folder, setup, models.body_parts)
    choice = setup.choice(task.job.model)
    if choice is None:
        message = f"the settings have no model {task.job.model or 'without a name'}: retry it when they have"
        return TaskOutcome("aside", Why("unknown-model", message))
    return choice


def folder_of_result(task: Task, setup: Setup, choice: ModelChoice, model: Model) -> Path:
    """The result's folder, named by everything that decides it."""
    prefix = f"{choice.name}-" if choice.name else ""
    return task.results / task.job.key / f"{prefix}{task.job.set_digest}-{basis_of_result(task, setup, choice, model)}"


def is_answered(task: Task, folder: Path) -> bool:
    """Whether the node ended between writing and updating the journal: the same answer, not a second one."""
    if (folder / "result.json").is_file():
        return True
    _remove_other_answers(folder)
    return False


def answered(task: Task, folder: Path, model: Model, started: float) -> TaskOutcome:
    """The outcome of a task whose result is there; it was begun at this `time.monotonic`."""
    document = json.loads((folder / "result.json").read_bytes())
    volumes = document["series"] if "set_aside" in document else [document]  # of a series that holds several volumes
    answer = replace(_answer(folder, volumes, model, time.monotonic() - started), run_model=task.job.model)
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


def basis_of_result(task: Task, setup: Setup, choice: ModelChoice, model: Model) -> str:
    """Digest of everything that decides a result besides its instances: 16 hexadecimal digits.

    After a change of the settings, the rules, the model or ctflow, an earlier result that was never sent is outdated.
    The device is not part of it: after a crash, another worker may take the series.
    """
    settings = replace(choice.settings, device=None, cache=None, cases_in_flight=None)
    parts = [__version__, model.weights_digest, model.spec, settings, setup.rules, task.calling_ae, task.job.earlier]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _remove_other_answers(folder: Path) -> None:
    """Remove this model's results for the same instances on another basis, which the journal never recorded."""
    for each in folder.parent.glob(f"{folder.name.rpartition('-')[0]}*"):
        shutil.rmtree(each)


def _compute(task: Task, setup: Setup, choice: ModelChoice, models: OpenModels, result: Path) -> TaskOutcome | None:
    """Write the result's folder; return an outcome if there is none to write."""
    from ctflow.pipeline.run import run_case  # noqa: PLC0415  # it is loaded by now

    with _links(task) as folder:
        works = works_of_task(task, folder, setup, choice, models, result)
        if isinstance(works, TaskOutcome):
            return works
        done = []
        for work in works:
            segmenter = models.segmenter(choice, work.settings)
            done.append(run_case(work.case, segmenter, work.settings, place_of_cases(works, result)))
            give_memory_back(done[-1], choice, models)
    complete(done, result)
    return None


def give_memory_back(case: Case, choice: ModelChoice, models: OpenModels) -> None:
    """Close the other models if this one had too little memory for a case: it is tried again."""
    if isinstance(case.error, DeviceOutOfMemory) and models.close_others(choice):
        log.warning("the other models are closed: %s had too little memory", choice.name)


def place_of_cases(cases: Sequence[object], result: Path) -> Path:
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


def works_of_task(
    task: Task, folder: Path, setup: Setup, choice: ModelChoice, models: OpenModels, result: Path
) -> tuple[CaseWork, ...] | TaskOutcome:
    """The cases of a folder of links, one for each volume of its series; an outcome if none runs.

    A single case is named as the result's folder; several are named by volume.
    """
    verdicts = verdicts_on(task, folder, setup, choice, models.facts(choice, choice.settings).spec.body_parts)
    if isinstance(verdicts, TaskOutcome):
        return verdicts
    running = [verdict for verdict in verdicts if verdict.run]
    works = []
    for verdict in running:
        part = verdict.candidate.series.part
        name = part.name if part and len(running) > 1 else ""
        settings = settings_of(choice, verdict.by.by)
        works.append(CaseWork(_case(task, verdict, settings, result.name, name), choice, settings))
    others = [each for each in verdicts if not each.run and each.reason != "not-asked-for"]
    aside = tuple(f"{part.label} is set aside: {each.message}" for each in others if (part := _part(each)))
    first = works[0]
    return (replace(first, case=replace(first.case, warnings=(*first.case.warnings, *aside))), *works[1:])


def _part(verdict: Verdict) -> VolumePart | None:
    return verdict.candidate.series.part


def _case(task: Task, verdict: Verdict, settings: Settings, name: str, volume: str) -> Case:
    """A volume's case; `volume` names it among several, and is empty for the only one."""
    from ctflow.pipeline.case import case_from_candidate  # noqa: PLC0415

    case = case_from_candidate(verdict.candidate, volume or name, settings)
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
        weights=str(document["model"]["weights_digest"]),
        demonstration=model.spec.demonstration,
        elapsed_s=elapsed_s,
        objects=tuple(objects),
    )
