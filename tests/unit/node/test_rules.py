from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle_support import small_unet_bundle
from ctflow.cli.main import main
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.node.rules import Asking, Facts, Range, Rule, decide, facts_from_series, verdicts_of_scan
from dicom_support import setter, small_volume

CHEST = Facts("CT", frozenset({"CHEST"}), 1.25, "Lung 1.25 B60f", "SCANNER1")


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({}, True),
        ({"modality": ("ct",)}, True),
        ({"modality": ("MR", "PT")}, False),
        ({"body_part": ("chest", "LUNG")}, True),
        ({"body_part": ("HEAD",)}, False),
        ({"body_part": ("absent",)}, False),
        ({"thickness_mm": Range(1.25, 1.25)}, True),
        ({"thickness_mm": Range(max=1)}, False),
        ({"thickness_mm": Range(min=2)}, False),
        ({"description": ("*LUNG*",)}, True),
        ({"description": ("x", "lung ?.25*")}, True),
        ({"description": ("lung",)}, False),
        ({"calling_ae": ("SCANNER1", "SCANNER2")}, True),
        ({"calling_ae": ("scanner1",)}, False),
        ({"modality": ("CT",), "calling_ae": ("SCANNER2",)}, False),
    ],
)
def test_a_rule_fits_when_all_that_it_names_does(wanted, fits):
    assert (decide(CHEST, [Rule("ignore", **wanted)]).decision == "ignore") is fits


@pytest.mark.parametrize(
    ("facts", "wanted", "fits"),
    [
        (Facts(), {"body_part": ("absent", "CHEST")}, True),
        (Facts(), {"body_part": ("CHEST",)}, False),
        (Facts(body_parts=frozenset({"CHEST", "HEAD"})), {"body_part": ("CHEST",)}, False),
        (Facts(body_parts=frozenset({"ABSENT"})), {"body_part": ("absent",)}, False),
        (Facts(thickness_mm=None), {"thickness_mm": Range()}, False),
        (Facts(calling_ae=None), {"calling_ae": ("A",)}, False),
        (Facts(description=""), {"description": ("*",)}, True),
    ],
)
def test_what_a_series_does_not_say_fits_nothing_that_is_asked_for(facts, wanted, fits):
    assert (decide(facts, [Rule("ignore", **wanted)]).decision == "ignore") is fits


@pytest.mark.parametrize(
    ("value", "listed", "runs", "is_ignored"),
    [
        ("LUNG", "CHEST", True, True),
        ("THORAX", "lung", True, True),
        ("CHESTABDPELVIS", "CHEST", True, False),
        ("CHEST_TO_PELVIS", "CHEST,ABDOMEN,PELVIS", True, True),
        ("CHEST", "CHESTABDPELVIS", False, True),
        ("HEAD", "CHEST", False, False),
        ("HEART", "CHEST", False, False),
        ("SITE WORD", "site word", True, True),
        ("SITE WORD", "CHEST", False, False),
    ],
)
def test_body_parts_are_compared_by_what_they_mean(value, listed, runs, is_ignored):
    facts, words = Facts(body_parts=frozenset({value})), tuple(listed.split(","))
    assert (decide(facts, [Rule("run", body_part=words)]).rule is not None) is runs
    assert (decide(facts, [Rule("ignore", body_part=words)]).rule is not None) is is_ignored


def test_the_first_rule_that_fits_decides():
    rules = [
        Rule("ignore", name="scouts", description=("*scout*",)),
        Rule("run", body_part=("CHEST",), force=True),
        Rule("ignore"),
    ]
    assert decide(CHEST, rules).rule == "rule 2"
    assert decide(CHEST, rules).force
    assert decide(Facts(description="Scout"), rules).rule == "rule 1, scouts"
    assert decide(Facts(), rules).rule == "rule 3"
    assert decide(Facts(), rules[:2]).rule is None
    assert decide(Facts(), rules[:2]).decision == "run"


facts = st.builds(
    Facts,
    modality=st.text(max_size=4),
    body_parts=st.frozensets(st.text(max_size=8), max_size=3),
    thickness_mm=st.none() | st.floats(0, 20),
    description=st.text(max_size=64),
    calling_ae=st.none() | st.text(max_size=16),
)
words = st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)
rule_lists = st.lists(
    st.builds(
        Rule,
        decision=st.sampled_from(["run", "ignore"]),
        modality=words,
        body_part=words,
        description=words,
        calling_ae=words,
    ),
    max_size=4,
)


@given(facts, rule_lists)
def test_rules_behind_one_that_takes_all_change_nothing(facts, rules):
    stop = Rule("ignore", name="rest")
    assert decide(facts, [*rules, stop]) == decide(facts, [*rules, stop, Rule("run", force=True)])
    assert decide(facts, [*rules, stop]).rule is not None


@given(facts, rule_lists)
def test_a_decision_is_that_of_a_rule_that_fits_alone(facts, rules):
    found = decide(facts, rules)
    alone = [rule for rule in rules if decide(facts, [rule]).rule]
    assert found.decision == (alone[0].decision if alone else "run")


