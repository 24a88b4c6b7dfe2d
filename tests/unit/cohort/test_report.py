"""The tables and the page of a cohort: of markers alone, bounded, deterministic, and safe to open."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from browser_support import CHROMIUM, Browser, contrast
from cohort_rows import BEGAN, DONE, FAILED, REJECTED, many, write_markers
from ctflow.cli.main import cli
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.outcome import RowSegment
from ctflow.cohort.report import make, tables
from ctflow.cohort.report.distribution import LogDistribution
from ctflow.cohort.report.make import make_report
from ctflow.cohort.report.summary import CohortSummary
from ctflow.cohort.report.timeline import Timeline, utc_of_seconds
from ctflow.core.errors import NoUsableSeries
from ctflow.report.preview import write_picture
from needs import skip_without

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}\u202e"


def report_of(folder, form=None) -> dict[str, bytes]:
    names = make_report(FolderDestination(folder, "report"), form)
    return {name: (folder / name).read_bytes() for name in names}


def add_preview(folder, outcome) -> None:
    place = folder / "results" / outcome.id / outcome.folders[0]
    place.mkdir(parents=True)
    write_picture(np.full((600, 1400, 3), 90, np.uint8), place / "preview.png")


def test_the_tables_hold_a_row_a_series_and_a_row_a_finding(tmp_path):
    folder = write_markers(tmp_path, [DONE, REJECTED, FAILED])
    assert report_of(folder).keys() == {"cohort.parquet", "findings.parquet", "cohort.html"}
    series = parquet.read_table(folder / "cohort.parquet")
    assert series.schema.field("finished").type == pyarrow.timestamp("ms", tz="UTC")
    first, second, third = series.to_pylist()
    assert (first["id"], first["status"], first["volumes"], first["findings"]) == ("row-1", "done", 1, 2)
    assert (first["volume_ml"], first["read_s"], first["segment_s"], first["write_s"]) == (1.5, 0.5, 1.5, None)
    assert (first["model"], first["model_version"], first["ctflow_version"]) == ("lungs", "1.2", "0.1")
    assert first["finished"].timestamp() == BEGAN
    assert first["segments"][1] == {"folder": "abc", "label": "Cyst", "volume_ml": 0.0, "findings": 0}
    assert (second["reason"], second["message"], second["findings"]) == ("gap", "a slice is missing", 0)
    assert (third["attempt"], third["gpu_busy"], third["exit_code"]) == (3, None, 4)
    findings = parquet.read_table(folder / "findings.parquet").to_pylist()
    assert [(each["id"], each["number"], each["volume_ml"]) for each in findings] == [
        ("row-1", 1, 1.25),
        ("row-1", 2, 0.25),
    ]
    assert findings[1]["implausible"] == "outside-body mean-hu"


def test_csv_has_the_same_rows_and_no_formulas(tmp_path):
    hostile = replace(REJECTED, id="row-9", message="=HYPERLINK(1)")
    content = report_of(write_markers(tmp_path, [DONE, hostile]), "csv")
    with (tmp_path / "cohort.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["id"], first["seconds"], json.loads(first["segments"])[0]["label"]) == ("row-1", "2.5", "Nodule")
    assert second["message"] == "'=HYPERLINK(1)"
    assert content["findings.csv"].count(b"\n") == 3


def test_without_pyarrow_the_usual_tables_are_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    assert report_of(write_markers(tmp_path, [DONE])).keys() == {"cohort.csv", "findings.csv", "cohort.html"}


def test_equal_markers_give_equal_files_in_whatever_order_they_came(tmp_path):
    rows = list(many(300))
    first = report_of(write_markers(tmp_path / "a", rows))
    second = report_of(write_markers(tmp_path / "b", reversed(rows)))
    assert first == second


def test_markers_are_read_in_their_order_also_where_reading_is_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "_SLOW_S", 0.0)
    destination = FolderDestination(write_markers(tmp_path, many(500)), "report")
    names = sorted(destination.marks())
    read = list(make.outcomes_of(destination, [*names, DONE.name]))  # the last has gone meanwhile
    assert [name for name, _ in read] == names == [outcome.name for _, outcome in read]


def test_a_damaged_marker_counts_by_its_name_and_is_told(tmp_path):
    folder = write_markers(tmp_path, [DONE, REJECTED])
    (folder / "rows" / str(REJECTED.name)).write_text("{")
    page = report_of(folder)["cohort.html"].decode()
    assert "1 marker is damaged, and its row counts by status only: row-2." in " ".join(page.split())
    _, second = parquet.read_table(folder / "cohort.parquet").to_pylist()
    assert (second["id"], second["status"], second["reason"]) == ("row-2", "rejected", "damaged-marker")


def test_a_row_with_two_markers_is_one_series(tmp_path):
    folder = write_markers(tmp_path, [DONE, replace(DONE, status="failed", reason="out-of-memory")])
    report_of(folder)
    assert [each["status"] for each in parquet.read_table(folder / "cohort.parquet").to_pylist()] == ["done"]


def test_nothing_is_half_written(tmp_path, monkeypatch):
    folder = write_markers(tmp_path, [DONE])
    before = report_of(folder)
    write_markers(folder, [REJECTED])

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(make, "page_of", fail)
    with pytest.raises(ZeroDivisionError):
        report_of(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_a_page_of_many_rows_is_small(tmp_path):
    summary = CohortSummary()
    for outcome in many(20_000):
        summary.add(replace(outcome, message=f"{outcome.id}: {'long ' * 200}"))
    for number in range(500):  # more reasons, machines and segments than a page lists
        summary.add(replace(FAILED, reason=f"reason-{number}", node=f"node-{number}", message="long " * 200))
        summary.add(replace(DONE, segments=(RowSegment("abc", f"Segment {number}", 1.0 + number, 1),)))
    page = make.page_of(FolderDestination(tmp_path, "report"), summary, ())
    assert len(page) < 600_000
    assert "21,000" in page
    assert "more reasons are not listed here" in page
    assert max(Counter(re.findall("<tr", page)).values()) < 1000


def test_the_figures_are_right():
    summary = CohortSummary()
    for outcome in many(3000):
        summary.add(outcome)
    document = summary.document
    assert document["statuses"] == {"done": 2870, "rejected": 100, "failed": 30}
    assert sum(each["good"] for each in document["timeline"]["bins"] if each) == 2870
    assert sum(each["other"] for each in document["timeline"]["bins"] if each) == 130
    assert document["timeline"]["bins"].count(None) == 1  # the pause of seven hours
    assert 3000 / 4.5 < document["active_s"] < 3000 / 3.5
    assert document["good_an_hour"] == pytest.approx(2870 * 3600 / document["active_s"], abs=0.1)
    assert [each["reason"] for each in document["reasons"]] == ["gap", "worker-ended"]
    assert document["reasons"][0]["ids"] == [f"s{number:06d}" for number in range(7, 150, 30)]
    assert document["findings"] == 2870 * 2
    nodule, cyst = document["segments"]
    assert (nodule["volumes"], nodule["count"], cyst["count"]) == (2870, 2870, 0)
    assert nodule["median"] == pytest.approx(1.5, rel=0.06)
    assert dict(document["stages"]) == pytest.approx({"read": 0.5, "segment": 1.5})
    assert document["gpu_busy"] == pytest.approx(0.8)
    assert len(document["pictured"]) == 24


def test_quantiles_are_within_a_twentieth():
    values, distribution = np.random.default_rng(0).lognormal(1, 2, 5000), LogDistribution()
    for value in values:
        distribution.add(value)
    for share in (0.05, 0.5, 0.95):
        assert distribution.quantile(share) == pytest.approx(np.quantile(values, share), rel=0.07)
    assert sum(each["count"] for each in distribution.bins) == 5000
    assert len(distribution.bins) <= 28
    edges = [(each["low"], each["high"]) for each in distribution.bins]
    assert all(low[1] == pytest.approx(high[0]) for low, high in pairwise(edges))


@pytest.mark.parametrize("span_s", [1, 60, 3_000, 40_000, 10**6, 10**9])
def test_a_timeline_has_few_bins_and_loses_no_row(span_s):
    timeline = Timeline()
    for number in range(200):
        timeline.add(utc_of_seconds(BEGAN + span_s * number // 199), None, is_good=number % 2 == 0)
    timeline.add("yesterday", None, is_good=True)
    bins = timeline.document["bins"]
    assert len(bins) <= 100
    assert sum(each["good"] for each in bins if each) == sum(each["other"] for each in bins if each) == 100


def test_a_cohort_without_rows_is_an_error_that_names_it(tmp_path):
    with pytest.raises(NoUsableSeries) as error:
        make_report(FolderDestination(tmp_path / "none", "report"))
    assert error.value.reason == "no-row"
    assert CliRunner().invoke(cli, ["cohort", "report", str(tmp_path / "none")]).exit_code != 0


def test_the_command_writes_what_a_run_writes(tmp_path):
    write_markers(tmp_path, [DONE])
    done = CliRunner().invoke(cli, ["cohort", "report", str(tmp_path), "--tables", "csv"], standalone_mode=False)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("cohort.csv, findings.csv, cohort.html in ")


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        skip_without("Chromium")
    browser = Browser(1400, 900)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of rows whose every text is hostile, one with a picture."""
    folder = tmp_path_factory.mktemp("cohort")
    segment = replace(DONE.segments[0], label=HOSTILE)
    rows = [
        replace(DONE, segments=(segment,), findings=(replace(DONE.findings[0], label=HOSTILE),)),
        replace(DONE, id="row-4", status="partly", reason="unreadable-files", message=HOSTILE),
        replace(FAILED, id=f"a b#?%2e{HOSTILE.replace('/', '')}", message=HOSTILE, node=HOSTILE, version=HOSTILE),
        replace(REJECTED, reason=HOSTILE, model={"name": HOSTILE}),
        *many(200),
    ]
    write_markers(folder, rows, "RESEARCH ONLY")
    for outcome in rows[:2]:
        add_preview(folder, outcome)
    make_report(FolderDestination(folder, "report"))
    return folder / "cohort.html"


