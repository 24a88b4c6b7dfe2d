"""The codes of the usual anatomy, checked against pydicom's dictionary of DICOM PS3.16."""

from __future__ import annotations

import pytest
from pydicom.sr._concepts_dict import concepts

from ctflow.bundle.nnunet.anatomy import _table, meaning_of

KNOWN = {code: meaning for words in concepts["SCT"].values() for code, (meaning, _) in words.items()}


def _names(text):
    return text.split()


# All of TotalSegmentator 2's 117 structures.
SIDED = _names(
    "kidney adrenal_gland lung_upper_lobe lung_lower_lobe kidney_cyst iliac_artery iliac_vena humerus scapula "
    "clavicula femur hip gluteus_maximus gluteus_medius gluteus_minimus autochthon iliopsoas subclavian_artery "
    "common_carotid_artery brachiocephalic_vein"
)
WHOLE = _names(
    "spleen gallbladder liver stomach pancreas lung_middle_lobe_right esophagus trachea thyroid_gland small_bowel "
    "duodenum colon urinary_bladder prostate sacrum vertebrae_S1 heart aorta pulmonary_vein brachiocephalic_trunk "
    "atrial_appendage_left superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein spinal_cord brain skull "
    "sternum costal_cartilages"
)
VERTEBRAE = [f"vertebrae_{name}{n}" for name, count in (("C", 7), ("T", 12), ("L", 5)) for n in range(1, count + 1)]
RIBS = [f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)]
STRUCTURES = [
    *(f"{name}_{side}" for name in SIDED for side in ("left", "right")),
    *WHOLE, *VERTEBRAE, *RIBS,
]  # fmt: skip


def test_there_are_117():
    assert len(STRUCTURES) == len(set(STRUCTURES)) == 117


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_of_totalsegmentator_has_codes(name):
    found = meaning_of(name)
    assert found is not None
    assert found.category.meaning in {"Anatomical Structure", "Morphologically Abnormal Structure"}
    says_side = any(side in found.type.meaning.lower() for side in ("left", "right"))
    assert (found.side is not None or says_side) == any(side in name for side in ("left", "right"))


def test_codes_that_dicom_knows_mean_the_same_there():
    checked = 0
    for name, row in _table().items():
        for code, meaning in ((row["type"], row["meaning"]), (row["region"], row["region_meaning"])):
            if code in KNOWN and meaning not in OTHER_WORDS:
                words = {word[:4] for word in meaning.lower().replace(",", "").split() if word not in {"of", "and"}}
                theirs = KNOWN[code].lower()
                assert all(word in theirs for word in words), (name, code, meaning, KNOWN[code])
                checked += 1
    assert checked > 150


# The same concept in other words than pydicom's.
OTHER_WORDS = {
    "Adrenal gland", "Thyroid gland", "Left ventricle of heart", "Right ventricle of heart", "Pulmonary vein",
    "Tarsal bones", "Metacarpal bones", "Blood vessel", "Pleural membrane", "Neoplasm", "Cervical spine",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "meaning", "side", "region"),
    [
        ("Lung Tumour", "Neoplasm", None, "Lung"),
        ("lung_nodule", "Nodule", None, "Lung"),
        ("nodules", "Nodule", None, None),
        ("Left Kidney", "Kidney", "Left", None),
        ("kidney_R", "Kidney", "Right", None),
        ("R lung", "Lung", "Right", None),
        ("lungs", "Lung", None, None),
        ("left-atrium", "Left atrium", None, None),
        ("rib left 7", "Seventh rib", "Left", None),
        ("hepatic cyst", "Cyst", None, "Liver"),
        ("subclavian_artery_left", "Subclavian artery", "Left", None),
    ],
)
def test_names_as_people_write_them(name, meaning, side, region):
    found = meaning_of(name)
    assert found.type.meaning == meaning
    assert (found.side and found.side.meaning) == side
    assert (found.region and found.region.meaning) == region


@pytest.mark.parametrize("name", ["", "gizmo", "left", "class_1", "kidney left right", "l", "_"])
def test_other_names_have_none(name):
    assert meaning_of(name) is None