def test_a_hostile_description_does_not_hold_the_rules_up():
    # A matcher that tries every way would not end before the test's limit.
    found = decide(Facts(description="a" * 1024), [Rule("ignore", description=("*a" * 30 + "*b",))])
    assert found.rule is None


def write(folder, **attributes):
    write_ct_series(small_volume(), folder, seed=1, adjust=setter(**attributes))


def verdict_of(folder, rules=(), **more):
    (verdict,) = verdicts_of_scan(scan_folder(folder), rules, **more)
    return verdict


def test_without_rules_what_is_fit_is_run(tmp_path):
    write(tmp_path / "fit")
    assert verdict_of(tmp_path / "fit").run
    write(tmp_path / "derived", ImageType=["DERIVED", "SECONDARY", "MIP"])
    found = verdict_of(tmp_path / "derived")
    assert not found.run
    assert "--force" not in found.message
    write(tmp_path / "head", BodyPartExamined="HEAD")
    assert verdict_of(tmp_path / "head").run
    assert not verdict_of(tmp_path / "head", asking=Asking(body_parts=["CHEST"])).run


def test_a_rule_that_ignores_keeps_a_fit_series_from_running(tmp_path):
    write(tmp_path, SeriesDescription="Doe^Jane lung")
    found = verdict_of(tmp_path, [Rule("ignore", name="lungs", description=("*lung",))])
    assert (found.run, found.reason, found.message) == (False, "rule-ignore", "rule 1, lungs ignores it")


def test_force_runs_what_is_possible_but_not_fit(tmp_path):
    write(tmp_path / "mip", ImageType=["DERIVED", "SECONDARY", "MIP"])
    found = verdict_of(tmp_path / "mip", [Rule("run", force=True)])
    assert found.run
    assert found.force
    assert "because of `force`" in found.message
    assert not verdict_of(tmp_path / "mip", [Rule("run")]).run
    write(tmp_path / "mr", Modality="MR")
    assert not verdict_of(tmp_path / "mr", [Rule("run", force=True)]).run


def test_facts_are_those_of_the_headers(tmp_path):
    def adjust(dataset, index):
        dataset.SliceThickness = 1 + index % 2
        dataset.BodyPartExamined = "chest" if index else ""
        dataset.SeriesDescription = "Lung"

    write_ct_series(small_volume(), tmp_path, seed=1, adjust=adjust)
    series = verdict_of(tmp_path).candidate.series
    assert facts_from_series(series, "S") == Facts("CT", frozenset({"CHEST"}), 2.0, "Lung", "S")


def test_rules_are_tried_on_a_folder(tmp_path, capsys):
    write(tmp_path / "ct" / "a", SeriesDescription="Doe^Jane scout")
    write_ct_series(small_volume(), tmp_path / "ct" / "b", seed=2)
    config = tmp_path / "node.yaml"
    config.write_text("rules:\n- {decision: ignore, description: '*scout*', calling_ae: A}\n")
    assert main(["rules", "test", str(tmp_path / "ct"), "-c", str(config)]) == 0
    assert "2 of 2 series would be segmented" in capsys.readouterr().out
    assert main(["rules", "test", str(tmp_path / "ct"), "-c", str(config), "--calling-ae", "A"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 series would be segmented" in shown
    assert "would not be segmented  rule 1 ignores it" in shown
    assert "Doe" not in shown
    assert main(["rules", "test", str(tmp_path / "ct"), "--json"]) == 0
    assert '"run": true' in capsys.readouterr().out


def test_the_models_and_options_that_a_series_would_get_are_told(tmp_path, capsys):
    write(tmp_path / "ct")
    for name, part in (("lung", "CHEST"), ("liver", "HEAD")):
        small_unet_bundle(tmp_path / name)
        metadata = tmp_path / name / "configs" / "metadata.json"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"body_parts": [part]}))
    config = tmp_path / "node.yaml"
    config.write_text(
        "models: [{name: lung, bundle: lung}, {name: liver, bundle: liver}, {name: other, bundle: lung}]\n"
        "rules:\n- {run: [lung, liver], priority: urgent, options: {viewer: ohif, rtstruct: true}}\n"
    )
    write(tmp_path / "ct", BodyPartExamined="CHEST")
    assert main(["rules", "test", str(tmp_path / "ct"), "-c", str(config)]) == 0
    told = capsys.readouterr().out
    assert "model lung: runs (urgent)" in told
    assert "model liver: does not run:" in told
    assert "model other" not in told
    assert "seg labelmap" in told
    assert "rtstruct True" in told
    assert "1 of 1 series would be segmented" in told


def test_a_folder_or_file_that_cannot_be_tried_is_an_error(tmp_path, capsys):
    assert main(["rules", "test", str(tmp_path)]) == 2
    assert "contains no DICOM series" in capsys.readouterr().err
    assert main(["rules", "test", str(tmp_path / "none")]) == 2
    assert main(["rules", "test", str(tmp_path), "-c", str(tmp_path / "none.yaml")]) == 64
