"""Compare phantoms with a real chest CT: where the tissues' peaks lie, and how strong and how grainy the noise is.

    python benchmarks/phantom_realism.py SERIES_DIR [--seeds 1 2 3] [--shape 275,512,512]

The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.phantom import phantom_from_seed

PEAKS_HU = {"lung": (-950, -700), "fat": (-150, -60), "soft tissue": (10, 100)}


def describe(hu: np.ndarray) -> dict[str, float]:
    """Peaks of the histogram in the middle half of the slices, and noise inside even soft tissue and in air.

    Args:
        hu: (D, H, W) int16.
    """
    middle = hu[len(hu) // 4 : 3 * len(hu) // 4, 64:-64, 64:-64]
    found: dict[str, float] = {}
    for name, (low, high) in PEAKS_HU.items():
        counts = np.bincount((middle[(middle >= low) & (middle < high)] - low).astype(int), minlength=high - low)
        found[f"{name} peak HU"] = float(low + ndimage.gaussian_filter1d(counts.astype(float), 6).argmax())
    slices = middle[::12].astype(np.float32)
    even = ndimage.uniform_filter(slices, (0, 9, 9))
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(slices**2, (0, 9, 9)) - even**2, 0))
    inside = (even > 25) & (even < 75) & (deviation < 60)
    found["noise in soft tissue HU"] = float(np.median(deviation[inside]))
    residual = slices - even
    beside = inside[:, :, 1:] & inside[:, :, :-1]
    found["correlation of neighbours"] = float(
        np.corrcoef(residual[:, :, 1:][beside], residual[:, :, :-1][beside])[0, 1]
    )
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("series", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shape", default="300,512,512")
    words = parser.parse_args()
    (candidate,) = select_series(scan_folder(words.series)).selected
    rows = {"real": describe(assemble_series(candidate.series).volume.array)}
    seconds = []
    for seed in words.seeds:
        start = time.perf_counter()
        phantom = phantom_from_seed(seed, tuple(map(int, words.shape.split(","))))
        seconds.append(round(time.perf_counter() - start, 1))
        rows[f"phantom {seed}"] = describe(phantom.volume.array)
    for name, row in rows.items():
        sys.stdout.write(f"{name:<12}{'  '.join(f'{key} {value:g}' for key, value in row.items())}\n")
    sys.stdout.write(json.dumps({"shape": words.shape, "seconds_a_phantom": seconds, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
