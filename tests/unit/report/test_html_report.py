from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from browser_support import CHROMIUM, Browser
from ctflow.core.errors import NotWritten
from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY
from ctflow.core.volume import Geometry, Volume
from ctflow.measurements.measure import measure_segments
from ctflow.measurements.plausibility import place_to_show
from ctflow.report import pixels
from ctflow.report.html_report import write_html_report
from ctflow.report.views import oriented_from_volume
from needs import skip_without
from reasons import raises_reason
from report_support import HEAD_FIRST, NODE, SHAPE, TUMOUR, affine_of, document_of, some_labels, some_volume

WIDTH, HEIGHT = 1500, 900


def written(path: Path, volume=None, labels=None, segments=(TUMOUR, NODE), **changed) -> Path:
    volume = some_volume() if volume is None else volume
    labels = some_labels() if labels is None else labels
    document = document_of(volume, labels, segments, **changed)
    write_html_report(oriented_from_volume(volume, labels), document, path)
    return path


class Page(HTMLParser):
    """The elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if attributes.get("id") == "data":
            self.data += data
        elif tag not in {"script", "style"} or "<" in data[:1]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def doubtful(tmp_path) -> Path:
    """The largest tumour, in air, is implausible; the smaller one is not."""
    tumour = replace(TUMOUR, hu_range=(-700.0, 300.0))
    measured = measure_segments(some_labels(), some_volume(), (tumour, NODE))
    path = tmp_path / "report.html"
    oriented = oriented_from_volume(some_volume(), some_labels(), place_to_show(measured))
    document = document_of(some_volume(), some_labels(), (tumour, NODE))
    write_html_report(oriented, document, path)
    return path


# --- the file -----------------------------------------------------------------------------------------------------


def test_an_implausible_finding_is_marked_and_not_shown_first(tmp_path):
    page = Page(doubtful(tmp_path))
    text = page.text.replace("\u2212", "-")
    assert "Lung tumour: 1 of 2 findings (4.00 of 4.32 ml) are implausible (mean outside -700 to 300 HU: 1)." in text
    assert "2 findings, 4.32 ml; 1 of them implausible (4.00 ml)" in text
    assert text.count("Implausible: mean -800 HU, not -700 to 300 HU") == 1
    assert text.rindex("Lung tumour 1") < text.rindex("Lung tumour 2") < text.index("Implausible: mean -800 HU")
    data = json.loads(page.data)
    assert data["first"] == 0
    assert data["start"] == data["findings"][0]
    assert data["start"][2] in (4, 5), "the slices of the tumour that passes"


def test_a_page_on_which_nothing_is_plausible_opens_in_the_middle(tmp_path):
    tumour = replace(TUMOUR, hu_range=(1000.0, 2000.0))
    data = json.loads(Page(written(tmp_path / "report.html", segments=(tumour,))).data)
    assert data["first"] == -1
    assert data["start"] == [24, 20, 12]


def test_a_report_of_plausible_findings_speaks_of_no_doubt(tmp_path):
    assert "mplausible" not in Page(written(tmp_path / "report.html")).text


def test_every_finding_has_its_measurements(tmp_path):
    volume, labels = some_volume(), some_labels()
    text = Page(written(tmp_path / "report.html")).text.replace("−", "-")
    for segment in document_of(volume, labels)["segments"]:
        for rank, finding in enumerate(segment["findings"], start=1):
            x, y, z = finding["centroid_mm"]
            row = (
                f"{segment['label']} {rank} {finding['volume_ml']:.2f} {finding['long_axis_mm']:.1f} "
                f"{finding['short_axis_mm']:.1f} {finding['longest_diameter_mm']:.1f} {finding['mean_hu']:.0f} "
                f"{finding['sd_hu']:.0f} {x:+.1f} {y:+.1f} {z:+.1f}"
            )
            assert row in text
    assert RESEARCH_ONLY in text


def test_the_smallest_finding_has_a_volume(tmp_path):
    hu, labels = np.zeros((4, 5, 6), np.int16), np.zeros((4, 5, 6), np.uint8)
    labels[2, 2, 2] = 1
    volume = Volume(hu, Geometry(hu.shape, np.diag([1.0, 1.0, 1.0, 1.0])))
    assert "Lung tumour 1 < 0.01 0.0 0.0 0.0 0 0" in Page(written(tmp_path / "report.html", volume, labels)).text


def test_what_nothing_marked_means_is_said(tmp_path):
    path = written(tmp_path / "report.html", labels=np.zeros(SHAPE, np.uint8))
    assert NOTHING_MARKED in Page(path).text
    assert json.loads(Page(path).data)["findings"] == []


def test_findings_that_are_left_out_are_counted(tmp_path):
    volume, labels = some_volume(), some_labels()
    document = document_of(volume, labels)
    document["segments"][0] |= {"components": 152, "findings_left_out": 150}
    write_html_report(oriented_from_volume(volume, labels), document, tmp_path / "report.html")
    assert "152 findings" in Page(tmp_path / "report.html").text
    assert "the 2 largest are listed, 150 are left out" in Page(tmp_path / "report.html").text


HOSTILE = "</script><script>document.body.dataset.owned='1'</script><img src=x onerror=alert(1)>\"'&\u202e$data"


def hostile_report(path: Path) -> Path:
    return written(
        path,
        segments=(replace(TUMOUR, label=HOSTILE), NODE),
        model={"name": HOSTILE, "version": HOSTILE, "weights_digest": HOSTILE},
        warnings=[HOSTILE],
        intended_use=HOSTILE,
    )


def test_hostile_text_stays_text(tmp_path):
    page, plain = Page(hostile_report(tmp_path / "a.html")), Page(written(tmp_path / "b.html"))
    more = len(page.elements) - len(plain.elements)
    assert more == 1, "the list item of the warning"
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE.replace("\u202e", " ") in " ".join(page.words)


def test_the_file_refers_to_nothing_and_forbids_everything_else(tmp_path):
    path = written(tmp_path / "report.html")
    text, page = path.read_text(), Page(path)
    assert not re.search(r"(?:https?:)?//[a-z]|url\(|@import", re.sub(r"/\*.*?\*/", "", text).split('id="data"')[0])
    for _, attributes in page.elements:
        assert not {"src", "href", "style", "action"} & attributes.keys()
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "*" not in policy


def test_the_same_result_is_the_same_file_and_seconds_do_not_show(tmp_path):
    first = written(tmp_path / "a.html", stage_seconds={"segment": 1.0})
    assert first.read_bytes() == written(tmp_path / "b.html", stage_seconds={"segment": 2.0}).read_bytes()


def test_a_series_is_named_by_its_digest_only(tmp_path):
    text = written(tmp_path / "report.html").read_text()
    assert "0123456789ab" in text
    assert "1.2.3" not in text


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="report.html"):
        written(tmp_path / "absent" / "report.html")


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        skip_without("Chromium")
    chromium = Browser(WIDTH, HEIGHT)
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser, tmp_path):
    """Opens a report, with the cross away so that only CT and outlines are drawn."""

    def open_report(*arguments, cross=False, **options) -> Viewer:
        browser.open(written(tmp_path / "report.html", *arguments, **options))
        assert browser.value("document.body.dataset.state") == "ready", browser.value("problem.textContent")
        if not cross:
            browser.key("x")
        return Viewer(browser)

    return open_report


class Viewer:
    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def picture(self, view: str) -> np.ndarray:
        """(rows, columns, 3) of a view's canvas."""
        width, height, values = self.browser.value(
            f"(() => {{ const c = document.getElementById('view-{view}');"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return [c.width, c.height, Array.from(d)]; })()"
        )
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]

    def slices(self) -> list[int]:
        """Slice numbers from 0 of the axial, coronal and sagittal view."""
        return self.browser.value("[...document.querySelectorAll('.pane input')].map(slider => Number(slider.value))")

    def middle(self, view: str) -> tuple[float, float]:
        box = self.browser.value(f"document.getElementById('view-{view}').getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def grey(self, view: str, across: float, down: float) -> int:
        """At a place of the CT's picture (fractions of its width and height), from what is not black around it."""
        picture = self.picture(view)
        left, right, top, bottom = picture_box(view, picture.shape)
        pixel = picture[round(top + down * (bottom - top)), round(left + across * (right - left))]
        assert np.ptp(pixel) == 0, "CT is grey"
        return int(pixel[0])


EXTENTS_MM = {"axial": (96, 40), "coronal": (96, 120), "sagittal": (40, 120)}


def picture_box(view, shape):
    """left, right, top and bottom of the CT on a canvas, in its true proportions."""
    across, down = EXTENTS_MM[view]
    scale = min(shape[1] / across, shape[0] / down)
    left, top = (shape[1] - across * scale) / 2, (shape[0] - down * scale) / 2
    return left, left + across * scale, top, top + down * scale


def red_of(picture) -> np.ndarray:
    """Where the first segment's outline is: (n, 2) rows and columns."""
    return np.argwhere((picture.astype(int) - (255, 92, 92) == 0).all(axis=-1))


def window_grey(hu, centre, width) -> float:
    return float(np.clip((hu - centre + width / 2) / width, 0, 1) * 255)


@pytest.mark.parametrize(("key", "centre", "width"), [("1", -600, 1500), ("2", 40, 400), ("3", 400, 1800)])
def test_each_window_gives_the_right_grey(page, key, centre, width):
    viewer = page()
    viewer.browser.key(key)
    tolerance = 10 / width * 255 + 1  # steps of 8 HU, and JPEG
    for view, across, down, hu in (
        ("coronal", 0.2, 0.8, 40),  # the patient's right, low
        ("coronal", 0.8, 0.8, -800),
        ("coronal", 0.2, 0.2, -800),
        ("axial", 0.2, 0.7, -800),  # the slice of the largest finding is above
        ("sagittal", 0.5, 0.9, -800),
    ):
        assert viewer.grey(view, across, down) == pytest.approx(window_grey(hu, centre, width), abs=tolerance)
    pressed = viewer.browser.value("[...document.querySelectorAll('[data-window]')].map(b => b.ariaPressed)")
    assert pressed == [str(number == int(key)).lower() for number in (1, 2, 3)]


GRIDS = {
    "head first": HEAD_FIRST,
    "feet first": affine_of([(0, 0, -5), (0, 1, 0), (-2, 0, 0)]),
    "prone": affine_of([(0, 0, 5), (0, -1, 0), (-2, 0, 0)]),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_outline_lies_where_the_finding_is_in_the_patient(page, grid):
    volume, labels = some_volume(GRIDS[grid]), np.zeros(SHAPE, np.uint8)
    labels[14:19, 8:18, 30:38] = 1
    viewer = page(volume, labels, (TUMOUR,))
    geometry = volume.geometry
    corners = geometry.world_from_index([[-0.5, -0.5, -0.5], np.array(SHAPE) - 0.5])
    low, high = corners.min(axis=0), corners.max(axis=0)
    edges = geometry.world_from_index([[13.5, 7.5, 29.5], [18.5, 17.5, 37.5]])
    first, last = (edges.min(axis=0) - low) / (high - low), (edges.max(axis=0) - low) / (high - low)
    for view, across, down, head_up in (("axial", 0, 1, False), ("coronal", 0, 2, True), ("sagittal", 1, 2, True)):
        picture = viewer.picture(view)
        left, right, top, bottom = picture_box(view, picture.shape)
        rows, columns = red_of(picture).T
        assert [columns.min(), columns.max()] == pytest.approx(
            [left + (right - left) * edge[across] for edge in (first, last)], abs=2.5
        )
        expected = [top + (bottom - top) * edge[down] for edge in (first, last)]
        if head_up:
            expected = [bottom - (bottom - top) * edge[down] for edge in (last, first)]
        assert [rows.min(), rows.max()] == pytest.approx(expected, abs=2.5)


def test_outlines_go_and_come_back(page):
    viewer = page()
    assert len(red_of(viewer.picture("axial"))) > 50
    viewer.browser.key("o")
    assert len(red_of(viewer.picture("axial"))) == 0
    viewer.browser.value("outlines.click()")
    viewer.browser.settle()
    assert len(red_of(viewer.picture("axial"))) > 50


def test_the_wheel_scrolls_the_view_below_it(page):
    viewer = page()
    axial, coronal, sagittal = viewer.slices()
    viewer.browser.wheel(*viewer.middle("axial"), -100)
    viewer.browser.wheel(*viewer.middle("axial"), -100)
    viewer.browser.wheel(*viewer.middle("coronal"), 100)
    for _ in range(4):
        viewer.browser.wheel(*viewer.middle("sagittal"), 10)  # a touchpad
    assert viewer.slices() == [axial + 2, coronal - 1, sagittal - 1]


def test_keys_move_through_the_slices_and_stop_at_the_ends(page):
    viewer = page()
    start = viewer.slices()[0]
    found = []
    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "PageDown", "End", "ArrowUp", "Home", "PageDown"):
        viewer.browser.key(key)
        found.append(viewer.slices()[0])
    assert found == [start + 1, start + 2, start + 1, start - 9, 23, 23, 0, 0]
    viewer.browser.click(*viewer.middle("sagittal"))
    before = viewer.slices()
    viewer.browser.key("PageUp")
    assert viewer.slices() == [before[0], before[1], before[2] + 10]


def test_the_picture_follows_the_slice(page):
    viewer = page(labels=np.zeros(SHAPE, np.uint8))
    viewer.browser.key("Home")
    assert viewer.grey("axial", 0.2, 0.7) == pytest.approx(window_grey(40, -600, 1500), abs=3)
    viewer.browser.key("End")
    assert viewer.grey("axial", 0.2, 0.7) == pytest.approx(window_grey(-800, -600, 1500), abs=3)
    label = viewer.browser.value("document.getElementById('view-axial').getAttribute('aria-label')")
    assert label == "axial slice 24 of 24, S +215.0 mm"


def test_a_click_on_a_row_jumps_to_its_finding(page):
    viewer = page(cross=True)
    assert viewer.slices() == [16, 12, 34], "the largest finding, after opening"
    places = []
    for index in (1, 2, 0):
        x, y = viewer.browser.value(
            f"(() => {{ const row = document.querySelector('[data-finding=\"{index}\"]').closest('tr');"
            "row.scrollIntoView(); const b = row.getBoundingClientRect();"
            "return [b.x + b.width * 0.6, b.y + b.height / 2]; })()"
        )
        viewer.browser.click(x, y)
        places.append(viewer.slices())
        chosen = viewer.browser.value("[...document.querySelectorAll('tr[aria-current]')].map(r => r.innerText.trim())")
        assert len(chosen) == 1
    assert places == [[4, 30, 10], [20, 31, 31], [16, 12, 34]]
    viewer.browser.key("n")
    assert viewer.slices() == places[0]
    viewer.browser.key("p")
    viewer.browser.key("p")
    assert viewer.slices() == places[1]


def test_a_row_is_reached_and_chosen_with_the_keyboard(page):
    viewer = page()
    viewer.browser.value("document.querySelector('[data-finding=\"1\"]').focus()")
    viewer.browser.key("Tab")
    viewer.browser.key("Enter")
    assert viewer.slices() == [20, 31, 31]


def test_a_click_in_a_view_moves_the_others(page):
    viewer = page()
    x, y = viewer.middle("axial")
    viewer.browser.click(x, y)
    assert viewer.slices() == [16, 20, 24]


def test_a_view_can_be_enlarged(page):
    viewer = page()
    before = viewer.picture("axial").shape
    viewer.browser.click(*viewer.middle("axial"), times=2)
    assert viewer.picture("axial").shape[1] > 2.5 * before[1]
    viewer.browser.key("f")
    assert viewer.picture("axial").shape == before


def test_everything_that_acts_has_a_name_for_screen_readers(page):
    viewer = page()
    nodes = viewer.browser.call("Accessibility.getFullAXTree")["nodes"]
    acting = [n for n in nodes if n.get("role", {}).get("value") in {"button", "slider", "image", "progressbar"}]
    named = [node for node in acting if node["name"]["value"].strip()]
    assert len(acting) == len(named) >= 3 + 3 + 7 + 3
    assert {"axial slice 17 of 24, S +180.0 mm"} <= {node["name"]["value"] for node in named}


def test_nothing_is_fetched_and_nothing_runs_but_the_viewer(browser, tmp_path):
    path = hostile_report(tmp_path / "report.html")
    browser.open(path)
    assert browser.value("document.body.dataset.state") == "ready"
    assert [url for url in browser.requests if not url.startswith("blob:")] == [path.as_uri()]
    assert browser.said == []
    assert browser.value("document.body.dataset.owned") is None
    # What the policy is for: even a script that got into the page would not run, and no address answers.
    browser.value(
        "(() => { const s = document.createElement('script'); s.textContent = 'document.body.dataset.owned = 1';"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(s, i); })()"
    )
    browser.settle()
    assert browser.value("document.body.dataset.owned") is None
    assert len([line for line in browser.said if "Content Security Policy" in line]) >= 2


