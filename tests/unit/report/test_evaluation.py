from __future__ import annotations

import io

from ctflow.report.evaluation import say_evaluation

TALLY = {"lesions": 2, "hits": 1, "sensitivity": 0.5, "mean_dice": 0.4125, "mean_hausdorff95_mm": 2.34}
ROW = {**TALLY, "false_positives": 3, "false_positives_a_case": 1.5}
NONE = {**ROW, "lesions": 0, "hits": 0, "sensitivity": None, "mean_dice": None, "mean_hausdorff95_mm": None}
FALSE = {"volume_ml": 0.0123, "equivalent_diameter_mm": 2.86, "centroid_mm": [-12.34, 5.0, 100.06]}


def lesion(volume_ml, longest_diameter_mm, hit, dice, hausdorff95_mm):
    return {
        "volume_ml": volume_ml,
        "longest_diameter_mm": longest_diameter_mm,
        "hit": hit,
        "dice": dice,
        "hausdorff95_mm": hausdorff95_mm,
    }


def case_of(**changes):
    return {
        "name": "17",
        "digest": "abc",
        "dice": 0.81234,
        "hausdorff95_mm": 72.41,
        "lesions_hausdorff95_mm": 4.56,
        "volume_found_ml": 1.5,
        "volume_truth_ml": 2.0,
        "volume_error_ml": -0.5,
        "lesions": [lesion(0.5, 11.0, True, 0.75, 4.56), lesion(4.0, 22.0, False, 0.0, None)],
        "false_positives": [FALSE],
        "false_positives_left_out": 2,
        "reference": None,
        "seconds": 12.34,
        "error": None,
        **changes,
    }


FAILED = case_of(
    name="18",
    dice=None,
    lesions=[],
    seconds=None,
    error={"type": "BrokenSeries", "exit_code": 2, "message": "series 1: a gap"},
)


def said(*cases, **changes):
    document = {
        "research_only": "RESEARCH ONLY",
        "model": {"name": "m", "version": "2", "weights_digest": "0"},
        "engine": {"backend": "eager", "precision": "fp32", "device": "cpu"},
        "cases": list(cases),
        "summary": {
            "cases": len(cases),
            "cases_with_truth": 1,
            "mean_dice": 0.5,
            "tumour_free": {"cases": 3, "clean": 2, "limit_ml": 0.2},
            "overall": ROW,
            "by_size": [{"from_mm": 6.0, "to_mm": 10.0, **ROW}, {"from_mm": 10.0, "to_mm": 20.0, **NONE}],
        },
        **changes,
    }
    stream = io.StringIO()
    say_evaluation(document, stream)
    return [line.split() for line in stream.getvalue().splitlines() if line.strip()]


def test_cases_and_sizes_are_told():
    lines = said(case_of(), case_of(name="19"))
    assert lines[0] == ["RESEARCH", "ONLY"]
    assert lines[1] == ["model", "m", "2,", "eager", "fp32", "on", "cpu"]
    assert ["17", "0.812", "4.6", "2.00", "-0.50", "1", "of", "2", "3", "12.3"] in lines
    assert ["6", "to", "10", "2", "1", "0.50", "0.412", "2.3", "3", "1.50"] in lines
    assert ["10", "to", "20", "0", "0", "-", "-", "-", "3", "1.50"] in lines
    assert ["all", "2", "1", "0.50", "0.412", "2.3", "3", "1.50"] in lines
    assert lines[-1][-9:] == ["nothing", "larger", "than", "0.2", "ml", "in", "2", "of", "3"]


def test_each_lesion_of_an_only_case_is_told_the_largest_first():
    lines = said(case_of())
    first = lines.index(["1", "4.00", "22.0", "no", "0.000", "-"])
    assert lines[first + 1] == ["2", "0.50", "11.0", "yes", "0.750", "4.6"]
    assert not any("sensitivity" in line for line in lines)


def test_false_findings_of_an_only_case_are_told_with_size_and_place():
    lines = said(case_of())
    assert lines[-3] == ["1", "0.012", "2.9", "-12.3,", "5.0,", "100.1"]
    assert lines[-2] == ["and", "2", "smaller", "false", "findings"]
    assert " ".join(lines[-1]) == (
        "HD95: 95th percentile of surface distances, mean of the lesions that were found; of the whole masks, with "
        "false findings and missed lesions, 72.4 mm"
    )
    lines = said(case_of(false_positives=[], false_positives_left_out=0))
    assert not any(line[:2] == ["false", "finding"] for line in lines)
    lines = said(case_of(lesions=[], hausdorff95_mm=None, lesions_hausdorff95_mm=None))
    assert lines[-2][0] == "1", "also without a lesion"


def test_the_reference_is_told_where_there_is_one():
    reference = {"dice": 0.999987, "voxels_differing": 3}
    lines = said(case_of(), case_of(name="19", reference=reference))
    assert [line[-2:] for line in lines if line[0] in ("17", "19")] == [["-", "-"], ["0.999987", "3"]]
    assert not any("fp32" in line and "differing" in line for line in said(case_of()))


def test_a_failed_case_says_why():
    lines = said(case_of(), FAILED)
    assert ["18", *"-------"] in lines
    assert ["case", "18:", "failed"] in lines
    assert ["BrokenSeries:", "series", "1:", "a", "gap"] in lines


def test_nothing_measured_has_no_summary(capsys):
    lines = said(FAILED, engine=None, research_only=None, summary={"cases": 0})
    assert lines[0] == ["model", "m", "2"]
    assert not any("sensitivity" in line for line in lines)
    assert capsys.readouterr().out == ""
