"""`ctflow` as a program: the packages under it are checked before one of them is imported."""

from __future__ import annotations

import sys

from ctflow.errors import RequirementUnmet
from ctflow.requirements import check_requirements


def main() -> int:
    """Run the command line, or say in one line which package keeps it from running.

    Returns:
        The exit code by ctflow's table (`ctflow.errors`).
    """
    try:
        check_requirements()
    except RequirementUnmet as error:
        sys.stderr.write(f"ctflow: {type(error).__name__}: {error}\n")
        return error.exit_code
    from ctflow.cli.main import main as run  # noqa: PLC0415  # imports what was checked

    return run()
