"""`ctflow evaluate`: a model's exactness over a folder of cases whose truth is known."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctflow import __version__
from ctflow.bench.exactness import (
    CaseComparison,
    FalsePositive,
    compare_lesions,
    compare_masks,
    dice_of,
    mean_hausdorff95_mm,
    summarise,
)
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import (
    AccuracyFailed,
    CtflowError,
    NoUsableSeries,
    SettingsInvalid,
    UnsupportedPixels,
)
from ctflow.core.model import RESEARCH_ONLY, Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.read.truth import read_truth
from ctflow.engines.contract import EngineInfo
from ctflow.pipeline.case import Case, find_cases
from ctflow.pipeline.documents import exit_code_of_errors
from ctflow.pipeline.run import announce
from ctflow.pipeline.segmenter import Segmenter
from ctflow.pipeline.stages import load_case, segment_case
from ctflow.report.run_record import error_facts
from ctflow.settings.run import Settings

SCHEMA_VERSION = 1
SURELY_SEEN_MM = 10.0  # lesions from this size on must be found if an accuracy is required
MOST_FALSE_POSITIVES = 100  # listed per case, the largest first; the summary counts all
SERIES, TRUTH = "ct", "truth.dcm"  # as written by `ctflow phantom`

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseOutcome:
    """The outcome of one case.

    Attributes:
        name: Its folder below the evaluated one; "." is that folder itself.
        digest: Of its series' UID; None if no series was found.
        comparison: Found against true; None if the case failed.
        geometry: The grid of both; None if the case failed.
        reference: dice and voxels_differing to the fp32 eager engine; None unless requested.
        seconds: Wall time of reading and segmenting; None if the case failed.
        engine: The engine that computed it; None if the case failed.
        warnings: Sentences on the truth.
        error: Why the case failed.
    """

    name: str
    digest: str | None = None
    comparison: CaseComparison | None = None
    geometry: Geometry | None = None
    reference: dict[str, float] | None = None
    seconds: float | None = None
    engine: EngineInfo | None = None
    warnings: tuple[str, ...] = ()
    error: CtflowError | None = None


@dataclass(frozen=True)
class _Segmenters:
    """The sources of masks: a model or its results by case, the fp32 model to compare with, regions of a truth."""

    model: Model
    chosen: Segmenter | None
    reference: Segmenter | None
    results: Mapping[str, Sequence[Path]] | None
    rois: Sequence[str]


def evaluate_folder(
    folder: Path,
    model: Model,
    settings: Settings,
    *,
    reference: bool = False,
    results: Path | None = None,
    rois: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Segment every case of a folder and compare it with its truth.

    Args:
        folder: A case (ct/ and truth.dcm, a SEG or an RT Structure Set), or a folder of cases.
        model: The model; it marks one segment.
        settings: The run's.
        reference: Whether each case is also segmented by the fp32 eager engine and compared with that.
        results: The output folder of an earlier run: its SEGs are compared, and nothing is segmented.
        rois: Which regions of a truth that is an RT Structure Set are meant (`read_truth`).
        progress: Receives cases as stage "evaluate", and files, slices and windows.

    Returns:
        schema_version, ctflow_version, exit_code (0, 6, or the first failure's where all failed), research_only,
        model, engine, cases and summary, as JSON values.

    Raises:
        SettingsInvalid: The model marks several segments.
        NoUsableSeries: The folder holds no case, or that of results cannot be listed.
        ResourceError: An engine cannot be opened.
        ModelError: An engine cannot be made from the model.
        OutputError: The cache of engines cannot be written.
    """
    if len(model.spec.segments) != 1:
        raise SettingsInvalid(
            f"--model: evaluation needs a model with one segment, not {len(model.spec.segments)}",
            reason="several-segments",
        )
    folders = case_folders(folder)
    announce(model)
    settings = replace(settings, seg="binary")  # nothing is written, so fractions would be wasted
    exact = replace(settings, engine="eager", precision="fp32")
    outcomes = []
    with ExitStack() as stack:
        segmenters = _Segmenters(
            model,
            None if results else _open(stack, Segmenter(model, settings), progress),
            _open(stack, Segmenter(model, exact), progress) if reference else None,
            None if results is None else _folders_of_results(results),
            rois,
        )
        progress("evaluate", 0, len(folders))
        for done, path in enumerate(folders, start=1):
            name = path.relative_to(folder).as_posix()
            outcomes.append(_evaluate_case(path, name, segmenters, settings, progress))
            progress("evaluate", done, len(folders))
    return _document(outcomes, model)


def _open(stack: ExitStack, segmenter: Segmenter, progress: Progress) -> Segmenter:
    segmenter.open(progress)
    stack.callback(segmenter.close)
    return segmenter


