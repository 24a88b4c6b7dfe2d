"""What every table on a terminal shares: its console, its columns, its numbers."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table


def console_on(stream: TextIO | None) -> Console:
    """A console on a stream; None takes standard output."""
    stream = stream or sys.stdout
    # A pipe has no width: lines are then as long as they need to be, so that paths stay whole.
    return Console(file=stream, soft_wrap=True, width=None if stream.isatty() else 180)


def new_table(headings: Collection[str], left: Collection[str] = ()) -> Table:
    """An empty table; the columns under the headings in `left` are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    return table


def number_text(value: float | None, decimals: int) -> str:
    """A cell."""
    return "-" if value is None else f"{value:.{decimals}f}"
