"""What does Holoscan see? Three operators around `ctflow.pipeline`: load a series, segment a volume, write results."""

from __future__ import annotations

from ctflow.compat.holoscan import load_cuda_runtime, raise_stack_limit
from ctflow.compat.monai import import_for_app_sdk

# Before any import of holoscan, or of monai.deploy and with it, otherwise, all of MONAI.
raise_stack_limit()
load_cuda_runtime()
import_for_app_sdk()

from ctflow.operators.load_series import LoadSeriesOperator
from ctflow.operators.segment_volume import SegmentVolumeOperator
from ctflow.operators.write_results import WriteResultsOperator

__all__ = ["LoadSeriesOperator", "SegmentVolumeOperator", "WriteResultsOperator"]
