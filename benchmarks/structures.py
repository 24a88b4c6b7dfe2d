"""Time the RT Structure Set of 100 findings, each with a hole, in a CT of 300 slices of 512 x 512 pixels.

    python benchmarks/structures.py

The last line of the output is one JSON document: seconds of leaving out specks, making the object and writing it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ctflow.core.model import Code, ModelSpec, NetworkSpec, Segment
from ctflow.core.volume import Geometry, LabelArray, Volume
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.source import sources_from_headers
from ctflow.dicom.write.structure_set import structure_set_from_labels
from ctflow.measurements.components import without_small
from ctflow.measurements.measure import split_findings
from ctflow.pipeline.structures import LEAST_ML

SHAPE, SPACING_MM = (300, 512, 512), (1.0, 0.7, 0.7)
MASS = Segment(1, "Mass", Code("49755003", "SCT", "Morphologically Abnormal Structure"), Code("4147007", "SCT", "Mass"))
SPEC = ModelSpec(
    name="drawn",
    version="1",
    network=NetworkSpec("UNet", {}),
    in_channels=1,
    out_channels=2,
    preprocessing=(),
    roi=(64, 64, 64),
    overlap=0.25,
    blend="constant",
    batch_size=1,
    activation="softmax",
    threshold=None,
    segments=(MASS,),
    intended_use="",
    demonstration=True,
)


def drawn() -> LabelArray:
    """100 balls of 4 to 14 mm, each with a hole."""
    rng, labels = np.random.default_rng(0), np.zeros(SHAPE, np.uint8)
    for index in range(100):
        centre = np.array([15 + 30 * (index % 10), 40 + 45 * (index // 10), 30 + 45 * (index * 7 % 10)])
        box = tuple(slice(max(at - 25, 0), at + 25) for at in centre.tolist())
        place = np.indices(labels[box].shape) + np.array([axis.start for axis in box])[:, None, None, None]
        apart = (place - centre[:, None, None, None]) * np.array(SPACING_MM)[:, None, None, None]
        distance, radius = np.linalg.norm(apart, axis=0), rng.uniform(4, 14)
        labels[box][(distance < radius) & (distance > radius / 3)] = 1
    return labels


def main() -> None:
    """Print the seconds of three runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        affine = np.diag([*SPACING_MM[::-1], 1.0])[:, [2, 1, 0, 3]]
        write_ct_series(Volume(np.zeros(SHAPE, np.int16), Geometry(SHAPE, affine)), folder / "ct")
        (candidate,) = select_series(scan_folder(folder / "ct"), force=True).selected
        loaded = assemble_series(candidate.series)
        sources = sources_from_headers([instance.header for instance in loaded.instances])
        labels, (*segments,) = split_findings(drawn(), (MASS,))
        spec = ModelSpec(**{**vars(SPEC), "segments": tuple(segments)})
        runs, of_cpu = [], []
        for _ in range(3):
            began, began_cpu = time.perf_counter(), time.process_time()
            large, _gone = without_small(labels, LEAST_ML / loaded.volume.geometry.voxel_ml)
            dataset = structure_set_from_labels(large, sources, spec, Provenance("0", "ab" * 32, {}))
            write_dataset(dataset, folder / "structures.dcm")
            runs.append(round(time.perf_counter() - began, 2))
            of_cpu.append(round(time.process_time() - began_cpu, 2))
        contours = sum(len(roi.get("ContourSequence", [])) for roi in dataset.ROIContourSequence)
        result = {"findings": len(segments), "contours": contours, "seconds": runs, "seconds_of_cpu": of_cpu}
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