def test_a_browser_that_alters_pictures_is_noticed(browser, tmp_path):
    source = written(tmp_path / "report.html").read_text()
    path = tmp_path / "altered.html"
    path.write_text(re.sub(r'("check":\{"slice":\d+,"mean":)([\d.]+)', r"\g<1>200", source))
    browser.open(path)
    assert browser.value("document.body.dataset.state") == "failed"
    assert "alters pictures" in browser.value("problem.textContent")
    assert browser.value("panes.getBoundingClientRect().height") == 0, "no picture is better than a wrong one"


def test_a_slice_that_is_damaged_is_noticed(browser, tmp_path):
    source = written(tmp_path / "report.html").read_text()
    path = tmp_path / "damaged.html"
    path.write_text(re.sub(r'"slices":\["[^"]{40}', '"slices":["' + "A" * 40, source))
    browser.open(path)
    assert browser.value("document.body.dataset.state") == "failed"
    assert "cannot be shown" in browser.value("problem.textContent")
    assert browser.value("document.querySelectorAll('[data-finding]').length") == 3, "the measurements stay"


# --- pixels -------------------------------------------------------------------------------------------------------


def test_codes_are_fine_where_windows_are_narrow():
    hu = np.array(pixels.hu_of_codes())
    steps = np.diff(hu)
    assert (hu[0], hu[-1]) == (-1024, 3071)
    assert (steps > 0).all()
    assert steps[(hu[:-1] >= -160) & (hu[:-1] < 240)].max() == pytest.approx(4)
    assert steps[hu[:-1] < -160].max() == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_slices_hold_the_nearest_code(kind):
    values = np.random.default_rng(0).integers(-3000, 4000, SHAPE).astype(kind)
    volume = Volume(values, Geometry(SHAPE, HEAD_FIRST))
    slices = pixels.Slices(oriented_from_volume(volume, np.zeros(SHAPE, np.uint8)), (1, 1, 1))
    known = np.array(pixels.hu_of_codes())
    assert len(slices) == SHAPE[0]
    for index in (0, 7, 23):
        wanted = np.clip(values[index].astype(float), -1024, 3071)
        nearest = np.abs(known - wanted[..., None]).min(axis=-1)
        assert (np.abs(known[slices[index]] - wanted) <= nearest + 0.2).all()


