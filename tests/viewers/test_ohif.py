"""OHIF itself in a browser, with Orthanc: SEG and SR of every geometry, voxel for voxel and number for number.

`make test` opens three studies in the newest version, `make test-all` each geometry, and `make test-viewers` everything
in every version.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from browser_support import CHROMIUM
from needs import skip_without
from orthanc_support import DICOMWEB, environment_alone, needs_orthanc
from viewer_record import agrees_with_record
from viewer_support import FORMS, SERIES, forms_of, labels_on_images, objects_of, outcome_of, write_series

pytestmark = pytest.mark.e2e
HERE = Path(__file__).parent
VERSIONS = ("3.13.2", "3.12.10", "3.11.1")
SHORT = {("plain", "binary"), ("odd-sized", "labelmap"), ("feet first", "nothing")}
USUAL = ("binary", "labelmap")
EVERYWHERE = (*USUAL, "binary, every frame", "binary, resampled", "labelmap, resampled")


class Session:
    """OHIF of one version; see `ohif_session.py`."""

    def __init__(self, version: str, work: Path) -> None:
        command = ["unshare", "-n", sys.executable, HERE.parent / "ohif_session.py", HERE / "ohif" / version, work]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment_alone()
        )

    def look_at(self, study: Path) -> dict:
        self._process.stdin.write(f"{study}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the session ended"
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Version -> its session, which starts when it is first asked for."""
    if CHROMIUM is None:
        skip_without("Chromium")
    needs_orthanc(DICOMWEB)
    opened: dict[str, Session] = {}

    def session(version: str) -> Session:
        if not (HERE / "ohif" / version).is_dir():
            skip_without("OHIF")
        if version not in opened:
            opened[version] = Session(version, tmp_path_factory.mktemp(f"ohif-{version}"))
        return opened[version]

    yield session
    for each in opened.values():
        each.close()


@pytest.fixture(scope="module")
def study_of(tmp_path_factory):
    """(Series, form) -> folder with the CT in `ct` and its results in `out`, made once."""
    made: dict[tuple[str, str], Path] = {}

    def study(series: str, form: str) -> Path:
        if (series, form) not in made:
            folder = tmp_path_factory.mktemp("study") / f"{series} {form}".replace(" ", "-").replace(",", "")
            ct = write_series(series, folder / "ct", seed=len(made))  # a study of its own in Orthanc
            objects_of(ct, folder / "out", nothing=form == "nothing", **FORMS.get(form, {}))
            made[series, form] = folder
        return made[series, form]

    return study


def is_tried(series: str, form: str) -> bool:
    if form == "nothing":
        return series == "feet first"
    return form in EVERYWHERE or series in ("plain", "odd-sized")


def cases():
    for version in VERSIONS:
        pairs = [(series, form) for series in SERIES for form in (*forms_of(series), "nothing")]
        for series, form in pairs:
            if not is_tried(series, form):
                continue
            if version != VERSIONS[0] or (form not in USUAL and (series, form) not in SHORT):
                marks = [pytest.mark.viewers]
            else:
                marks = [] if (series, form) in SHORT else [pytest.mark.exhaustive]
            yield pytest.param(version, series, form, marks=marks)


@pytest.mark.parametrize(("version", "series", "form"), list(cases()))
def test_ohif_shows_what_the_record_says(sessions, study_of, version, series, form):
    session, study = sessions(version), study_of(series, form)
    found = session.look_at(study)
    (seg,), (sr,) = study.rglob("segmentation.dcm"), study.rglob("measurements.dcm")
    if form == "nothing":
        assert "The algorithm marked nothing, which does not exclude disease." in found["report"]["text"]
        agrees_with_record(f"OHIF {version}", "report without findings", series, "right")
        return
    outcome = outcome_of_page(found, labels_on_images(seg, study / "ct"))
    agrees_with_record(f"OHIF {version}", form, series, outcome)
    if form in USUAL:
        agrees_with_record(f"OHIF {version}", "report", series, outcome_of_report(found, pydicom.dcmread(sr)))


def outcome_of_page(found, truth) -> str:
    segmentation = found["segmentation"]
    if "error" in segmentation:
        assert segmentation["error"] == "never finishes"
        return "does not load"
    if segmentation["labels"].keys() != truth.keys():
        return "wrong"
    labels = {uid: np.frombuffer(base64.b64decode(text), np.uint8) for uid, text in segmentation["labels"].items()}
    return outcome_of({uid: each.reshape(truth[uid].shape) for uid, each in labels.items()}, truth)


def outcome_of_report(found, report) -> str:
    """ "right": each finding has its own words and numbers, on the CT, and is a point of the list in its place."""
    shown, listed = found["report"]["measurements"], found["report"]["listed"]
    expected = [numbers_and_place(group) for group in groups_of(report)]
    labels = [(dict(each["labels"]), each["shown"]) for each in shown]
    assert all(len(words) >= len(numbers) for (words, _), (numbers, _, _) in zip(labels, expected, strict=True))
    for (words, on), (numbers, _, _) in zip(labels, expected, strict=True):
        if on != "CT" or any(words.get(name, "none") != text for name, text in numbers.items()):
            return "wrong"
    comments = [comment for _, _, comment in expected]
    loaded = [each for each in listed if each["label"] in comments]
    if [each["label"] for each in loaded] != comments:
        return "not in the list"
    places = np.array([each["points"][0] for each in loaded])
    if not np.allclose(places, [place for _, place, _ in expected], atol=1e-3):
        return "wrong"
    return "right" if len(loaded) == len(listed) else "right, and in the list a second time by volume alone"


def groups_of(report):
    (measurements,) = (
        item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurements"
    )
    return measurements.ContentSequence


def numbers_and_place(group):
    """(Text of each number by its name, centre, comment) as OHIF writes them."""
    numbers = {}
    for item in group.ContentSequence:
        name = item.ConceptNameCodeSequence[0].CodeMeaning
        if item.ValueType == "NUM":
            (value,) = item.MeasuredValueSequence
            number = float(value.NumericValue)
            text = f"{number:.2f}" if number else ""
            assert name not in numbers, "two numbers of a finding have one name"
            numbers[name] = f"{text} {value.MeasurementUnitsCodeSequence[0].CodeValue}"
        elif item.ValueType == "SCOORD3D":
            place = [float(mm) for mm in item.GraphicData]
        elif name == "Comment":
            comment = item.TextValue
    return numbers, place, comment
