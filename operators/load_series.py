"""The first operator: finds the series in a folder and emits them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holoscan.conditions import BooleanCondition
from monai.deploy.core import Fragment, Operator, OperatorSpec

from ctflow.core.progress import Progress, silent
from ctflow.dicom.read.select.selection import require_selected
from ctflow.pipeline.case import Case, Found, look_for_cases
from ctflow.pipeline.overlap.cases import CasesOfRun
from ctflow.pipeline.stages import load_case
from ctflow.settings.run import Settings


class LoadSeriesOperator(Operator):
    """Emits one `ctflow.pipeline.case.Case` per series, with its volume or its error; the next on request.

    Output:
        case: A `Case`.

    Args:
        fragment: The application.
        input_folder: Searched with all its subfolders.
        body_parts: The model's; they affect the choice of series.
        settings: Series, pick and force.
        progress: Receives every file and slice.
        found: The series, if they have been looked for.
        cases: Reads them, in processes; None reads one after another in this one.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        input_folder: Path,
        body_parts: tuple[str, ...],
        settings: Settings,
        progress: Progress = silent,
        found: Found | None = None,
        cases: CasesOfRun | None = None,
        **kwargs: Any,
    ) -> None:
        self._input_folder, self._body_parts, self._settings = input_folder, body_parts, settings
        self._progress, self._cases, self.found = progress, cases, found
        self._left = 0
        self._loaded: Iterator[Case] = iter(())
        self._more = BooleanCondition(fragment, name="more_series")
        super().__init__(fragment, self._more, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the output."""
        spec.output("case")

    def start(self) -> None:
        """Find the series, unless that was done; raises `NoUsableSeries` before anything is loaded."""
        if self.found is None:
            self.found = look_for_cases(self._input_folder, self._body_parts, self._settings, self._progress)
            if self._cases:
                self._cases.begin(self.found.cases)
        require_selected(self.found.selection, self.found.scan)
        cases, self._left = self.found.cases, len(self.found.cases)
        self._loaded = self._cases.loaded() if self._cases else (load_case(case, self._progress) for case in cases)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Load the next series and emit it."""
        case = next(self._loaded)
        self._left -= 1
        if not self._left:
            self._more.disable_tick()
        op_output.emit(case, "case")
