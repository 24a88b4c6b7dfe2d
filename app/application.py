"""The graph: load series -> segment volume -> write results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# First: it makes libholoscan loadable.
from ctflow.operators import LoadSeriesOperator, SegmentVolumeOperator, WriteResultsOperator  # isort: skip

from monai.deploy.core import Application

from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.pipeline.case import Found
from ctflow.pipeline.documents import document_of_run
from ctflow.pipeline.overlap.cases import CasesOfRun
from ctflow.pipeline.run import RunReport, finish_run
from ctflow.report.run_record import document_of_error
from ctflow.settings.run import Paths, Settings


class CtflowApplication(Application):
    """A chest CT folder in, a DICOM SEG a series out.

    Args:
        paths: Input and output.
        model: The model.
        settings: The run's.
        cases: Reads and writes the series; open while the application runs.
        progress: Told of files, slices and windows.
        found: The series, if they have been looked for; `cases` then reads them already.
    """

    def __init__(
        self,
        *args: Any,
        paths: Paths,
        model: Model,
        settings: Settings,
        cases: CasesOfRun,
        progress: Progress = silent,
        found: Found | None = None,
        **kwargs: Any,
    ) -> None:
        self._paths, self._model, self._settings, self._progress = paths, model, settings, progress
        self._cases, self._found = cases, found
        self._load: LoadSeriesOperator | None = None
        self._write: WriteResultsOperator | None = None
        super().__init__([], *args, **kwargs)

    def compose(self) -> None:
        """Wire the operators."""
        common: dict[str, Any] = {"settings": self._settings, "progress": self._progress}
        self._load = LoadSeriesOperator(
            self,
            input_folder=self._paths.input,
            body_parts=self._model.spec.body_parts,
            found=self._found,
            cases=self._cases,
            name="load_series",
            **common,
        )
        segment = SegmentVolumeOperator(
            self, model=self._model, prepare=self._cases.prepare, name="segment_volume", **common
        )
        self._write = WriteResultsOperator(
            self,
            output_folder=self._paths.output,
            model=self._model,
            writer=self._cases,
            name="write_results",
            **common,
        )
        self.add_flow(self._load, segment, {("case", "image")})
        self.add_flow(segment, self._write, {("seg_image", "seg_image")})

    def report(self) -> RunReport:
        """What became of every series; call after `run()`.

        Raises:
            KeyboardInterrupt: The graph ended before every series was through; Holoscan then returns as if all were.
        """
        if self._load is None or self._write is None or self._load.found is None:
            raise KeyboardInterrupt
        if self._write.count < len(self._load.found.cases):
            raise KeyboardInterrupt
        return finish_run(self._cases.finished(), self._load.found, self._model.spec, self._paths.output)

    def unfinished(self, error: Mapping[str, Any]) -> Mapping[str, Any]:
        """The document of a run that an error ends now (`ctflow.report.run_record.error_facts`)."""
        if self._load is None or self._write is None or self._load.found is None:
            return document_of_error(error)
        return document_of_run(self._cases.done, self._load.found, self._model.spec, self._paths.output, error)