def look(browser, path, width=1400, scheme="light") -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.requests.clear()
    browser.said.clear()
    browser.call("Page.navigate", url=path.as_uri())
    browser.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")
    browser.settle()


def test_a_hostile_text_stays_a_text_and_the_page_fetches_nothing(browser, hostile):
    look(browser, hostile)
    assert browser.said == []
    assert [url for url in browser.requests if not url.startswith("data:image/jpeg")] == [hostile.as_uri()]
    assert browser.value("document.scripts.length") == 0
    words = browser.value("document.body.textContent")
    assert "<script>alert(1)</script>\"'&{{ 7 * 7 }}" in words
    assert "\u202e" not in words
    assert "RESEARCH ONLY" in words
    script = "[...document.querySelectorAll('a[href^=results]')].map(a => new URL(a.href).pathname)"
    links = browser.value(script)
    assert links
    assert all(link.startswith(f"{hostile.parent.as_posix()}/results/") for link in links)
    assert any(link.endswith("row-1/abc/report.html") for link in links)
    assert browser.value("[...document.images].every(each => each.naturalWidth === 600 && each.alt)")
    assert browser.value("document.images.length") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_is_legible_and_fits(browser, hostile, width, scheme):
    look(browser, hostile, width, scheme)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert contrast(browser) == []
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(12, 14, 18)") is (scheme == "dark")


