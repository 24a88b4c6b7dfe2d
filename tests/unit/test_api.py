"""The public API: what `import ctflow` costs, what its functions do, and that the examples of the documents run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ctflow
from ctflow.bundle import read_bundle
from ctflow.core.errors import SettingsInvalid
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import read_environment, settings_from_values
from dicom_support import write_volumes
from phantom_support import phantom_drawn_once
from reasons import raises_reason

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "monai", "pydicom", "highdicom", "numpy", "scipy", "holoscan", "rich", "click", "PIL", "pydantic")
DOCUMENTS = ("docs/api.md", "README.md")


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], check=True, capture_output=True, text=True)


def imported_by(code: str) -> set[str]:
    show = "import sys; before = set(sys.modules)\n{}\nprint(*sorted(set(sys.modules) - before))"
    return set(python(show.format(code)).stdout.split())


def test_the_import_costs_less_than_300_ms_and_loads_no_library():
    loaded = imported_by("import ctflow")
    assert "ctflow" in loaded
    assert not {name for name in loaded if name.partition(".")[0] in HEAVY}
    # Cumulative microseconds of the line that `-X importtime` prints for the package; the best of three.
    lines = [python("import ctflow", "-X", "importtime").stderr.splitlines() for _ in range(3)]
    costs = [int(line.split("|")[1]) for each in lines for line in each if line.endswith("| ctflow")]
    assert len(costs) == 3
    assert min(costs) < 300_000


def test_reading_a_series_needs_no_torch(series):
    loaded = imported_by(f"import ctflow; ctflow.read_series({str(series)!r})")
    assert "pydicom" in loaded
    assert not loaded & {"torch", "monai"}


def test_every_public_name_exists_and_is_documented():
    assert set(ctflow.__all__) <= set(dir(ctflow))
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in ctflow.__all__:
        assert getattr(ctflow, name).__doc__, name
        assert name == "CtflowError" or f"::: ctflow.{name}\n" in page
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ctflow.nothing  # noqa: B018


def test_a_series_is_read_into_hounsfield_units(series):
    volume = ctflow.read_series(series)
    assert (volume.array.shape, volume.array.dtype) == ((24, 96, 96), np.int16)
    assert np.array_equal(volume.array, phantom_drawn_once(5, (24, 96, 96)).volume.array)


def test_several_series_ask_for_one_of_them(series, tmp_path):
    shutil.copytree(series, tmp_path / "first")
    volume = phantom_drawn_once(6, (24, 96, 96)).volume
    written = write_ct_series(volume, tmp_path / "second", seed=6)
    assert written is not None
    with raises_reason(ctflow.errors.SettingsInvalid, "series-not-chosen", names="series_uid"):
        ctflow.read_series(tmp_path)
    import pydicom  # noqa: PLC0415

    uid = pydicom.dcmread(next((tmp_path / "second").iterdir()), stop_before_pixels=True).SeriesInstanceUID
    assert np.array_equal(ctflow.read_series(tmp_path, series_uid=uid).array, volume.array)


def test_warnings_of_a_series_are_logged(series, tmp_path, caplog):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(series.iterdir())[:8]:
        shutil.copy(path, few)
    with raises_reason(ctflow.errors.NoUsableSeries, "none-eligible"):
        ctflow.read_series(few)
    assert ctflow.read_series(few, force=True).array.shape == (8, 96, 96)
    assert any(record.name == "ctflow.api" for record in caplog.records)


def test_segment_marks_what_a_run_writes(series, coarse_bundle, tmp_path):
    told = []
    found = ctflow.segment(ctflow.read_series(series), coarse_bundle, progress=lambda stage, *_: told.append(stage))
    report = ctflow.run(series, tmp_path / "out", coarse_bundle, ctflow.Settings(engine="eager", nifti=True))
    (measured,) = report.document["series"][0]["segments"]
    assert int((found.labels == 1).sum()) == measured["voxels"] > 0
    assert "segment" in told
    model = ctflow.read_model(coarse_bundle)
    assert np.array_equal(ctflow.segment(ctflow.read_series(series), model).labels, found.labels)


def test_a_run_writes_the_same_bytes_as_the_pipeline(series, coarse_bundle, tmp_path):
    settings = settings_from_values({}, read_environment())
    ctflow.run(str(series), str(tmp_path / "api"), str(coarse_bundle))
    run_folder(series, tmp_path / "pipeline", read_bundle(coarse_bundle), settings)
    for name in ("segmentation.dcm", "measurements.dcm"):
        (one,), (other,) = ((tmp_path / which).glob(f"*/{name}") for which in ("api", "pipeline"))
        assert one.read_bytes() == other.read_bytes()


def test_a_model_that_cannot_be_read_stands_in_the_run_document(series, tmp_path):
    with raises_reason(ctflow.errors.BundleInvalid, "no-bundle"):
        ctflow.run(series, tmp_path / "out", tmp_path / "no_bundle")
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (document["status"], document["error"]["reason"]) == ("failed", "no-bundle")


def worked_examples() -> list[str]:
    return re.findall(r"```diff\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("diff", worked_examples(), ids=lambda diff: diff.splitlines()[0].removeprefix("--- a/"))
def test_the_worked_examples_of_contributing_apply_to_the_code(diff, tmp_path):
    for path in re.findall(r"^--- a/(.+)$", diff, re.MULTILINE):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / path, tmp_path / path)
    done = subprocess.run(
        ["git", "apply", "--unidiff-zero", "-"], cwd=tmp_path, input=diff, capture_output=True, text=True, check=False,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*.py"):
        compile(path.read_text(), path.name, "exec")


def examples(document: str) -> str:
    """The Python blocks of a document as one module, each line where the document has it."""
    lines = (REPOSITORY / document).read_text(encoding="utf-8").splitlines()
    kept, inside = [], False
    for line in lines:
        if line.startswith("```"):
            inside = bool(re.fullmatch(r"```python( .*)?", line))
            kept.append("")
        else:
            kept.append(line if inside else "")
    return "\n".join(kept)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_examples_of_the_documents_run(document, series, coarse_bundle, tmp_path, monkeypatch):
    code = examples(document)
    assert "ctflow" in code
    shutil.copytree(series, tmp_path / "ct")
    shutil.copytree(coarse_bundle, tmp_path / "my_bundle")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, document, "exec"), {"__name__": "example"})


def test_one_volume_of_a_series_is_read_by_what_tells_it_apart(tmp_path):
    truths = write_volumes(tmp_path, *({"NominalPercentageOfCardiacPhase": percent} for percent in (40, 75)))
    for volume, truth in (("phase=75", truths[1]), ("first", truths[0])):
        assert np.array_equal(ctflow.read_series(tmp_path, volume=volume).array, truth.array)
    with pytest.raises(SettingsInvalid, match="1: phase 40 %; 2: phase 75 %"):
        ctflow.read_series(tmp_path)
    with pytest.raises(SettingsInvalid, match="phase=50"):
        ctflow.read_series(tmp_path, volume="latest")
