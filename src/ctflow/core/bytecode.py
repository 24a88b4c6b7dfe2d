"""Byte code of the modules that a process has imported, which the next process need not compile."""

from __future__ import annotations

import compileall
import sys
from pathlib import Path
from types import ModuleType


def compile_imported() -> tuple[int, int]:
    """Compile every imported module that has no byte code file.

    Python itself writes none where PYTHONDONTWRITEBYTECODE is set, and pip none with --no-compile: torch alone then
    takes 2 s longer to import, each time.

    Returns:
        How many modules were compiled, and of how many the byte code could not be written.
    """
    compiled = failed = 0
    for module in [each for each in sys.modules.values() if isinstance(each, ModuleType)]:
        spec = vars(module).get("__spec__")
        source, target = (getattr(spec, name, None) for name in ("origin", "cached"))
        if not source or not target or not source.endswith(".py") or Path(target).exists():
            continue
        compileall.compile_file(source, quiet=2)
        if Path(target).exists():
            compiled += 1
        else:
            failed += 1
    return compiled, failed
