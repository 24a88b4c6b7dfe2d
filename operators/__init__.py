"""What does Holoscan see? Three operators around `ctflow.pipeline`: load a series, segment a volume, write results."""

from __future__ import annotations

from ctflow.operators._runtime import load_cuda_runtime, raise_stack_limit

# Before anything imports holoscan.
raise_stack_limit()
load_cuda_runtime()

from ctflow.operators.load_series import LoadSeriesOperator
from ctflow.operators.segment_volume import SegmentVolumeOperator
from ctflow.operators.write_results import WriteResultsOperator

__all__ = ["LoadSeriesOperator", "SegmentVolumeOperator", "WriteResultsOperator"]
