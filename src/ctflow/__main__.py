"""`python -m ctflow` is the command `ctflow`."""

from __future__ import annotations

import sys

from ctflow.cli.start import main

if __name__ == "__main__":
    sys.exit(main())
