"""docs/models.md says what records say: its tables cannot differ from docs/results, nor leave a tested model out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ctflow.core.errors import BundleInvalid
from ensemble_bundles import ENSEMBLES
from zoo_bundles import ZOO

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "models.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the rows of the table whose first heading this is."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def share(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """See `agreement_record`."""
    return json.loads((DOCS / "results" / "models-agreement.json").read_text())


def test_the_table_of_the_zoo_has_what_was_measured_of_every_bundle(measured):
    assert measured["zoo"].keys() == {f"{each.folder} {each.file}" for each in ZOO}
    found: dict[str, list[str]] = {}
    for names, _, loads, agrees, _ in rows_of("bundle of the zoo"):
        if not loads.startswith("no"):
            bundles = [name.removesuffix("_segmentation") for name in names.split(", ")]
            shares = agrees.split(", ")
            per_bundle = len(shares) // len(bundles)
            for number, bundle in enumerate(bundles):
                found[bundle] = shares[number * per_bundle : (number + 1) * per_bundle]
    expected: dict[str, list[str]] = {}
    for each in ZOO:
        expected.setdefault(each.folder, []).append(share(*measured["zoo"][f"{each.folder} {each.file}"]))
    assert found == expected


def test_the_table_of_ensembles_has_what_was_measured_of_each(measured):
    assert measured["ensembles"].keys() == {each.name for each in ENSEMBLES}
    found = {name: agrees for name, _, agrees in rows_of("ensemble of small UNets")}
    assert found == {name: share(*shares) for name, shares in measured["ensembles"].items()}


def test_the_table_of_nnunet_has_what_was_measured(measured):
    found = {case: [plain, full] for case, _, plain, full in rows_of("case")}
    assert found == {name: [*map(share, shares)] for name, shares in measured["nnunet"].items()}


def test_the_table_of_engines_is_the_record_of_networks():
    record = json.loads((DOCS / "results" / "networks-cpu.json").read_text())
    by_network: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        by_network.setdefault(row["network"], {})[row["engine"]] = row

    def seconds(row: dict[str, Any]) -> str:
        return f"{row['ms_a_window'] / 1000:.2f} ({row['gflop_a_window'] / row['ms_a_window'] * 1000:.0f})"

    expected = []
    for network, engines in by_network.items():
        eager, openvino = engines["eager"], engines["openvino"]
        size = f"{eager['million_weights']:g} M, {eager['gflop_a_window']:g}"
        figures = [seconds(eager), seconds(openvino), f"{openvino['times_eager_fp32']:.2f}"]
        expected.append([network, size, f"{eager['roi'][0]}^3", *figures, f"{openvino['relative_error']:.1e}"])
    assert [[row[0], *row[2:]] for row in rows_of("network | as in")] == expected
    fast = {name: figures for names, *_, figures in rows_of("bundle of the zoo") for name in names.split(", ")}
    shown = {row[1].split(",")[0]: f"{row[5].split(' ')[0]} s, {row[6]}" for row in rows_of("network | as in")}
    assert {name: text for name, text in shown.items() if name in fast} == {
        name: fast[name] for name in shown if name in fast
    }


def test_the_reasons_of_rejected_models_exist():
    reasons = {reason for _, cell, _ in rows_of("rejected") for reason in re.findall(r"`([^`]+)`", cell)}
    reasons |= {
        reason for *_, loads, _, _ in rows_of("bundle of the zoo") for reason in re.findall(r"no \(`(.+)`\)", loads)
    }
    assert "cascade" in reasons
    assert reasons <= BundleInvalid.REASONS
