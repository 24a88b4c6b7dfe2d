"""The whole job without Holoscan: find series, load, segment and write each.

Every entry point (command line, operators, node, Python) goes through these functions, so all give the same SEG.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctflow.bundle.metadata import read_body_parts, read_demonstration
from ctflow.core.errors import CtflowError
from ctflow.core.model import RESEARCH_ONLY, Model, ModelSpec
from ctflow.core.progress import Progress, silent
from ctflow.dicom.read.select.selection import require_selected
from ctflow.pipeline.case import Case, Found, look_for_cases
from ctflow.pipeline.documents import document_of_run
from ctflow.pipeline.overlap.cases import CasesOfRun
from ctflow.pipeline.overlap.messages import InOrder
from ctflow.pipeline.stages import load_case, segment_case
from ctflow.report.result import write_result
from ctflow.report.run_record import RunRecord, recorded_run
from ctflow.settings.run import Settings

if TYPE_CHECKING:
    from ctflow.pipeline.segmenter import Segmenter

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunReport:
    """The outcome of every selected series, and the exit code of the run.

    Attributes:
        cases: The cases, in the order they ran.
        exit_code: 0, 6, or the first failure's.
        document: The content of the run's result.json.
    """

    cases: tuple[Case, ...]
    exit_code: int
    document: Mapping[str, Any]


def announce(model: Model, *, is_warned: bool = False) -> None:
    """Log the model; unless `is_warned`, a demonstration model's first line says that it is not for clinical use."""
    if model.spec.demonstration and not is_warned:
        log.warning("%s: %s is a demonstration model", RESEARCH_ONLY, model.spec.name)
    log.info("model %s %s, weights %s", model.spec.name, model.spec.version, model.weights_digest[:12])
    for note in model.spec.notes:
        log.warning("bundle: %s", note)


def run_folder(
    folder: Path,
    output: Path,
    model: Model,
    settings: Settings,
    progress: Progress = silent,
    record: RunRecord | None = None,
) -> RunReport:
    """Segment every selected series of a folder.

    Args:
        folder: Input folder.
        output: Gets one folder per series, and the run's result.json, even if the run ends early.
        model: The model.
        settings: The run's.
        progress: Receives files, slices and windows.
        record: The run's record, if it has already begun.

    Returns:
        What became of every series.

    Raises:
        NoUsableSeries: No series may run.
        ResourceError: The engine cannot be opened.
        OutputError: The output folder cannot be written.
    """
    with recorded_run(output, record) as recorded, CasesOfRun(settings, output, progress) as cases:
        announce(model)
        found = look_for_cases(folder, model.spec.body_parts, settings, progress)
        cases.begin(found.cases)
        return _run(found, cases, model, settings, output, progress, recorded)


def run_bundle(
    bundle: Path,
    folder: Path,
    output: Path,
    settings: Settings,
    progress: Progress = silent,
    record: RunRecord | None = None,
) -> RunReport:
    """As `run_folder`, with a model that is read while processes read the first series.

    Args:
        bundle: The model's folder or file, as `ctflow.bundle.find_bundle` found it.
        folder: Input folder.
        output: As of `run_folder`.
        settings: The run's, with the bundle's configuration.
        progress: As of `run_folder`.
        record: As of `run_folder`.

    Raises:
        BundleInvalid: The bundle cannot be used.
        CtflowError: As of `run_folder`.
    """
    with recorded_run(output, record) as recorded, CasesOfRun(settings, output, progress) as cases:
        model, found = begin_run(bundle, folder, settings, cases, progress)
        return _run(found, cases, model, settings, output, progress, recorded)


def begin_run(
    bundle: Path, folder: Path, settings: Settings, cases: CasesOfRun, progress: Progress = silent
) -> tuple[Model, Found]:
    """Find the series, begin to read them, and read the model meanwhile, which imports torch.

    For a process of ctflow's own: garbage in cycles that is there by then stays. Whatever is wrong with the model is
    raised before what is wrong with the series, and logged before it.
    """
    is_warned = _warned(bundle)
    ahead = InOrder(1)
    ahead.current = 0  # what is logged from here on waits for the model's lines
    try:
        found = _found_or_error(bundle, folder, settings, cases, progress)
        ahead.current = None
        from ctflow.bundle import read_bundle  # noqa: PLC0415  # torch takes seconds

        model = read_bundle(bundle, settings.config, allow_code=settings.allow_code)
        announce(model, is_warned=is_warned)
        # Headers, modules and tables, all permanent: with 32 CTs, a full collection would halt the device for a second.
        gc.freeze()
    finally:
        ahead.close()
    if isinstance(found, CtflowError):
        raise found
    return model, found


def _warned(bundle: Path) -> bool:
    """Say first of all that a demonstration model is not for clinical use."""
    try:
        is_demonstration = read_demonstration(bundle)
    except CtflowError:  # raised when the bundle is read
        return False
    if is_demonstration:
        log.warning("%s: a demonstration model", RESEARCH_ONLY)
    return is_demonstration


def _found_or_error(
    bundle: Path, folder: Path, settings: Settings, cases: CasesOfRun, progress: Progress
) -> Found | CtflowError:
    try:
        found = look_for_cases(folder, read_body_parts(bundle), settings, progress)
    except CtflowError as error:
        return error
    cases.begin(found.cases, early=True)
    return found


def _run(
    found: Found,
    cases: CasesOfRun,
    model: Model,
    settings: Settings,
    output: Path,
    progress: Progress,
    record: RunRecord,
) -> RunReport:
    from ctflow.pipeline.segmenter import Segmenter  # noqa: PLC0415  # torch takes seconds

    record.describe = lambda error: document_of_run(cases.done, found, model.spec, output, error)
    require_selected(found.selection, found.scan)
    segmenter = Segmenter(model, settings)
    segmenter.open(progress)
    with segmenter:
        for case in cases.loaded():
            cases.write(segment_case(case, segmenter, progress, cases.prepare), model)
        return finish_run(cases.finished(), found, model.spec, output)


def run_case(case: Case, segmenter: Segmenter, settings: Settings, output: Path, progress: Progress = silent) -> Case:
    """Load, segment and write one case; a named error becomes part of it."""
    from ctflow.pipeline.write import write_case  # noqa: PLC0415  # half a second that no window need wait for

    case = segment_case(load_case(case, progress), segmenter, progress)
    return write_case(case, segmenter.model, settings, output, progress)


def finish_run(cases: tuple[Case, ...], found: Found, spec: ModelSpec, output: Path) -> RunReport:
    """Write the run's result.json and decide the exit code.

    Args:
        cases: The case of every selected series, done or not.
        found: Gives the series that were set aside and the unreadable files.
        spec: The model's.
        output: The output folder.

    Returns:
        What became of every series.

    Raises:
        OutputError: The result.json cannot be written.
    """
    document = document_of_run(cases, found, spec, output)
    for file in found.scan.unreadable:
        log.warning("file %s: %s", file.name, file.message)
    write_result(document, output / "result.json")
    return RunReport(cases, document["exit_code"], document)
