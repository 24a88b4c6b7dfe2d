"""The user of this process, if the system does not know it: without an entry in passwd, a name or a home.

OpenShift and `docker run --user` start such containers. MONAI and PyTorch look up the user's name at import, which
raises a KeyError. Triton, and CuPy as soon as Holoscan imports it, make folders below the home; without one, these
are below a folder named "~" in the working directory.
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
    """Give one of ctflow's own processes, and its children, a user name and a folder for libraries' compiled code.

    Only if there are none; the folder is removed with the process. HOME is not changed: without one, there is no cache.
    """
    if not _has_name():
        os.environ["LOGNAME"] = _stand_in()
    wanted = [name for name in _FOLDERS if not os.environ.get(name)]
    if not wanted or _has_home():
        return
    try:
        folder = tempfile.mkdtemp(prefix="ctflow-home-")
    except OSError:  # nothing is writable: the compiling library will report it
        return
    os.environ.update(dict.fromkeys(wanted, folder))
    atexit.register(_remove, folder, os.getpid())


@contextmanager
def named_user() -> Iterator[None]:
    """Set a user name meanwhile: an import in another program's process must not change its environment."""
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
    """Whether "~" is a writable folder; without HOME and an entry in passwd it stays "~" itself."""
    home = Path("~")
    try:
        home = home.expanduser()
    except RuntimeError:
        return False
    return home.is_absolute() and os.access(home, os.W_OK | os.X_OK)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a fork inherits the exit handlers
        shutil.rmtree(folder, ignore_errors=True)
