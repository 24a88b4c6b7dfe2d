"""What ctflow and the extras given as arguments need, one requirement a line, as pyproject.toml says."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Print the requirements."""
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    unknown = [extra for extra in sys.argv[1:] if extra not in known]
    if unknown:
        sys.stderr.write(f"--extra: ctflow has no {', '.join(unknown)}; it has {', '.join(known)}\n")
        return 64
    found = [*project["dependencies"], *(line for extra in sys.argv[1:] for line in known[extra])]
    sys.stdout.write("\n".join(dict.fromkeys(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
