"""An instance is acknowledged when its file and the names of all folders above it are on the disk: strace looks on."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from needs import skip_without
from service_support import instance, store, wait_until

pytestmark = pytest.mark.e2e
NODE = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from service_support import RunningScp
node = RunningScp(Path(sys.argv[2]))
print(node.port, flush=True)
sys.stdin.read()
node.close()
"""
CALLS = "fsync,fdatasync,rename,renameat,renameat2,sendto"
# A call is on one line, or begins on one and ends on another; other threads write in between.
LINE = re.compile(
    r"^(?P<thread>\d+) +(?:<\.\.\. )?(?P<call>\w+)(?: resumed>|\()(?P<rest>.*?)(?P<unfinished> <unfinished \.\.\.>)?$"
)
STORE_RESPONSE = re.compile(r"\\x04\\x00.*?\\x01\\x80")  # a P-DATA-TF with the command field 0x8001


def ended_calls(log: Path) -> list[tuple[str, str]]:
    """Name and arguments of every successful call, in the order in which they ended; sends in the order they began."""
    begun: dict[str, str] = {}
    found = []
    for line in log.read_text().splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        call, rest = match["call"], begun.pop(match["thread"], "") + match["rest"]
        if match["unfinished"]:
            begun[match["thread"]] = rest
        is_send = call == "sendto"
        if "resumed" not in line if is_send else rest.endswith("= 0"):
            found.append((call, rest))
    return found


def test_no_answer_leaves_before_the_disk_has_the_file_and_all_its_folders(tmp_path):
    """Four associations at once begin the same series, twice over."""
    if shutil.which("strace") is None:
        skip_without("strace")
    log, data = tmp_path / "strace", tmp_path / "data"
    script = [sys.executable, "-c", NODE, str(Path(__file__).parents[1]), str(data)]
    traced = ["strace", "-f", "-qq", "-y", "-xx", "-s", "400", "--seccomp-bpf", "-e", f"trace={CALLS}", "-o", str(log)]
    with subprocess.Popen([*traced, *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline())
            sent = []
            for series in ("1.2.3", "1.2.4"):
                numbers = range(len(sent) + 1, len(sent) + 5)
                images = [instance(number, SeriesInstanceUID=series) for number in numbers]
                with ThreadPoolExecutor(4) as pool:
                    assert list(pool.map(lambda image: store(port, image), images)) == [[0]] * 4
                sent += images
            process.stdin.close()
            wait_until(lambda: process.poll() is not None, "the node ends")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == 0
    calls = ended_calls(log)
    (inbox,) = (path for path in data.iterdir() if path.is_dir())
    for image in sent:
        check_order(calls, inbox, str(image.SOPInstanceUID))


def check_order(calls: list[tuple[str, str]], inbox: Path, uid: str) -> None:
    """What was synced before the answer for an instance left."""
    escaped = "".join(f"\\x{byte:02x}" for byte in uid.encode())
    (answer,) = (
        position
        for position, (call, rest) in enumerate(calls)
        if call == "sendto" and STORE_RESPONSE.search(rest) and re.search(rf"{re.escape(escaped)}(?!\\x3[0-9])", rest)
    )
    digest = hashlib.sha256(uid.encode()).hexdigest()[:32]
    (file,) = inbox.glob(f"*/*/{digest}-*.dcm")
    before = [(call, rest) for call, rest in calls[:answer] if call in ("fsync", "fdatasync")]

    def position_of(path: Path) -> int:
        name = "".join(f"\\x{byte:02x}" for byte in str(path).encode())
        found = [number for number, (_, rest) in enumerate(before) if f"<{name}>" in rest or f"<{path}>" in rest]
        assert found, f"{path.relative_to(inbox.parent)} was not synced before the answer"
        return found[-1] if path != file else found[0]

    written = position_of(file)
    assert written < position_of(file.parent), "the name of the file is synced after the file"
    for folder in (file.parent.parent, inbox, inbox.parent):
        position_of(folder)
    journal = [number for number, (_, rest) in enumerate(before) if "journal" in rest or "\\x6a\\x6f\\x75\\x72" in rest]
    assert journal, "the journal was not synced before the answer"
    assert written < journal[-1], "the journal knows the file after the disk has it"
    assert not any(call.startswith("rename") for call, _ in calls), "a file has its name from its first byte on"