def test_noisy_volumes_stay_small():
    noise = np.random.default_rng(0).integers(-1000, 1000, (40, 256, 256)).astype(np.int16)
    volume = Volume(noise, Geometry(noise.shape, np.eye(4)[[2, 1, 0, 3]]))
    slices = pixels.Slices(oriented_from_volume(volume, np.zeros(noise.shape, np.uint8)), (1, 1, 1))
    best, quality = pixels.jpegs_from_slices(slices)
    small, lower = pixels.jpegs_from_slices(slices, most_bytes=sum(map(len, best)) // 2)
    assert quality == 85
    assert lower < 85
    assert sum(map(len, small)) <= sum(map(len, best)) // 2 * 1.05


def test_a_huge_volume_is_thinned_where_it_is_finest(monkeypatch):
    assert pixels.steps_for((512, 512, 1000), (0.7, 0.7, 0.5)) == (1, 1, 1)
    assert pixels.steps_for((1024, 1024, 800), (0.3, 0.3, 1.0)) == (2, 2, 1)
    monkeypatch.setattr(pixels, "MOST_VOXELS", np.prod(SHAPE) // 2)
    oriented = oriented_from_volume(some_volume(), some_labels())
    steps = pixels.steps_for(oriented.geometry.shape, oriented.geometry.spacing_mm)
    assert steps == (1, 2, 1)


def test_a_thinned_volume_says_so_and_still_lies_right(page, monkeypatch):
    monkeypatch.setattr(pixels, "MOST_VOXELS", np.prod(SHAPE) // 2)
    viewer = page()
    assert "one of 2 voxels along posterior" in viewer.browser.value("document.querySelector('footer').innerText")
    assert viewer.slices() == [16, 6, 34]
    rows, columns = red_of(viewer.picture("coronal")).T
    assert len(rows) > 50
    assert columns.min() > viewer.picture("coronal").shape[1] / 2
