"""ctflow's segmentation operator between the App SDK's own operators."""

from __future__ import annotations

import json
import subprocess
import sys

import highdicom as hd
import pydicom
import pytest

from ctflow.bundle import read_bundle
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from tests_support import assert_same_points, segment_points_by_dcmqi

pytestmark = pytest.mark.e2e

GRAPH = """
import sys
from pathlib import Path
from ctflow.operators import SegmentVolumeOperator
from holoscan.conditions import CountCondition
from monai.deploy.core import Application
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from pydicom.sr.codedict import codes
from ctflow.bundle import read_bundle
from ctflow.settings.run import Settings

class Stock(Application):
    def compose(self):
        source, bundle, output = map(Path, sys.argv[1:])
        load = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=source, name="load")
        select = DICOMSeriesSelectorOperator(self, name="select")
        to_volume = DICOMSeriesToVolumeOperator(self, name="to_volume")
        segment = SegmentVolumeOperator(self, model=read_bundle(bundle), settings=Settings(cache=None), name="segment")
        description = SegmentDescription(
            segment_label="tumour",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_name="ctflow", algorithm_version="0",
        )
        write = DICOMSegmentationWriterOperator(
            self, segment_descriptions=[description], output_folder=output, name="write"
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, to_volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(to_volume, segment, {("image", "image")})
        self.add_flow(segment, write, {("seg_image", "seg_image")})
        self.add_flow(select, write, {("study_selected_series_list", "study_selected_series_list")})

if __name__ == "__main__":
    Stock([]).run()
"""


def run_stock(folder, series, bundle) -> subprocess.CompletedProcess[str]:
    script = folder / "stock.py"
    script.write_text(GRAPH)
    command = [sys.executable, script, series, bundle, folder / "out"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_stock_graph_marks_the_same_voxels(series, coarse_bundle, tmp_path):
    done = run_stock(tmp_path, series, coarse_bundle)
    assert done.returncode == 0, done.stderr
    (stock,) = (tmp_path / "out").glob("*.dcm")
    run_folder(series, tmp_path / "ours", read_bundle(coarse_bundle), Settings(engine="eager", cache=None))
    (ours,) = (tmp_path / "ours").glob("*/segmentation.dcm")
    voxels = json.loads((ours.parent / "result.json").read_text())["segments"][0]["voxels"]
    assert int(hd.seg.segread(stock).pixel_array.sum()) == voxels > 0
    assert_same_points(segment_points_by_dcmqi(ours), segment_points_by_dcmqi(stock))


def test_pixels_that_are_not_square_are_refused(series, coarse_bundle, tmp_path):
    """The App SDK's operator swaps the spacings of rows and columns, so the volume would lie wrongly."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PixelSpacing = [dataset.PixelSpacing[0], float(dataset.PixelSpacing[1]) * 1.1]
        dataset.save_as(folder / path.name)
    done = run_stock(tmp_path, folder, coarse_bundle)
    assert done.returncode != 0
    assert "BrokenSeries" in done.stderr
    assert "DICOMSeriesToVolumeOperator" in done.stderr
    assert not list((tmp_path / "out").glob("*.dcm"))
