"""Draw docs/images/compare.png from the records in docs/results, without measuring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctflow.report.charts import comparison_figure, write_chart

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Draw the configurations on two H200, then TensorRT 10.6 and `fused`, which ran together on another machine."""
    document = _record("compare-h200-x2.json")["comparison"]
    later = _record("tensorrt-10.6-h200.json")
    rows = [_later_row(name, found, later["date"]) for name, found in later["volumes"].items()]
    document["configurations"] += rows
    write_chart(comparison_figure(document), DOCS / "images" / "compare.png")


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))
    return record


def _later_row(name: str, found: dict[str, Any], date: str) -> dict[str, Any]:
    """A volume of `gpu_volume.py` as a configuration; without a speed-up, as stock MONAI did not run with it."""
    factors = dict.fromkeys(("factor_to_stock", "factor_to_stock_half", "factor_to_article"))
    result = {"overlap": found["overlap"], "windows": 144, "median_s": found["volume_s"], "reason": None, **factors}
    return {"id": name, "text": f"ctflow, {name}, {date}", "method": "ctflow", "reason": None, "results": [result]}


if __name__ == "__main__":
    main()
