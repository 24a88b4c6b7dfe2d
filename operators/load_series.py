"""The first operator: finds the series in a folder and emits them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holoscan.conditions import BooleanCondition
from monai.deploy.core import Fragment, Operator, OperatorSpec

from ctflow.core.model import ModelSpec
from ctflow.core.progress import Progress, silent
from ctflow.dicom.read.select.selection import require_selected
from ctflow.pipeline.case import Case, Found, look_for_cases
from ctflow.pipeline.stages import load_case
from ctflow.settings.run import Settings


class LoadSeriesOperator(Operator):
    """Emits one `ctflow.pipeline.case.Case` per series, with its volume or its error; the next on request.

    Output:
        case: A `Case`.

    Args:
        fragment: The application.
        input_folder: Searched with all its subfolders.
        spec: The model's; its body parts affect the choice of series.
        settings: Series, pick and force.
        progress: Receives every file and slice.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        input_folder: Path,
        spec: ModelSpec,
        settings: Settings,
        progress: Progress = silent,
        **kwargs: Any,
    ) -> None:
        self._input_folder, self._spec, self._settings, self._progress = input_folder, spec, settings, progress
        self._waiting: list[Case] = []
        self.found: Found | None = None
        self._more = BooleanCondition(fragment, name="more_series")
        super().__init__(fragment, self._more, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the output."""
        spec.output("case")

    def start(self) -> None:
        """Find the series; raises `NoUsableSeries` before anything is loaded."""
        self.found = look_for_cases(self._input_folder, self._spec, self._settings, self._progress)
        require_selected(self.found.selection, self.found.scan)
        self._waiting = list(self.found.cases)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Load the next series and emit it."""
        case = load_case(self._waiting.pop(0), self._progress)
        if not self._waiting:
            self._more.disable_tick()
        op_output.emit(case, "case")
