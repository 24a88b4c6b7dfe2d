from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ctflow.core.errors import NotWritten
from ctflow.report import chart
from ctflow.report.chart import HEIGHT_PX, WIDTH_PX, write_exactness_chart
from ctflow.report.lettering import font_of, shortened
from ctflow.report.pen import PAPER

NOTICE = "RESEARCH ONLY - NOT FOR CLINICAL USE"
HEAD = np.s_[:60, WIDTH_PX // 2 :]
PLOT = np.s_[chart._TOP : chart._BOTTOM, chart._LEFT : chart._RIGHT]
STRIP = np.s_[chart._BOTTOM - 2 * chart._MISSED_PX : chart._BOTTOM, chart._LEFT : chart._RIGHT]


def row(low, high, dice, lesions=2):
    dice = dice if lesions else None
    sensitivity = 0.5 if lesions else None
    return {
        "from_mm": low,
        "to_mm": high,
        "lesions": lesions,
        "hits": lesions // 2,
        "sensitivity": sensitivity,
        "mean_dice": dice,
        "false_positives": 0,
        "false_positives_a_case": 0.0,
    }


def document_of(*lesions, means=(None, None, None), name="model", notice=None, engine=True):
    sizes = ((6.0, 10.0), (10.0, 20.0), (20.0, 60.0))
    rows = [row(*size, mean, 2 if mean is not None else 0) for size, mean in zip(sizes, means, strict=True)]
    return {
        "research_only": notice,
        "model": {"name": name, "version": "1"},
        "engine": {"backend": "eager", "precision": "fp32", "device": "cpu"} if engine else None,
        "cases": [
            {"lesions": [{"equivalent_diameter_mm": mm, "dice": dice, "hit": dice > 0} for mm, dice in lesions]},
            {"lesions": []},
        ],
        "summary": {
            "cases": 2,
            "cases_with_truth": 1,
            "mean_dice": 0.5 if lesions else None,
            "tumour_free": {"cases": 1, "clean": 1, "limit_ml": 0.2},
            "overall": row(0, 1000, 0.5 if lesions else None, len(lesions)),
            "by_size": rows,
        },
    }


@pytest.fixture
def draw(tmp_path):
    def make(*lesions, **options):
        path = tmp_path / "evaluation.png"
        write_exactness_chart(document_of(*lesions, **options), path)
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    return make


def places(picture, where, hue):
    """(down, across) pixels of the picture that look like one of the chart's colours."""
    red, green, blue = (picture[where][..., channel] for channel in range(3))
    if hue == "found":
        like = (blue - red > 90) & (blue > green + 30)
    elif hue == "missed":
        like = (red - green > 90) & (np.abs(green - blue) < 30)
    else:  # mean and notice: amber
        like = (red - blue > 100) & (green - blue > 25)
    down, across = np.nonzero(like)
    return down + (where[0].start or 0), across + (where[1].start or 0)


def test_a_lesion_stands_where_its_size_and_dice_say(draw):
    scale = chart._Scale(chart._LEAST_MM, chart._MOST_MM)
    for diameter, dice in ((8.0, 0.25), (30.0, 0.9), (15.0, 0.02)):
        down, across = places(draw((diameter, dice)), PLOT, "found")
        assert across.mean() == pytest.approx(scale.x(diameter), abs=1.5)
        assert down.mean() == pytest.approx(scale.y(dice), abs=1.5)
        assert 60 < len(down) < 140, "one dot"


def test_the_axes_run_the_right_way():
    scale = chart._Scale(5, 80)
    assert scale.x(5) == chart._LEFT
    assert scale.x(80) == pytest.approx(chart._RIGHT)
    assert scale.x(20) - scale.x(10) == pytest.approx(scale.x(40) - scale.x(20)), "logarithmic"
    assert scale.y(1.0) == chart._TOP
    assert scale.y(0.0) > scale.y(0.5) > scale.y(1.0)
    assert scale.x(1) == chart._LEFT, "nothing leaves the frame"


def test_a_missed_lesion_is_a_cross_below_zero(draw):
    picture = draw((12.0, 0.0))
    down, across = places(picture, STRIP, "missed")
    scale = chart._Scale(chart._LEAST_MM, chart._MOST_MM)
    assert across.mean() == pytest.approx(scale.x(12.0), abs=1.5)
    assert down.mean() == pytest.approx(chart._BOTTOM - chart._MISSED_PX, abs=1.5)
    assert len(places(picture, PLOT, "found")[0]) == 0
    assert len(places(draw((12.0, 0.5)), STRIP, "missed")[0]) == 0


def test_smaller_and_larger_lesions_stay_on_the_picture(draw):
    picture = draw((1.0, 0.5), (12.0, 0.5), (150.0, 0.5))
    _, across = places(picture, PLOT, "found")
    groups = np.split(np.sort(across), np.flatnonzero(np.diff(np.sort(across)) > 20) + 1)
    assert len(groups) == 3
    assert all(60 < len(group) < 140 for group in groups)


def test_each_size_class_shows_its_mean(draw):
    picture = draw((8.0, 0.5), means=(0.2, 0.6, 0.9))
    scale = chart._Scale(chart._LEAST_MM, chart._MOST_MM)
    down, across = places(picture, PLOT, "mean")
    for low, high, mean in ((6, 10, 0.2), (10, 20, 0.6), (20, 60, 0.9)):
        inside = (across > scale.x(low) + 3) & (across < scale.x(high) - 3)
        assert down[inside].mean() == pytest.approx(scale.y(mean), abs=1.5)
        assert len(set(across[inside])) > 0.95 * (scale.x(high) - scale.x(low) - 8)
    assert len(places(draw((8.0, 0.5)), PLOT, "mean")[0]) == 0


def test_bands_are_shaded_between_the_limits(draw):
    picture = draw()
    scale = chart._Scale(chart._LEAST_MM, chart._MOST_MM)
    y = round(scale.y(0.9))
    shades = [tuple(picture[y, round(scale.x(mm))]) for mm in (5.5, 7, 15, 30, 65)]
    assert shades == [PAPER, chart._BAND, chart._BAND_OTHER, chart._BAND, PAPER]


def test_research_only_is_said_beside_any_name(draw):
    seen = []
    for name, notice in (("m", NOTICE), ("m" * 300 + "\n\x00", NOTICE), ("m", None)):
        picture = draw((8.0, 0.5), name=name, notice=notice)
        mask = np.zeros(picture.shape[:2], bool)
        mask[places(picture, HEAD, "mean")] = True
        seen.append(mask)
    assert seen[0].sum() > 300
    assert np.array_equal(seen[0], seen[1])
    assert not seen[2].any()


def test_the_name_is_drawn(draw):
    one, other = draw(name="one"), draw(name="other")
    changed = np.argwhere((one != other).any(axis=-1))
    assert len(changed) > 50
    assert changed[:, 0].max() < 60, "and nothing else changes"


@pytest.mark.parametrize("lesions", [(), ((8.0, 0.5),), tuple((6 + 0.05 * n, 0.9) for n in range(1000))])
def test_the_picture_has_one_size_and_free_margins(draw, lesions):
    picture = draw(*lesions, means=(0.5, 0.5, 0.5), notice=NOTICE, engine=bool(lesions))
    assert picture.shape == (HEIGHT_PX, WIDTH_PX, 3)
    for edge in (picture[:20], picture[-15:], picture[:, :15], picture[:, -20:]):
        assert (edge == 255).all()


def test_no_lesions_are_said(draw):
    middle = np.s_[380:420, 500:740]
    assert (draw()[middle] < 150).any()
    assert not (draw((8.0, 0.9))[middle] < 150).any()


def test_edges_are_smooth(draw):
    """Between the dot and the paper lie colours that are neither."""
    picture = draw((8.0, 0.5))
    assert len({tuple(pixel) for pixel in picture[PLOT].reshape(-1, 3).tolist()}) > 30


def test_the_same_document_gives_the_same_bytes(draw, tmp_path):
    draw((8.0, 0.5))
    first = (tmp_path / "evaluation.png").read_bytes()
    draw((8.0, 0.5))
    assert (tmp_path / "evaluation.png").read_bytes() == first


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotWritten, match=r"evaluation\.png"):
        write_exactness_chart(document_of(), tmp_path / "absent" / "evaluation.png")


def test_lines_are_shortened_to_their_room():
    assert shortened("short", 20, 500) == "short"
    assert shortened("a\nb\x00", 20, 500) == "a b "
    long = shortened("word " * 100, 20, 300)
    assert long.endswith("...")
    assert 250 < font_of(20).getlength(long) <= 300
