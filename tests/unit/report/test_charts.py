from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from comparison_support import ROWS, comparison_document, comparison_row
from ctflow.core.errors import NotWritten
from ctflow.report import charts
from ctflow.report.charts import can_draw, comparison_figure, exactness_figure, write_chart
from reasons import raises_reason

NOTICE = "RESEARCH ONLY - NOT FOR CLINICAL USE"


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


def axes_of(*lesions, **options):
    (axes,) = exactness_figure(document_of(*lesions, **options)).axes
    return axes


def points(axes, label) -> np.ndarray:
    (found,) = (each for each in axes.collections if each.get_label() == label)
    return np.asarray(found.get_offsets())


def words_of(figure) -> list[str]:
    return [text.get_text() for each in (figure, *figure.axes) for text in each.texts]


def picture_of(figure, path) -> np.ndarray:
    write_chart(figure, path)
    return np.asarray(Image.open(path).convert("RGB"))


# ------------------------------------------------------------------------------------------------------- evaluation


def test_a_lesion_stands_where_its_size_and_dice_say():
    axes = axes_of((8.0, 0.25), (30.0, 0.9), (12.0, 0.0))
    assert axes.get_xscale() == "log"
    assert points(axes, "a lesion that was found").tolist() == [[8.0, 0.25], [30.0, 0.9]]
    assert points(axes, "missed (Dice 0)").tolist() == [[12.0, charts._MISSED_AT]]
    ticks = dict(zip(axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()], strict=True))
    assert ticks[charts._MISSED_AT] == "missed"
    assert ticks[0.0] == "0.0"


def test_smaller_and_larger_lesions_stay_on_the_picture():
    axes = axes_of((1.0, 0.5), (12.0, 0.5), (150.0, 0.5))
    low, high = axes.get_xlim()
    assert low < 1.0
    assert high > 150.0
    assert axes_of((12.0, 0.5)).get_xlim() == (charts._LEAST_MM, charts._MOST_MM)


def test_each_size_class_has_its_band_its_figures_and_its_mean():
    axes = axes_of((8.0, 0.5), means=(0.2, None, 0.9))
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert bands == [(6.0, 10.0), (10.0, 20.0), (20.0, 60.0)]
    means = [each.get_segments()[0].tolist() for each in axes.collections if hasattr(each, "get_segments")]
    assert means == [[[6.0, 0.2], [10.0, 0.2]], [[20.0, 0.9], [60.0, 0.9]]]
    said = [text.get_text() for text in axes.texts]
    assert said == [
        *("6 to 10 mm", "1 of 2 found (50 %)", "mean Dice 0.20"),
        *("10 to 20 mm", "no lesions"),
        *("20 to 60 mm", "1 of 2 found (50 %)", "mean Dice 0.90"),
    ]


@pytest.mark.parametrize("name", ["m", "m" * 300 + "\n\x00", "W$x^$" * 60])
def test_research_only_is_said_beside_any_name(name):
    figure = exactness_figure(document_of((8.0, 0.5), name=name, notice=NOTICE))
    notice, title = figure.texts[:2]
    assert notice.get_text() == NOTICE
    assert notice.get_window_extent().x0 - title.get_window_extent().x1 > 20
    assert title.get_text().startswith(name[:10])
    assert title.get_text().isprintable()
    assert NOTICE not in words_of(exactness_figure(document_of((8.0, 0.5))))


def test_no_lesions_are_said():
    assert "no true lesions" in words_of(exactness_figure(document_of()))
    assert "no true lesions" not in words_of(exactness_figure(document_of((8.0, 0.9))))


@pytest.mark.parametrize("lesions", [(), ((8.0, 0.5),), tuple((6 + 0.05 * n, 0.9) for n in range(1000))])
def test_the_picture_has_one_size_and_free_margins(tmp_path, lesions):
    document = document_of(*lesions, means=(0.5, 0.5, 0.5), notice=NOTICE, engine=bool(lesions), name="m" * 300)
    picture = picture_of(exactness_figure(document), tmp_path / "evaluation.png")
    assert picture.shape == (760, 1200, 3)
    for edge in (picture[:20], picture[-15:], picture[:, :15], picture[:, -15:]):
        assert (edge == 255).all()


