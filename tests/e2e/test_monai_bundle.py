"""MONAI's own commands work on the demonstration bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests_support import KEEPS_FREED_MEMORY

pytestmark = pytest.mark.e2e
BUNDLE = Path(__file__).parents[2] / "bundle"
CONFIGS = [
    "--config_file",
    str(BUNDLE / "configs" / "inference.json"),
    "--meta_file",
    str(BUNDLE / "configs" / "metadata.json"),
    "--bundle_root",
    str(BUNDLE),
]


def monai_bundle(*words: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "monai.bundle", *map(str, words), *CONFIGS]
    env = os.environ | KEEPS_FREED_MEMORY
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_run_writes_a_label_map_on_the_image_grid(tmp_path):
    rng = np.random.default_rng(1)
    image = rng.integers(-1000, 400, (40, 36, 12)).astype(np.int16)
    affine = np.diag([-1.5, -1.5, 2.5, 1.0])
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "in" / "ct.nii.gz")
    monai_bundle("run", "--dataset_dir", tmp_path / "in", "--output_dir", tmp_path / "out", cwd=tmp_path)
    (written,) = (tmp_path / "out").rglob("*.nii.gz")
    labels = nibabel.load(written)
    assert labels.shape == image.shape
    np.testing.assert_allclose(labels.affine, affine, atol=1e-6)
    assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1}


@pytest.mark.exhaustive
def test_verify_net_in_out_finds_what_the_metadata_says(tmp_path):
    said = monai_bundle("verify_net_in_out", "network_def", "--device", "cpu", cwd=tmp_path)
    assert "data shape of network is verified with no error" in said
