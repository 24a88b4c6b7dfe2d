"""The middle operator: holds the model's engine from start() to stop()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctflow.operators.sdk_image import image_from_labels, volume_from_image
from monai.deploy.core import Fragment, Image, Operator, OperatorSpec

from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.pipeline.case import Case
from ctflow.pipeline.segmenter import Segmenter
from ctflow.pipeline.stages import segment_case
from ctflow.settings.run import Settings


class SegmentVolumeOperator(Operator):
    """Segments each volume that arrives.

    Input:
        image: A `Case` of `LoadSeriesOperator`, or an `Image` of the App SDK's `DICOMSeriesToVolumeOperator`.
    Output:
        seg_image: The `Case`, segmented, or an `Image` of labels in the form for `DICOMSegmentationWriterOperator`.

    Args:
        fragment: The application.
        model: The model.
        settings: Engine, precision, overlap and device.
        progress: Receives every window.
        prepare: As of `ctflow.pipeline.stages.segment_case`.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        model: Model,
        settings: Settings,
        progress: Progress = silent,
        prepare: Callable[[Case], Case] | None = None,
        **kwargs: Any,
    ) -> None:
        self._segmenter, self._progress, self._prepare = Segmenter(model, settings), progress, prepare
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the ports; they are named as the App SDK names them."""
        spec.input("image")
        spec.output("seg_image")

    def start(self) -> None:
        """Open the engine."""
        self._segmenter.open(self._progress)

    def stop(self) -> None:
        """Close the engine."""
        self._segmenter.close()

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Segment the input; a `Case` carries its own error on, an `Image` cannot, so the error is raised."""
        item: Case | Image = op_input.receive("image")
        if isinstance(item, Case):
            op_output.emit(segment_case(item, self._segmenter, self._progress, self._prepare), "seg_image")
            return
        segmentation, _ = self._segmenter.segment(volume_from_image(item), self._progress)
        op_output.emit(image_from_labels(segmentation.labels, item), "seg_image")
