"""Orthanc's DICOMweb plugin as sender and as destination, in a network namespace (see `test_orthanc.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from needs import skip_without

pytestmark = pytest.mark.e2e
HERE = Path(__file__).parent
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")  # of Debian's orthanc-dicomweb


def test_orthanc_sends_and_receives_by_stow(tmp_path):
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if any(shutil.which(name, path=path) is None for name in ("Orthanc", "unshare", "ip")) or not PLUGIN.is_file():
        skip_without("Orthanc")
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        skip_without("namespaces of its own")
    done = subprocess.run(
        ["unshare", "-n", sys.executable, HERE / "orthanc_dicomweb.py", tmp_path],
        capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["received"] == [5, "orthanc"]
    assert found["said"] == ["", ""], "the same object twice is the same"
    assert found["in_orthanc"] == 6
    assert found["denied"] == "access-denied"
