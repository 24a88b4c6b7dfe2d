from __future__ import annotations

import pytest

from ctflow.bundle.metadata import TISSUE, metadata_from_document
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Code, Segment
from reasons import raises_reason

CODED = {
    "channel": 1,
    "label": "Liver mass",
    "category": {"value": "49755003", "scheme": "SCT", "meaning": "Morphologically Abnormal Structure"},
    "type": {"value": "108369006", "scheme": "SCT", "meaning": "Neoplasm"},
}


def document(channels, **more):
    names = {str(i): name for i, name in enumerate(channels)}
    return {"version": "1.0", "network_data_format": {"outputs": {"pred": {"channel_def": names}}}, **more}


def read(value, channels=3, activation="softmax"):
    return metadata_from_document(value, "folder", channels, has_background=activation == "softmax")


def test_channels_without_codes_are_tissue_and_noted():
    about = read(document(["background", "a", "b"]))
    assert about.segments == (Segment(1, "a", TISSUE, TISSUE, (), False), Segment(2, "b", TISSUE, TISSUE, (), False))
    assert (about.name, about.version, about.intended_use) == ("folder", "1.0", "")
    assert (about.demonstration, about.body_parts) == (False, ())
    assert about.notes == (
        "metadata.json has no codes for a, b; their segments are coded as tissue",
        "metadata.json states no intended_use",
    )


def test_a_hundred_channels_without_codes_are_one_note():
    note, _ = read(document([f"s{number}" for number in range(105)]), 105).notes
    assert note == "metadata.json has no codes for s1, s2, s3, s4, s5 and 99 others; their segments are coded as tissue"


def test_codes_of_the_bundle_are_taken():
    lung = {"value": "39607008", "scheme": "SCT", "meaning": "Lung"}
    about = read(
        document(
            ["background", "a", "b"],
            name="n",
            intended_use="research",
            demonstration=True,
            body_parts=["chest"],
            segments=[{**CODED, "anatomy": [lung]}, {key: CODED[key] for key in ("category", "type")} | {"channel": 2}],
        )
    )
    category, kind = Code(**CODED["category"]), Code(**CODED["type"])
    assert about.segments == (
        Segment(1, "Liver mass", category, kind, (Code(**lung),)),
        Segment(2, "b", category, kind),
    )
    assert (about.name, about.intended_use, about.demonstration) == ("n", "research", True)
    assert (about.body_parts, about.notes) == (("CHEST",), ())


def test_one_sigmoid_channel_is_label_1():
    about = read(document(["tumour"], segments=[{**CODED, "channel": 0}]), 1, "sigmoid")
    (segment,) = about.segments
    assert (segment.number, segment.label, segment.coded) == (1, "Liver mass", True)


@pytest.mark.parametrize(
    ("given", "hu_range"), [([-700, 300], (-700.0, 300.0)), ([-0.5, 1e4], (-0.5, 1e4)), (None, None)]
)
def test_a_segment_has_the_range_of_the_bundle(given, hu_range):
    (segment, _) = read(document(["background", "a", "b"], segments=[{**CODED, "hu_range": given}])).segments
    assert segment.hu_range == hu_range


@pytest.mark.parametrize(("given", "colour"), [("#d62728", (214, 39, 40)), ("#FFFFFF", (255, 255, 255)), (None, None)])
def test_a_segment_has_the_colour_of_the_bundle(given, colour):
    (segment, _) = read(document(["background", "a", "b"], segments=[{**CODED, "colour": given}])).segments
    assert segment.colour == colour


THREE = ["background", "a", "b"]
CHANNEL_DEF = "network_data_format#outputs#pred#channel_def"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (document(["background", "a"]), CHANNEL_DEF),
        (document([*THREE, "c"]), CHANNEL_DEF),
        (document(["background", "", "b"]), f"{CHANNEL_DEF}#1"),
        (document(["background", "a\nb", "b"]), f"{CHANNEL_DEF}#1"),
        (document(["background", "a\\b", "b"]), f"{CHANNEL_DEF}#1"),
        (document(["background", "x" * 65, "b"]), f"{CHANNEL_DEF}#1"),
        (document(["background", 3, "b"]), f"{CHANNEL_DEF}#1"),
        ({"version": "1"}, "network_data_format"),
        ({"version": "1", "network_data_format": {"outputs": []}}, "network_data_format#outputs"),
        ({"version": "1", "network_data_format": {"outputs": {}}}, "network_data_format#outputs#pred"),
        ({key: value for key, value in document(THREE).items() if key != "version"}, "version"),
        (document(THREE, version=1.0), "version"),
        (document(THREE, name="\ud800"), "name"),
        (document(THREE, intended_use="\ud800"), "intended_use"),
        (document(THREE, intended_use=["x"]), "intended_use"),
        (document(THREE, demonstration="true"), "demonstration"),
        (document(THREE, demonstration=None), "demonstration"),
        (document(THREE, body_parts="CHEST"), "body_parts"),
        (document(THREE, body_parts=["CHEST", 3]), "body_parts#1"),
        (document(THREE, body_parts=["a-b"]), "body_parts#0"),
        (document(THREE, segments={}), "segments"),
        (document(THREE, segments=[3]), "segments#0"),
        (document(THREE, segments=[{**CODED, "channel": 0}]), "segments#0#channel"),
        (document(THREE, segments=[{**CODED, "channel": True}]), "segments#0#channel"),
        (document(THREE, segments=[CODED, CODED]), "segments#1#channel"),
        (document(THREE, segments=[{"channel": 1}]), "segments#0#category"),
        (document(THREE, segments=[{**CODED, "type": "Neoplasm"}]), "segments#0#type"),
        (document(THREE, segments=[{**CODED, "type": {"value": "1" * 17}}]), "segments#0#type#value"),
        (document(THREE, segments=[{**CODED, "type": {"value": "1", "scheme": "SCT"}}]), "segments#0#type#meaning"),
        *(
            (document(THREE, segments=[{**CODED, "hu_range": wrong}]), "segments#0#hu_range")
            for wrong in (
                "-700..300",
                [300, -700],
                [0, 0],
                [1],
                [1, 2, 3],
                [True, 2],
                ["1", "2"],
                [0, float("nan")],
                [0, float("inf")],
                [0, 10**400],
                {"low": 0, "high": 1},
            )
        ),
        (document(THREE, segments=[{**CODED, "colour": "red"}]), "segments#0#colour"),
        (document(THREE, segments=[{**CODED, "colour": "#d6272"}]), "segments#0#colour"),
        (document(THREE, segments=[{**CODED, "colour": [214, 39, 40]}]), "segments#0#colour"),
        (document(THREE, segments=[{**CODED, "anatomy": {}}]), "segments#0#anatomy"),
        (document(THREE, segments=[{**CODED, "anatomy": [{}]}]), "segments#0#anatomy#0#value"),
    ],
)
def test_what_is_missing_or_wrong_is_named(value, key):
    with raises_reason(BundleInvalid, "metadata") as caught:
        read(value)
    assert f"configs/metadata.json: {key} " in str(caught.value)