def require_accuracy(document: Mapping[str, Any], least_dice: float) -> None:
    """Check an evaluation.

    Args:
        document: The result of `evaluate_folder`.
        least_dice: The Dice of every case with lesions must reach it; every lesion of at least `SURELY_SEEN_MM` must be
            found.

    Raises:
        AccuracyFailed: One falls short; names the first case.
    """
    for case in document["cases"]:
        missed = [
            lesion["equivalent_diameter_mm"]
            for lesion in case["lesions"]
            if not lesion["hit"] and lesion["equivalent_diameter_mm"] >= SURELY_SEEN_MM
        ]
        if missed:
            raise AccuracyFailed(
                f"case {case['name']}: a lesion of {max(missed):.1f} mm was missed", reason="lesion-missed"
            )
        if case["lesions"] and case["dice"] is not None and case["dice"] < least_dice:
            raise AccuracyFailed(
                f"case {case['name']}: Dice {case['dice']:.3f} is below {least_dice}", reason="dice-too-low"
            )


def case_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a case, else the cases in it, by name (numbers by value).

    A folder with only a series or only a truth is also a case, which then fails with its reason.

    Raises:
        NoUsableSeries: There is no case, or no such folder.
    """
    try:
        if _is_case(folder):
            return [folder]
        cases = [path for path in folder.iterdir() if _is_case(path)]
    except OSError as error:
        raise NoUsableSeries(
            f"the input folder cannot be listed: {error.strerror}", reason="folder-unreadable"
        ) from error
    if not cases:
        raise NoUsableSeries(
            f"the folder contains no case: a case is a folder with {SERIES}/ and {TRUTH}", reason="no-case"
        )
    return sorted(cases, key=lambda path: path.name.zfill(20) if path.name.isdecimal() else path.name)


def _is_case(folder: Path) -> bool:
    return (folder / SERIES).is_dir() or (folder / TRUTH).is_file()


def _evaluate_case(
    folder: Path, name: str, segmenters: _Segmenters, settings: Settings, progress: Progress
) -> CaseOutcome:
    """Segment and compare one case; a named error becomes part of its outcome."""
    outcome = CaseOutcome(name)
    try:
        case = _only_case(folder / SERIES, segmenters.model, settings, progress)
        outcome = replace(outcome, digest=case.candidate.series.digest)
        case = _unless_failed(load_case(case, progress))
        headers = [instance.header for instance in case.loaded.instances]
        _check_grid(case)
        # Before the network, so that a wrong one costs no minutes.
        truth = read_truth(folder / TRUTH, headers, segmenters.rois)
        for warning in truth.warnings:
            log.warning("case %s: %s: %s", name, TRUTH, warning)
        found, seconds, engine = _found(case, headers, segmenters, progress)
        reference = _against_reference(case, found, segmenters.reference, progress)
        volume = case.loaded.volume
        outcome = replace(outcome, comparison=_compare(found, truth.labels, volume), geometry=volume.geometry)
        outcome = replace(outcome, warnings=truth.warnings)
        return replace(outcome, reference=reference, seconds=seconds, engine=engine)
    except CtflowError as error:
        log.error("case %s: %s", name, error.described)  # noqa: TRY400  # named: no traceback needed
        return replace(outcome, error=error)
    except Exception as error:  # noqa: BLE001  # the other cases go on
        failure = unexpected(error, f"case {name}")
        log.error("%s", failure)  # noqa: TRY400  # `unexpected` logs the traceback
        return replace(outcome, error=failure)


def _check_grid(case: Case) -> None:
    """Check that distances and volumes can be measured on the series' own slices, where its truth is drawn."""
    if case.loaded.volume.geometry.is_tilted or case.loaded.is_resampled:
        digest = case.candidate.series.digest
        raise UnsupportedPixels(
            f"series {digest}: it is tilted or was resampled, and cannot be evaluated on its own slices",
            reason="other-grid",
        )


def _found(
    case: Case, headers: Sequence[Any], segmenters: _Segmenters, progress: Progress
) -> tuple[np.ndarray[Any, Any], float | None, EngineInfo | None]:
    """A case's mask, its seconds, and the engine."""
    if segmenters.results is not None:
        folder = _folder_of_results(segmenters.results, case)
        found = read_segmentation(folder / "segmentation.dcm", headers)
        _check_made_by(folder / "result.json", segmenters.model)
        return found, None, None
    if segmenters.chosen is None:
        raise ValueError("without results there is a segmenter")
    done = _unless_failed(segment_case(case, segmenters.chosen, progress))
    return done.segmented.labels, sum(done.stage_seconds.values()), done.segmented.engine


def _folders_of_results(results: Path) -> Mapping[str, Sequence[Path]]:
    """The folders with a SEG in the output of `run` or of `cohort run`, which has one of each row in its `results`."""
    try:
        next(results.iterdir(), None)
    except OSError as error:
        raise NoUsableSeries(
            f"the folder of --results cannot be listed: {error.strerror}", reason="folder-unreadable"
        ) from error
    found: dict[str, list[Path]] = {}
    for folders in ("*", "*/*", "results/*/*"):
        for path in results.glob(f"{folders}/segmentation.dcm"):
            if not any(part.startswith(".") for part in path.relative_to(results).parts):  # superseded, or half-written
                found.setdefault(path.parent.name, []).append(path.parent)
    return found


