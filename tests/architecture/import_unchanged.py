"""Import every module of the library in one process, and print what that has changed of other libraries."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import sys
import warnings

# Imported before, as these themselves set warnings' filters and loggers when they are imported.
THIRD = ("pydicom.config", "pynetdicom", "highdicom", "torch", "scipy.special", "scipy.sparse", "scipy.ndimage")
WATCHED = ("pydicom", "pynetdicom", "highdicom", "pylibjpeg", "openjpeg", "gdcm")


def state() -> dict[str, object]:
    """What a process may rely on: each function, class and switch of the libraries, warnings, loggers, finders."""
    found: dict[str, object] = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] not in WATCHED:
            continue
        for key, value in list(vars(module).items()):
            if key.startswith("__") or isinstance(value, type(sys)):
                continue
            plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
            found[f"{name}.{key}"] = repr(value) if plain else id(value)
            if isinstance(value, type):
                found.update({f"{name}.{key}.{part}": id(each) for part, each in vars(value).items() if callable(each)})
    settings = sys.modules["pydicom.config"].settings
    found["pydicom.config.settings"] = repr(vars(settings))
    found["warnings.filters"] = [repr(each) for each in warnings.filters]
    found["warnings.showwarning"] = id(warnings.showwarning)
    for name in ("", *sorted(logging.root.manager.loggerDict)):
        if not name.startswith("ctflow"):
            logger = logging.getLogger(name)
            handlers = [repr(handler) for handler in logger.handlers]
            found[f"logger {name}"] = (logger.level, logger.disabled, logger.propagate, handlers, len(logger.filters))
    found["logging.disable"] = logging.root.manager.disable
    found["logging.lastResort"], found["logger class"] = id(logging.lastResort), id(logging.getLoggerClass())
    found["sys.meta_path"], found["sys.excepthook"] = [id(each) for each in sys.meta_path], id(sys.excepthook)
    found["walk_packages"], found["environment"] = id(pkgutil.walk_packages), dict(os.environ)
    return found


def main(names: list[str]) -> int:
    for name in THIRD:
        importlib.import_module(name)
    before = state()
    for name in names:
        importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after.get(key)]
    changed += [key for key in after if key.startswith("logger ") and key not in before and after[key][3]]
    imported = sum(name in sys.modules for name in names)
    monai = "monai" in sys.modules  # its import is changed (`compat/monai`), and so belongs to a call
    sys.stdout.write(json.dumps({"changed": changed, "imported": imported, "watched": len(before), "monai": monai}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
