"""Name of a bundle's folder in the image: the bundle's own name without anything that a path or manifest forbids."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_LONGEST = 100  # characters; the specification allows 128 bytes


def main() -> int:
    """Print the name for the bundle in the folder given as argument; 3 where its metadata.json cannot be read."""
    try:
        document = json.loads((Path(sys.argv[1]) / "configs" / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return 3
    if not isinstance(document, dict):
        return 3
    name = re.sub(r"[^a-z0-9]+", "_", str(document.get("name", "")).lower()).strip("_")[:_LONGEST]
    sys.stdout.write((name or "model") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
