from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ctflow.core.errors import SettingsInvalid
from ctflow.settings.run import (
    OPTIONS,
    Paths,
    Settings,
    model_path_from_value,
    paths_from_values,
    read_environment,
    settings_from_values,
)
from reasons import raises_reason


def chosen(**values) -> Settings:
    """As a user without a home folder would have it."""
    return Settings(**{"cache": None, **values})


def test_nothing_given_gives_the_defaults():
    assert settings_from_values({}, {}) == chosen()


def test_settings_made_in_python_have_the_users_cache_as_those_of_the_command_line(monkeypatch):
    assert Settings() == settings_from_values({}, {"CTFLOW_CACHE": os.environ["CTFLOW_CACHE"]})
    monkeypatch.setenv("CTFLOW_CACHE", "/c")
    assert Settings().cache == Path("/c")
    monkeypatch.delenv("CTFLOW_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/a")
    assert Settings().cache == Path("/home/a/.cache/ctflow")


def test_what_does_not_go_together_is_refused_in_python_alike():
    with raises_reason(SettingsInvalid, "conflict", names="finding"):
        Settings(seg="fractional", segments="finding")
    with raises_reason(SettingsInvalid, "conflict", names=("finding", "--seg")):
        settings_from_values({"seg": "fractional"}, {"CTFLOW_SEGMENTS": "finding"})


@pytest.mark.parametrize(
    "wrong",
    [{"seg": "bits"}, {"roi": "Body"}, {"report": None}, {"precision": "fp4"}, {"overlap": 1.0}, {"cache": "str"}],
)
def test_a_value_that_python_would_let_pass_is_refused(wrong):
    (name,) = wrong
    with raises_reason(SettingsInvalid, "invalid-value", names=name):
        Settings(**wrong)


def test_the_part_of_the_volume_is_chosen_by_flag_and_variable():
    assert settings_from_values({"roi": "body"}, {}) == chosen(roi="body")
    assert settings_from_values({}, {"CTFLOW_ROI": "body"}).roi == "body"
    assert settings_from_values({"roi": "none"}, {"CTFLOW_ROI": "body"}).roi == "none"


def test_padding_is_background_unless_the_network_is_asked():
    assert settings_from_values({}, {}).constant_windows == "background"
    assert settings_from_values({"constant_windows": "compute"}, {}).constant_windows == "compute"
    assert settings_from_values({}, {"CTFLOW_CONSTANT_WINDOWS": "compute"}).constant_windows == "compute"
    with raises_reason(SettingsInvalid, "invalid-value", names="CTFLOW_CONSTANT_WINDOWS"):
        settings_from_values({}, {"CTFLOW_CONSTANT_WINDOWS": "skip"})


def test_a_flag_wins_over_the_environment():
    settings = settings_from_values({"overlap": "0.5"}, {"CTFLOW_OVERLAP": "0.25", "CTFLOW_DEVICE": "cpu"})
    assert settings == chosen(overlap=0.5, device="cpu")


def test_what_is_written_can_be_chosen():
    of_files = {option.flag for option in OPTIONS if option.key.of_files}
    of_seg = {"--for", "--seg", "--seg-grid", "--segments", "--omit-empty-frames"}
    others = {"--report", "--secondary-capture", "--pdf", "--rtstruct", "--rtstruct-holes", "--nifti"}
    assert of_files == {*others, *of_seg}
    assert settings_from_values({"report": "none", "secondary_capture": True, "pdf": True}, {}) == chosen(
        report="none", secondary_capture=True, pdf=True
    )
    assert settings_from_values({}, {"CTFLOW_RTSTRUCT": "yes", "CTFLOW_PDF": "1"}) == chosen(rtstruct=True, pdf=True)
    assert settings_from_values({}, {"CTFLOW_REPORT": "none"}).report == "none"


def test_switches_come_from_both():
    assert settings_from_values({"force": True}, {}).force
    assert settings_from_values({"allow_gaps": True}, {}).allow_gaps
    assert settings_from_values({}, {"CTFLOW_ALLOW_GAPS": "yes"}).allow_gaps
    assert settings_from_values({"force": False}, {"CTFLOW_FORCE": "yes"}).force
    assert not settings_from_values({"force": False}, {"CTFLOW_FORCE": "0"}).force