def _folder_of_results(results: Mapping[str, Sequence[Path]], case: Case) -> Path:
    found = results.get(case.key, ())
    if len(found) == 1:
        return found[0]
    what = "has several SEGs of it" if found else "has no SEG of it: name the folder that `run` or `cohort run` wrote"
    raise NoUsableSeries(f"series {case.candidate.series.digest}: the folder of --results {what}", reason="no-result")


def _only_case(folder: Path, model: Model, settings: Settings, progress: Progress) -> Case:
    cases = find_cases(folder, model.spec, settings, progress).cases
    if len(cases) != 1:
        raise NoUsableSeries(
            f"{SERIES}/ holds {len(cases)} eligible series or volumes, but a case has one: choose it with "
            "--series or --volume",
            reason="several-series",
        )
    return cases[0]


def _unless_failed(case: Case) -> Case:
    if case.error is not None:
        raise case.error
    return case


def _compare(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any], volume: Volume) -> CaseComparison:
    spacing_mm = volume.geometry.spacing_mm
    # Several segments in a truth tell its lesions apart; with one segment, its components do.
    lesions = truth if int(truth.max(initial=0)) > 1 else truth != 0
    return CaseComparison(compare_masks(found, truth, spacing_mm), compare_lesions(found, lesions, spacing_mm))


def _check_made_by(path: Path, model: Model) -> None:
    """Check that results are this model's: an evaluation must not credit it with another's."""
    try:
        made_by = json.loads(path.read_text(encoding="utf-8"))["model"]["weights_digest"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsInvalid(
            f"--results: no result.json names the model of {path.parent.name}", reason="other-model"
        ) from error
    if made_by != model.weights_digest:
        raise SettingsInvalid(
            f"--results: {path.parent.name} is from another model; name its bundle with -m", reason="other-model"
        )


def _against_reference(
    case: Case, found: np.ndarray[Any, Any], reference: Segmenter | None, progress: Progress
) -> dict[str, float] | None:
    if reference is None:
        return None
    exact = _unless_failed(segment_case(case, reference, progress)).segmented.labels
    return {"dice": round(dice_of(found, exact), 6), "voxels_differing": int(np.count_nonzero(found != exact))}


def _document(outcomes: Sequence[CaseOutcome], model: Model) -> dict[str, Any]:
    spec = model.spec
    compared = [outcome.comparison for outcome in outcomes if outcome.comparison is not None]
    engine = next((outcome.engine for outcome in outcomes if outcome.engine is not None), None)
    return {
        "schema_version": SCHEMA_VERSION,
        "ctflow_version": __version__,
        "exit_code": exit_code_of_errors([outcome.error for outcome in outcomes]),
        "research_only": RESEARCH_ONLY if spec.demonstration else None,
        "model": {"name": spec.name, "version": spec.version, "weights_digest": model.weights_digest},
        "engine": None if engine is None else _rounded(asdict(engine)),
        "cases": [_case_document(outcome) for outcome in outcomes],
        "summary": _rounded(summarise(compared)),
    }


def _case_document(outcome: CaseOutcome) -> dict[str, Any]:
    """A case's document: every case has the same keys; missing values of a failed one are null."""
    comparison, error = outcome.comparison, outcome.error
    masks = asdict(comparison.masks) if comparison else {}
    lesions = comparison.lesions.lesions if comparison else ()
    false = comparison.lesions.false_positives if comparison else ()
    return {
        "name": outcome.name,
        "digest": outcome.digest,
        "dice": _rounded(masks.get("dice")),
        "hausdorff95_mm": _rounded(masks.get("hausdorff95_mm")),
        "lesions_hausdorff95_mm": _rounded(mean_hausdorff95_mm(lesions)),
        "volume_found_ml": _rounded(masks.get("volume_found_ml")),
        "volume_truth_ml": _rounded(masks.get("volume_truth_ml")),
        "volume_error_ml": _rounded(masks.get("volume_error_ml")),
        "lesions": _rounded([asdict(lesion) for lesion in lesions]),
        "false_positives": [_false_positive(found, outcome.geometry) for found in false[:MOST_FALSE_POSITIVES]],
        "false_positives_left_out": max(len(false) - MOST_FALSE_POSITIVES, 0),
        "reference": outcome.reference,
        "seconds": _rounded(outcome.seconds),
        "warnings": list(outcome.warnings),
        "error": None if error is None else error_facts(error),
    }


def _false_positive(found: FalsePositive, geometry: Geometry | None) -> dict[str, Any]:
    """A false positive with its centre in LPS mm, as `ctflow run` gives a finding's."""
    if geometry is None:
        raise ValueError("what was found has a grid")
    entry = asdict(found)
    entry["centroid_mm"] = [float(mm) for mm in geometry.world_from_index(entry.pop("centroid"))]
    document: dict[str, Any] = _rounded(entry)
    return document


def _rounded(value: Any) -> Any:
    """The same with floats of six decimals and lists for tuples, as JSON returns them."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
