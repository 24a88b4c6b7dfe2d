"""Search on with Hypothesis where `make test` always tries the same examples.

`python tests/random_search.py [--minutes M] [--seed N] [PATH ...]` runs every Hypothesis test in rounds, each with a
seed of its own (N, N + 1, ...), until no further round fits into M minutes. Every round prints its seed first; a
failure ends the search, and `--seed` with its number tries the same examples again.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-x", "-m", "hypothesis and not gpu and not map"),
    *("-p", "no:cacheprovider", "--hypothesis-profile=random"),
)


def search(minutes: float, seed: int, paths: list[str]) -> int:
    """Exit code of the first round that fails, else 0; 124 where one takes twice the whole time."""
    began = time.monotonic()
    longest, limit_s = 0.0, 60 * minutes
    while True:
        started = time.monotonic()
        sys.stdout.write(f"random search: seed {seed}\n")
        sys.stdout.flush()
        command = [*PYTEST, f"--hypothesis-seed={seed}", *paths]
        try:
            code = subprocess.run(command, cwd=REPOSITORY, check=False, timeout=max(2 * limit_s, 60)).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            sys.stdout.write(f"random search: seed {seed} failed; try it again with --seed {seed}\n")
            return code
        longest = max(longest, time.monotonic() - started)
        if time.monotonic() - began + longest > limit_s:
            return 0
        seed += 1


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("paths", nargs="*", default=["tests"])
    given = parser.parse_args(words)
    return search(given.minutes, given.seed, given.paths)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
