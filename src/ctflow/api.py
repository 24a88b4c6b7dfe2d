"""The functions of the public API: thin, over the same pipeline as the command line.

Users import them from `ctflow` itself. Each imports what it needs when it is called: `read_series` needs no torch.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ctflow.core.errors import SettingsInvalid
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Volume
from ctflow.settings.run import Settings, read_environment, settings_from_values

if TYPE_CHECKING:
    from ctflow.pipeline.run import RunReport
    from ctflow.pipeline.segmentation import Segmentation

log = logging.getLogger(__name__)


def read_series(
    folder: str | PathLike[str],
    *,
    series_uid: str | None = None,
    force: bool = False,
    allow_gaps: bool = False,
    volume: str = "all",
    progress: Progress = silent,
) -> Volume:
    """Read one CT series into a volume in Hounsfield units.

    Warnings about the series (resampled slices, lossy compression) are logged by the logger `ctflow.api`.

    Args:
        folder: Folder with DICOM files, searched with all its subfolders.
        series_uid: SeriesInstanceUID of the series; required if the folder contains several eligible series.
        force: Also read a series that the eligibility rules reject (too few slices, slices too thick, derived images).
        allow_gaps: Interpolate a single missing slice between two.
        volume: Which volume of a series that holds several, as of `--volume`: "first", its number, or a value such as
            "phase=50"; required if the series holds several.
        progress: Called with every file (stage "scan") and every slice (stage "read").

    Returns:
        A volume whose array has shape (D, H, W) and values in HU, int16 where every slope and intercept is integral and
        all values fit, else float32; padding is -1024 HU. Its geometry maps the array index (d, h, w) to LPS
        coordinates in mm.

    Raises:
        NoUsableSeries: The folder contains no eligible series; the message says why each series was rejected.
        SettingsInvalid: `volume` means nothing, or the folder contains several eligible series (or volumes of one) and
            neither `series_uid` nor `volume` names one of them.
        BrokenSeries: The slices do not form one regular volume; `reason` names the rule.
        UnsupportedPixels: The pixel data cannot be converted to HU without guessing.
    """
    from ctflow.dicom.read.assemble import assemble_series  # noqa: PLC0415
    from ctflow.dicom.read.scan import scan_folder  # noqa: PLC0415
    from ctflow.dicom.read.select.selection import require_selected, select_series  # noqa: PLC0415

    scan = scan_folder(Path(folder), progress)
    chosen = settings_from_values({"volume": volume}, {}).volume
    selection = select_series(scan, series_uid=series_uid, force=force, volume=chosen)
    require_selected(selection, scan)
    if len(selection.selected) > 1:
        parts = [candidate.series.part for candidate in selection.selected]
        digests = ", ".join(candidate.series.digest for candidate in selection.selected)
        labels = "; ".join(f"{part.number}: {part.label}" for part in parts if part)
        raise SettingsInvalid(
            f"the folder contains {len(selection.selected)} eligible series ({digests}): choose one with series_uid"
            + (f", and a volume of it with volume ({labels})" if labels else ""),
            reason="series-not-chosen",
        )
    (candidate,) = selection.selected
    assembled = assemble_series(candidate.series, progress, allow_gaps=allow_gaps)
    forced = (candidate.message,) if candidate.forced else ()
    for warning in (*candidate.series.dropped, *forced, *assembled.warnings):
        log.warning("series %s: %s", candidate.series.digest, warning)
    return assembled.volume


def read_model(
    path: str | PathLike[str] | None = None, config: str | None = None, *, allow_code: bool = False
) -> Model:
    """Read a MONAI bundle or a model of nnU-Net; without `allow_code` nothing in it is executed.

    Args:
        path: A bundle's folder, an nnU-Net model's folder or zip, or a folder that contains exactly one of these; None
            reads the demonstration bundle, whose results are for research only.
        config: Files of a bundle's `configs`, joined by commas; None takes inference.json or inference.yaml.
        allow_code: Whether a network of the bundle's own Python code, or its TorchScript file, may be executed.

    Returns:
        The model, its weights on the CPU.

    Raises:
        BundleInvalid: The bundle lacks a part or needs something that ctflow does not support; the message names file
            and key, `reason` the rule.
    """
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415

    found = demonstration_bundle() if path is None else find_bundle(Path(path))
    return read_bundle(found, config, allow_code=allow_code)


def segment(
    volume: Volume,
    model: Model | str | PathLike[str],
    settings: Settings | None = None,
    *,
    progress: Progress = silent,
) -> Segmentation:
    """Segment one volume in memory; nothing is written except engines in the cache.

    Opens the model's engine and closes it again. For several volumes open a `ctflow.Segmenter` once.

    Args:
        volume: CT in HU, array of shape (D, H, W), int16 or float32.
        model: A model, or the path of one, as `-m`.
        settings: Engine, precision, device, overlap, ROI, constant windows and cache are used. None takes the
            defaults of the command line: CTFLOW_* environment variables and the user's cache folder.
        progress: Called with every window (stage "segment").

    Returns:
        A segmentation with labels of shape (D, H, W), uint8, on the volume's own grid (0 is background, other values
        are the segment numbers of `model.spec.segments`), with the engine that computed them and warnings.

    Raises:
        SettingsInvalid: The settings name an engine or a value that does not exist.
        ModelError: The bundle cannot be read (`BundleInvalid`), an engine cannot be built (`ExportFailed`), its results
            differ from PyTorch in fp32 (`ParityFailed`), or the network's output is not finite.
        ResourceError: The engine or device is not available (`BackendUnavailable`) or has too little memory
            (`DeviceOutOfMemory`).
        OutputError: The cache of engines cannot be written.
    """
    from ctflow.pipeline.segmenter import Segmenter  # noqa: PLC0415

    segmenter = Segmenter(_model_of(model), _settings_or_defaults(settings))
    segmenter.open(progress)
    with segmenter:
        found, _ = segmenter.segment(volume, progress)
        return replace(found, warnings=segmenter.warnings + found.warnings)


def run(
    folder: str | PathLike[str],
    output: str | PathLike[str],
    model: Model | str | PathLike[str] | None = None,
    settings: Settings | None = None,
    *,
    progress: Progress = silent,
) -> RunReport:
    """Segment every eligible CT series of a folder and write DICOM SEG, measurements and report, as `ctflow run` does.

    A series that cannot be segmented raises nothing and does not stop the others: its error is in the returned report
    and in `output/result.json`.

    Args:
        folder: Folder with DICOM files, searched with all its subfolders.
        output: Gets one folder per series, each complete or absent, and `result.json` on the whole run.
        model: A model, or the path of one, as `-m`; None takes the demonstration bundle.
        settings: All settings of the run. None takes the defaults of the command line: CTFLOW_* environment
            variables and the user's cache folder.
        progress: Called with files, slices and windows.

    Returns:
        The cases, each with the folder of its result or its error; the exit code (0 if all are done, 6 if some are);
        and the content of `result.json`.

    Raises:
        NoUsableSeries: The folder contains no eligible series.
        SettingsInvalid: The settings name an engine that does not exist.
        ModelError: The model cannot be used.
        ResourceError: The engine cannot be opened.
        OutputError: The output folder cannot be written.
    """
    from ctflow.pipeline.run import run_folder  # noqa: PLC0415
    from ctflow.report.run_record import recorded_run  # noqa: PLC0415

    chosen = _settings_or_defaults(settings)
    with recorded_run(Path(output)) as record:  # result.json also says so if the model cannot be read
        return run_folder(Path(folder), Path(output), _model_of(model), chosen, progress, record)


def _model_of(model: Model | str | PathLike[str] | None) -> Model:
    return model if isinstance(model, Model) else read_model(model)


def _settings_or_defaults(settings: Settings | None) -> Settings:
    return settings_from_values({}, read_environment()) if settings is None else settings
