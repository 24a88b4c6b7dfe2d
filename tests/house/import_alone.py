"""Import each module in a process of its own, with the named packages hidden; forked, so that torch loads once."""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import sys
import warnings


class Hidden(importlib.abc.MetaPathFinder):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname} is hidden", name=fullname)


def main(blocked: set[str], names: list[str]) -> int:
    # Third parties that every installation has; loaded before the fork, as they take seconds.
    warnings.simplefilter("ignore")
    for heavy in ("torch", "monai.networks.nets", "pydicom", "highdicom", "scipy.ndimage", "rich.progress"):
        importlib.import_module(heavy)
    for optional in blocked:
        sys.modules.pop(optional, None)
    sys.meta_path.insert(0, Hidden(blocked))
    os.environ.clear()
    imported = []
    for name in names:
        pid = os.fork()
        if pid == 0:
            try:
                importlib.import_module(name)
            except BaseException as error:
                sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            imported.append(name)
    sys.stdout.write(json.dumps({"imported": imported}) + "\n")
    return 0 if imported == names else 1


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1].split()), sys.argv[2:]))