def test_the_page_is_told_to_a_screen_reader(browser, hostile):
    look(browser, hostile)
    nameless = """[...document.querySelectorAll('svg, section, figure .scroll, [role=region]')].filter(each =>
  each.getAttribute('aria-hidden') !== 'true' && !each.ariaLabel &&
  !document.getElementById(each.getAttribute('aria-labelledby'))?.textContent).length"""
    assert browser.value(nameless) == 0
    assert browser.value("[...document.querySelectorAll('thead th')].every(each => each.scope && each.textContent)")
    assert browser.value("[...document.querySelectorAll('.chart')].every(each => each.getAttribute('role') === 'img')")
    assert browser.value("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == browser.value(
        "document.querySelectorAll('[id]').length"
    )
    assert browser.value("[...document.querySelectorAll('h1, h2, h3')].map(each => each.tagName)[0]") == "H1"


def test_a_page_is_legible_on_paper_and_on_a_phone(browser, tmp_path):
    make_report(
        FolderDestination(write_markers(tmp_path, [replace(each, gpu_busy=None) for each in many(20)]), "report")
    )
    size = """Math.min(...[...document.querySelectorAll('.chart text')].map(each =>
  parseFloat(getComputedStyle(each).fontSize) * each.ownerSVGElement.getScreenCTM().a))"""
    try:
        look(browser, tmp_path / "cohort.html", 390)
        assert browser.value(size) > 7
        look(browser, tmp_path / "cohort.html", 794)
        browser.call("Emulation.setEmulatedMedia", media="print")
        browser.settle()
        assert browser.value(size) > 7
        assert browser.value("document.documentElement.scrollWidth") <= 794
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_a_run_of_seconds_gives_a_page_too(tmp_path, browser):
    add_preview(tmp_path, DONE)
    make_report(FolderDestination(write_markers(tmp_path, [DONE]), "report"))
    look(browser, tmp_path / "cohort.html")
    assert browser.said == []
    assert browser.value("document.querySelectorAll('rect.good').length") >= 1
