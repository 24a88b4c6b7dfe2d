"""Who runs this process, where the system does not know: a user without an entry in passwd, a name or a home.

OpenShift and `docker run --user` start containers so. MONAI and PyTorch ask for the user's name when they are imported,
which is a KeyError. Triton, and CuPy as soon as Holoscan imports it, make folders below the home; without one, that is
below a folder named "~" in the working directory.
"""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDERS = ("TRITON_HOME", "CUPY_CACHE_DIR")


def name_user() -> None:
    """Give a process of ctflow's own, and those that it starts, a user name and a folder for what libraries compile.

    Only where there are none; the folder goes with the process. HOME stays as it is: without one, there is no cache.
    """
    if not _has_name():
        os.environ["LOGNAME"] = _stand_in()
    wanted = [name for name in _FOLDERS if not os.environ.get(name)]
    if not wanted or _has_home():
        return
    try:
        folder = tempfile.mkdtemp(prefix="ctflow-home-")
    except OSError:  # nothing can be written anywhere: who compiles will say so
        return
    os.environ.update(dict.fromkeys(wanted, folder))
    atexit.register(_remove, folder, os.getpid())


@contextmanager
def named_user() -> Iterator[None]:
    """Have a user name meanwhile: an import in somebody else's process must leave its environment as it is."""
    if _has_name():
        yield
        return
    os.environ["LOGNAME"] = _stand_in()
    try:
        yield
    finally:
        del os.environ["LOGNAME"]


def _stand_in() -> str:
    return f"uid-{os.getuid()}"


def _has_name() -> bool:
    try:
        return bool(getpass.getuser())
    except (KeyError, OSError):  # OSError since Python 3.13
        return False


def _has_home() -> bool:
    """Whether "~" is a folder that can be written; without HOME and an entry in passwd it stays "~" itself."""
    home = Path("~")
    try:
        home = home.expanduser()
    except RuntimeError:
        return False
    return home.is_absolute() and os.access(home, os.W_OK | os.X_OK)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a fork inherits what is to be done at the end
        shutil.rmtree(folder, ignore_errors=True)