def test_the_same_document_gives_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        write_chart(exactness_figure(document_of((8.0, 0.5), name="\u5c71")), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="evaluation.png"):
        write_chart(exactness_figure(document_of()), tmp_path / "absent" / "evaluation.png")


def test_without_matplotlib_the_log_says_what_is_left_out_and_what_to_do(monkeypatch, caplog):
    assert can_draw("evaluation.png")
    assert not caplog.records
    monkeypatch.setattr(charts, "find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert not can_draw("evaluation.png")
    (record,) = caplog.records
    assert "evaluation.png" in record.message
    assert "pip install 'ctflow[bench]'" in record.message


# ------------------------------------------------------------------------------------------------------- comparison


def test_bars_are_as_long_as_their_seconds_on_a_logarithmic_scale():
    (axes,) = comparison_figure(comparison_document(*ROWS)).axes
    assert axes.get_xscale() == "log"
    assert [bar.get_width() for bar in axes.patches] == [4.2, 5.0, 1.25]
    top = [bar.get_y() for bar in axes.patches]
    assert top == sorted(top)
    assert axes.yaxis_inverted(), "the first is above"
    colours = [charts._COLOURS[name] for name in ("stock", "article", "ctflow")]
    assert [bar.get_facecolor() for bar in axes.patches] == [pytest.approx(rgba(each)) for each in colours]


def test_a_configuration_of_tensorrt_names_the_version_that_it_was_measured_with():
    rows = [comparison_row(name, "article", 4.0) for name in ("3", "2")]
    rows[0]["engine_info"] = {"versions": {"torch": "2.11.0", "tensorrt": "10.6.0"}}
    named = [text for text in words_of(comparison_figure(comparison_document(*rows))) if text[:2] in ("3 ", "2 ")]
    assert [text.endswith(" (10.6)") for text in named] == [True, False]


def rgba(colour: str) -> tuple[float, ...]:
    return (*(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)), 1.0)


@pytest.mark.parametrize(
    ("ids", "says", "factor"),
    [
        (("0a", "0c", "1"), "twice as fast as configuration 0c", "3.0 x"),
        (("0a", "1"), "twice as fast as configuration 0a", "2.5 x"),
        (("1",), "twice as fast as configuration 1", "4.0 x"),
        ((), None, None),
    ],
)
def test_factors_on_the_chart_are_to_stock_in_half_precision_if_it_was_measured(ids, says, factor):
    rows = [comparison_row(name, "article" if name == "1" else "stock", 4.0) for name in ids]
    rows.append(comparison_row("fused-fp16", "ctflow", 1.0))
    factors = {"factor_to_stock": 2.5, "factor_to_stock_half": 3.0, "factor_to_article": 4.0}
    rows[-1]["results"][0] |= factors if ids else dict.fromkeys(factors)
    drawn = words_of(comparison_figure(comparison_document(*rows)))
    assert [text.partition("; 2 x: ")[2] or None for text in drawn if "median of" in text] == [says]
    assert [text for text in drawn if text.startswith("1.00 s")] == [f"1.00 s   {factor}" if factor else "1.00 s"]


@pytest.mark.parametrize(("least", "most"), [(0.3, 5.0), (0.01, 0.02), (4.1, 4.2), (2.0, 2.0), (0.0, 0.0)])
def test_a_scale_has_ticks_and_keeps_inside(least, most, tmp_path):
    rows = [comparison_row("0a", "stock", most), comparison_row("fused-fp16", "ctflow", least)]
    figure = comparison_figure(comparison_document(*rows))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert low < max(least, 1e-4) <= max(most, 1e-4) < high
    assert (picture_of(figure, tmp_path / "compare.png")[:, -10:] == 255).all()


def test_nothing_measured_is_said(tmp_path):
    figure = comparison_figure(comparison_document(ROWS[2]))
    assert "no configuration could run here" in words_of(figure)
    assert picture_of(figure, tmp_path / "compare.png").shape[1] == 1280
