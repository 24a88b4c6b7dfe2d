"""Test on Ray clusters of this machine what `ctflow cohort run` promises (docs/cohort.md).

    python benchmarks/prove_cohort.py kill --rows 20000 --raylets 3 --kills 30
    python benchmarks/prove_cohort.py scale --raylets 1 2 4 --rows 60 --wait 1.0

The segmenter marks a box, and may wait as a GPU would: rows are what is tested. Each command prints one JSON document
as the last line of standard output; the exit code is 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cluster_proof import killed, scaled
from ctflow import __version__

NONE = ("lost", "double", "committed_again", "without_result", "results_too_many", "results_that_differ", "notes_left",
        "work_left", "processes_left")  # fmt: skip


def kill(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Kill workers, raylets and the driver at random moments: every row is committed once, as it should be."""
    found = killed(folder, given.rows, given.raylets, given.kills, given.killers, given.seed)
    is_kept = not any(found[name] for name in NONE) and not found["other_than_expected"]
    return found, is_kept and max(found["restarts_s"], default=0) <= 60


def scale(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Rows a second at several numbers of raylets."""
    rates = {count: scaled(folder / str(count), given.rows * count, count, given.wait) for count in given.raylets}
    first = rates[given.raylets[0]] / given.raylets[0]
    share = {count: round(rate / count / first, 3) for count, rate in rates.items()}
    return {"rows_a_second": rates, "of_linear": share}, min(share.values()) >= 0.9


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the cohort here")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("kill")
    one.add_argument("--rows", type=int, default=20000)
    one.add_argument("--raylets", type=int, default=3)
    one.add_argument("--kills", type=int, default=30)
    one.add_argument("--killers", type=int, default=3)
    one.add_argument("--seed", type=int, default=1)
    one.set_defaults(run=kill)
    one = commands.add_parser("scale")
    one.add_argument("--rows", type=int, default=60, help="a raylet")
    one.add_argument("--raylets", type=int, nargs="+", default=[1, 2, 4])
    one.add_argument("--wait", type=float, default=1.0)
    one.set_defaults(run=scale)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        begun = time.monotonic()
        found, is_kept = given.run(given, given.folder or Path(place))
        import ray  # noqa: PLC0415  # it reads the environment when imported

        found |= {
            "command": " ".join(sys.argv[1:]),
            "seconds_in_all": round(time.monotonic() - begun),
            "versions": {"ctflow": __version__, "ray": ray.__version__, "python": platform.python_version()},
            "kept": is_kept,
        }
        sys.stdout.write(json.dumps(found) + "\n")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
