"""The tables of docs/viewers.md, from what the tests of the viewers keep in docs/results/viewers.json.

python tests/viewer_table.py writes them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping

from viewer_record import RECORD

PAGE = RECORD.parents[1] / "viewers.md"
KINDS = ("OHIF", "adapters", "reader")
Record = Mapping[str, Mapping[str, Mapping[str, str]]]


def table(record: Record, kind: str) -> str:
    """A row for each form, a column for each version."""
    versions = sorted((name for name in record if name.startswith(kind)), key=_order, reverse=True)
    forms = sorted({form for version in versions for form in record[version]}, key=_place)
    head = ["form", *(version.removeprefix("reader ") for version in versions)]
    lines = [head, ["---"] * len(head)]
    lines += [[form, *(summary(record[version].get(form, {})) for version in versions)] for form in forms]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("| --- ", "|---").replace("--- |", "---|")


def summary(outcomes: Mapping[str, str]) -> str:
    """One outcome for all series if they agree; else the commonest, and the others' series."""
    if not outcomes:
        return "not tried"
    counted = Counter(outcomes.values())
    usual = "right" if "right" in counted and len(counted) > 1 else counted.most_common(1)[0][0]
    others = [f"{series}: {outcome}" for series, outcome in sorted(outcomes.items()) if outcome != usual]
    shown = usual if len(counted) > 1 or len(outcomes) > 2 else f"{usual} ({', '.join(sorted(outcomes))})"
    return "; ".join([shown, *others])


def _order(version: str) -> tuple[tuple[int, ...], str]:
    return tuple(int(number) for number in re.findall(r"\d+", version)), version


def _place(form: str) -> tuple[bool, str]:
    return form.startswith("report"), form


def page_with_tables(page: str, record: Record) -> str:
    """The page with its tables as they should be."""
    for kind in KINDS:
        start, end = f"<!-- table: {kind} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        assert found, f"docs/viewers.md has no place for the table of {kind}"
        page = f"{before}{start}\n{table(record, kind)}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(
        page_with_tables(PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text())), encoding="utf-8"
    )
