from __future__ import annotations

import pytest

from ctflow.dicom.body_parts import known_value, parts_of_value, suits

CHEST_ABDOMEN_PELVIS = "CHEST ABDOMEN PELVIS"


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("CHEST", "CHEST"),
        ("chest", "CHEST"),
        ("LUNG", "CHEST"),
        ("THORAX", "CHEST"),
        ("TORAX", "CHEST"),
        ("CHEST PE", "CHEST"),
        ("CT CHEST WO CON", "CHEST"),
        ("CHESTABDOMEN", "CHEST ABDOMEN"),
        ("CHEST_ABDOMEN", "CHEST ABDOMEN"),
        ("CHEST/ABD", "CHEST ABDOMEN"),
        ("THORAXABD", "CHEST ABDOMEN"),
        ("CHESTABDPELVIS", CHEST_ABDOMEN_PELVIS),
        ("CHEST_TO_PELVIS", CHEST_ABDOMEN_PELVIS),
        ("CHEST TO PEL", CHEST_ABDOMEN_PELVIS),
        ("CHEST ABD PELVI", CHEST_ABDOMEN_PELVIS),
        ("CH_AB_PEL", CHEST_ABDOMEN_PELVIS),
        ("CHSTABDPELV", CHEST_ABDOMEN_PELVIS),
        ("CHABDPELV", CHEST_ABDOMEN_PELVIS),
        ("CAP", CHEST_ABDOMEN_PELVIS),
        ("C/A/P", CHEST_ABDOMEN_PELVIS),
        ("C_A_P", CHEST_ABDOMEN_PELVIS),
        ("CAP W", CHEST_ABDOMEN_PELVIS),
        ("TORSO", CHEST_ABDOMEN_PELVIS),
        ("NECKCHESTABDPELV", f"NECK {CHEST_ABDOMEN_PELVIS}"),
        ("NECK TO PELVIS", f"NECK {CHEST_ABDOMEN_PELVIS}"),
        ("WHOLE BODY", f"HEAD NECK {CHEST_ABDOMEN_PELVIS}"),
        ("ABDOMENPELVIS", "ABDOMEN PELVIS"),
        ("HEAD-NECK", "HEAD NECK"),
        ("HEART", "HEART"),
        ("TSPINE", "TSPINE"),
        ("", ""),
        ("CT", ""),
        ("MÜLLER^HANS", ""),
        ("CHEST MILLER", ""),
        ("CHESTER", ""),
        ("19500101", ""),
    ],
)
def test_a_value_names_parts(value, parts):
    assert parts_of_value(value) == frozenset(parts.split())
    assert (known_value(value) is None) == (not parts)


@pytest.mark.parametrize(
    ("value", "wanted", "fits"),
    [
        ("CHEST_TO_PELVIS", ["CHEST"], True),
        ("LUNG", ["CHEST"], True),
        ("CHEST", ["LUNG"], True),
        ("CHEST", ["CHESTABDPELVIS"], False),
        ("ABDOMEN", ["CHEST", "THORAX"], False),
        ("TSPINE", ["CHEST"], False),
        ("HEART", ["CHEST"], False),
        ("HEART", ["CHEST", "HEART"], True),
        ("our word", ["OUR WORD"], True),
        ("our word", ["CHEST"], False),
        ("CHEST", ["their word"], False),
    ],
)
def test_a_series_suits_a_model_that_wants_no_more_than_it_shows(value, wanted, fits):
    assert suits(value, wanted) == fits
