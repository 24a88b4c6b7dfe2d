"""The last operator: writes each case's folder and records its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.deploy.core import Fragment, Operator, OperatorSpec

from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.pipeline.case import Case
from ctflow.pipeline.overlap.cases import CasesOfRun
from ctflow.pipeline.write import write_case
from ctflow.settings.run import Settings


class WriteResultsOperator(Operator):
    """Writes the result folder of each case, as `ctflow.pipeline.write.write_case` does.

    The settings determine the form, as for `ctflow run`.

    Input:
        seg_image: A `Case` of `SegmentVolumeOperator`.

    Args:
        fragment: The application.
        output_folder: Gets one folder per series.
        model: The model that segmented.
        settings: The run's.
        progress: Receives every file.
        writer: Writes them, in processes; None writes one after another in this one.

    Attributes:
        count: Of the cases that came.
        cases: Those written in this process.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        output_folder: Path,
        model: Model,
        settings: Settings,
        progress: Progress = silent,
        writer: CasesOfRun | None = None,
        **kwargs: Any,
    ) -> None:
        self._output_folder, self._model, self._settings = output_folder, model, settings
        self._progress, self._writer = progress, writer
        self.count = 0
        self.cases: list[Case] = []
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the input."""
        spec.input("seg_image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write one case, or record why it was not written."""
        case: Case = op_input.receive("seg_image")
        self.count += 1
        if self._writer:
            self._writer.write(case, self._model)
        else:
            self.cases.append(write_case(case, self._model, self._settings, self._output_folder, self._progress))