def test_an_empty_variable_is_as_none():
    empty = {option.variable: "" for option in OPTIONS}
    assert settings_from_values({}, {"HOME": "/home/a", **empty}) == chosen()
    with raises_reason(SettingsInvalid, "invalid-value", names="--omit-empty-frames"):
        settings_from_values({"omit_empty_frames": ""}, {})


@pytest.mark.parametrize("home", ["/home/a\nb", "/home/\udcff", "/home/" + "a" * 500])
def test_a_home_folder_of_any_name_has_the_cache(home, monkeypatch):
    assert settings_from_values({}, {"HOME": home}).cache == Path(home, ".cache/ctflow")
    monkeypatch.delenv("CTFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert Settings().cache == Path(home, "ctflow")


@pytest.mark.parametrize(
    ("values", "environment", "where"),
    [
        ({"overlap": "1"}, {}, "--overlap"),
        ({"overlap": "-0.1"}, {}, "--overlap"),
        ({"overlap": "nan"}, {}, "--overlap"),
        ({"overlap": "much"}, {}, "--overlap"),
        ({"overlap": "0_5"}, {}, "--overlap"),
        ({"overlap": "\u0660.\u0665"}, {}, "--overlap"),
        ({}, {"CTFLOW_OVERLAP": "x"}, "CTFLOW_OVERLAP"),
        ({"pick": "some"}, {}, "--pick"),
        ({"precision": "int8"}, {}, "--precision"),
        ({"device": "tpu"}, {}, "--device"),
        ({"device": "cuda:"}, {}, "--device"),
        ({"device": "cuda:0,1,0"}, {}, "names a GPU twice"),
        ({"device": "cuda:1,01"}, {}, "--device"),
        ({"device": "cuda:0,"}, {}, "--device"),
        ({"device": "cuda:0,cuda:1"}, {}, "--device"),
        ({"device": "cuda,1"}, {}, "--device"),
        ({"device": "cpu:0,1"}, {}, "--device"),
        ({"roi": "lung"}, {}, "--roi"),
        ({"series": " "}, {}, "--series"),
        ({}, {"CTFLOW_FORCE": "perhaps"}, "CTFLOW_FORCE"),
        ({"report": "pdf"}, {}, "--report"),
        ({}, {"CTFLOW_SECONDARY_CAPTURE": "perhaps"}, "CTFLOW_SECONDARY_CAPTURE"),
        ({"seg": "bits"}, {}, "--seg: invalid choice 'bits' (choose from binary, labelmap, fractional)"),
        ({"device": "gpu"}, {}, "do you mean cuda?"),
        ({"device": "gpu:0"}, {}, "do you mean cuda?"),
        ({"segments": "tumour"}, {}, "--segments"),
        ({"omit_empty_frames": "maybe"}, {}, "--omit-empty-frames"),
        ({}, {"CTFLOW_OMIT_EMPTY_FRAMES": "maybe"}, "CTFLOW_OMIT_EMPTY_FRAMES"),
    ],
)
def test_a_wrong_value_names_its_flag_or_variable(values, environment, where):
    with raises_reason(SettingsInvalid, "invalid-value", names=where):
        settings_from_values(values, environment)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:12", "cuda:0,1", "cuda:3,0,2"])
def test_devices_are_accepted(device):
    assert settings_from_values({"device": device}, {}).device == device


def test_every_option_has_a_field():
    assert {option.name for option in OPTIONS} == {field.name for field in fields(Settings)}


def test_the_documents_name_every_flag_variable_key_default_and_meaning():
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [
        tuple(row)
        for row in re.findall(r"^\| `(--.*?)` \| `(.*?)` \| `(\w+)` \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    ]
    assert [(flag.split(" ")[0], variable, default, meaning) for flag, variable, _, default, meaning in rows] == [
        (option.flag, option.variable, option.default, option.key.meaning) for option in OPTIONS
    ]
    assert {flag.partition(" ")[2].replace("\\|", "|") for flag, *_ in rows} == {option.metavar for option in OPTIONS}
    others = {"series": "rules", "pick": "rules", "force": "rules", "device": "devices"}
    assert [key for _, _, key, *_ in rows] == [others.get(option.name, option.name) for option in OPTIONS]


def test_what_is_written_is_chosen_by_flags_and_variables():
    given = {"seg": "labelmap", "segments": "finding", "omit_empty_frames": "no", "nifti": True}
    expected = chosen(seg="labelmap", segments="finding", omit_empty_frames=False, nifti=True)
    assert settings_from_values(given, {}) == expected
    variables = {"CTFLOW_SEG": "labelmap", "CTFLOW_SEGMENTS": "finding", "CTFLOW_NIFTI": "1"}
    assert settings_from_values({}, {**variables, "CTFLOW_OMIT_EMPTY_FRAMES": "false"}) == expected


FOR_SLICER = {"seg_grid": "resampled"}
FOR_OHIF = {"seg": "labelmap"}


@pytest.mark.parametrize(
    ("typed", "variables", "expected"),
    [
        ({"viewer": "ohif"}, {}, FOR_OHIF),
        ({"viewer": "slicer"}, {}, FOR_SLICER),
        ({"viewer": "pacs"}, {}, {}),
        ({}, {"CTFLOW_FOR": "ohif"}, FOR_OHIF),
        ({"viewer": "ohif", "seg": "binary"}, {}, {}),
        ({"viewer": "ohif", "segments": "finding"}, {}, {**FOR_OHIF, "segments": "finding"}),
        ({"viewer": "ohif"}, {"CTFLOW_SEG": "binary"}, FOR_OHIF),
        ({"seg": "binary"}, {"CTFLOW_FOR": "ohif"}, {}),
        ({}, {"CTFLOW_FOR": "ohif", "CTFLOW_SEG": "fractional"}, {"seg": "fractional"}),
        ({"viewer": "slicer"}, {"CTFLOW_FOR": "ohif"}, FOR_SLICER),
    ],
)
def test_a_viewer_chooses_what_is_not_said_beside_or_above_it(typed, variables, expected):
    assert settings_from_values(typed, variables) == chosen(**expected)


@pytest.mark.parametrize("given", [({"viewer": "weasis"}, {}), ({}, {"CTFLOW_FOR": "weasis"})])
def test_an_unknown_viewer_is_refused(given):
    with raises_reason(SettingsInvalid, "invalid-value", names=("ohif, slicer, pacs", "weasis")):
        settings_from_values(*given)


def test_a_viewer_chooses_in_python_what_is_left_at_its_default():
    assert Settings(viewer="ohif", cache=None) == Settings(seg="labelmap", cache=None)
    assert replace(Settings(viewer="ohif", cache=None), seg="binary") == Settings(cache=None)


def test_paths_come_from_flags_then_from_the_map_variables():
    environment = {"HOLOSCAN_INPUT_PATH": "/a", "HOLOSCAN_OUTPUT_PATH": "/b", "HOLOSCAN_MODEL_PATH": "/c"}
    assert paths_from_values({}, environment) == Paths(Path("/a"), Path("/b"), Path("/c"))
    assert paths_from_values({"input": "x", "model": None}, environment).input == Path("x")
    assert paths_from_values({"input": "x", "output": "y"}, {}).model is None


@pytest.mark.parametrize("missing", ["input", "output"])
def test_a_missing_folder_is_named(missing):
    values = {"input": "x", "output": "y"}
    del values[missing]
    with raises_reason(SettingsInvalid, "missing-folder", names=f"HOLOSCAN_{missing.upper()}_PATH"):
        paths_from_values(values, {})


def test_the_environment_is_a_copy(monkeypatch):
    monkeypatch.setenv("CTFLOW_ENGINE", "eager")
    assert read_environment()["CTFLOW_ENGINE"] == "eager"


@pytest.mark.parametrize(
    ("given", "environment", "cache"),
    [
        (None, {}, None),
        (None, {"HOME": "/home/a"}, "/home/a/.cache/ctflow"),
        (None, {"HOME": "/home/a", "XDG_CACHE_HOME": "/x"}, "/x/ctflow"),
        (None, {"HOME": "/home/a", "CTFLOW_CACHE": "/c"}, "/c"),
        ("/typed", {"CTFLOW_CACHE": "/c"}, "/typed"),
        (None, {"HOME": "/home/a", "CTFLOW_CACHE": ""}, None),
    ],
)
def test_the_cache_is_the_users_unless_another_or_none_is_named(given, environment, cache):
    found = settings_from_values({"cache": given}, environment).cache
    assert found == (Path(cache) if cache else None)


def test_the_bundle_may_come_from_the_environment():
    assert model_path_from_value(None, {}) is None
    assert model_path_from_value(None, {"HOLOSCAN_MODEL_PATH": "/m"}) == "/m"
    assert model_path_from_value("b", {"HOLOSCAN_MODEL_PATH": "/m"}) == "b"
