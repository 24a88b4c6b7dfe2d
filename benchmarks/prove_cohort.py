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

from cluster_proof import broken_promises, killed, scaled
from ctflow import __version__

TOLERANCE = 0.03  # a row may be seen a little late


def kill(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Kill workers, raylets and the driver at random moments: every row is committed once, as it should be."""
    found = killed(folder, given.rows, given.raylets, given.kills, given.killers, given.seed)
    broken = broken_promises(found, given.kills)
    return {**found, "broken": broken}, not broken


def scale(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Rows a second at several numbers of raylets: no fewer than the first one's share, no more than waits allow."""
    rates = {count: scaled(folder / str(count), given.rows * count, count, given.wait) for count in given.raylets}
    first = rates[given.raylets[0]] / given.raylets[0]
    share = {count: round(rate / count / first, 3) for count, rate in rates.items()}
    limit = {count: round(rate * given.wait / count, 3) for count, rate in rates.items()}
    is_kept = min(share.values()) >= 0.9 and max(limit.values()) <= 1 + TOLERANCE
    return {"rows_a_second": rates, "of_linear": share, "of_limit": limit}, is_kept


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
