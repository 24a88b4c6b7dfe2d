"""Import each module as the first of ctflow's, with the named packages hidden; a+b is b after a, its package.

Those that may load shared libraries (`--fork`) each get a process. Forking one that has torch is slow, so that the
others only find none of ctflow's modules imported yet.
"""

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


def imports_here(name: str) -> bool:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "ctflow"]:
        del sys.modules[loaded]
    try:
        for part in name.split("+"):
            importlib.import_module(part)
    except BaseException as error:
        sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
        return False
    return True


def imports_in_a_fork(name: str) -> bool:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if imports_here(name) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main(blocked: set[str], names: list[str], *, fork: bool) -> int:
    # Third parties that every installation has; loaded once, as they take seconds.
    warnings.simplefilter("ignore")
    for heavy in ("torch", "pydicom", "highdicom", "scipy.ndimage", "rich.progress"):
        importlib.import_module(heavy)
    for optional in blocked:
        sys.modules.pop(optional, None)
    sys.meta_path.insert(0, Hidden(blocked))
    os.environ.clear()
    imported = [name for name in names if (imports_in_a_fork(name) if fork else imports_here(name))]
    sys.stdout.write(json.dumps({"imported": imported}) + "\n")
    return 0 if imported == names else 1


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--fork"]
    sys.exit(main(set(words[0].split()), words[1:], fork="--fork" in sys.argv))
