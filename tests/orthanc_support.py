"""Debian's Orthanc, for programs that run in a network namespace, because Orthanc binds all addresses; and their start.

A test calls `ran_alone`; its program, which has a loopback and nothing else, calls `orthanc`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from needs import skip_without

HTTP, DICOM = 8042, 4242
PLUGINS = Path("/usr/share/orthanc/plugins")
DICOMWEB, PYTHON = PLUGINS / "libOrthancDicomWeb.so", PLUGINS / "libOrthancPython.so"  # packages of their own
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_START_S = 60.0


# -- what a test calls ------------------------------------------------------------------------------------------------


def needs_orthanc(*plugins: Path) -> None:
    """Skip the test where Orthanc, one of these plugins or a network namespace is not to be had."""
    if any(shutil.which(name, path=_PATH) is None for name in ("Orthanc", "unshare", "ip")):
        skip_without("Orthanc")
    for plugin in plugins:
        if not plugin.is_file():
            skip_without("Orthanc's DICOMweb" if plugin == DICOMWEB else "Orthanc")
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        skip_without("namespaces of its own")


def environment_alone(**more: str) -> dict[str, str]:
    """The environment of such a program: it imports the modules of tests."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def ran_alone(program: Path, *words: object, plugins: tuple[Path, ...] = (), timeout_s: float = 400, **more: str):
    """Run a program in a network namespace; what its last line says, in JSON."""
    needs_orthanc(*plugins)
    command = ["unshare", "-n", sys.executable, program, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, env=environment_alone(**more)
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# -- what its program calls -------------------------------------------------------------------------------------------


def begin_alone() -> None:
    """Have a loopback in the namespace."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def content(path: str, body: bytes | None = None, user: str = "") -> bytes:
    """Ask Orthanc over HTTP; `user` is NAME:PASSWORD."""
    request = urllib.request.Request(f"http://127.0.0.1:{HTTP}{path}", data=body)
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def ask(path: str, body: bytes | None = None, user: str = ""):
    """The same; what it answers in JSON."""
    return json.loads(content(path, body, user))


@contextlib.contextmanager
def orthanc(folder: Path, *, answers: Callable[[], object] | None = None, user: str = "", **settings) -> Iterator[None]:
    """An Orthanc that answers, with an empty store in `folder`; it writes `orthanc.log` there.

    Args:
        folder: That exists.
        answers: Says whether it answers, or raises an OSError; without it Orthanc is asked over HTTP.
        user: NAME:PASSWORD, where it asks for one.
        settings: Orthanc's own.
    """
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    name, _, password = user.partition(":")
    document = {
        "Name": "orthanc", "StorageDirectory": str(store), "IndexDirectory": str(store), "HttpPort": HTTP,
        "RemoteAccessAllowed": False, "AuthenticationEnabled": bool(user),
        "RegisteredUsers": {name: password} if user else {}, **settings,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(document))
    program = shutil.which("Orthanc", path=_PATH) or "Orthanc"
    with (folder / "orthanc.log").open("ab") as log:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log)
    try:
        _wait_for(answers or (lambda: ask("/system", user=user)))
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(answers: Callable[[], object]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError):
            if answers():
                return
        if time.monotonic() > deadline:
            raise SystemExit("Orthanc does not answer")
        time.sleep(0.05)
