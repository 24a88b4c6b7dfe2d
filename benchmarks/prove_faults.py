"""Test on a running node what `ctflow serve` promises when things go wrong around it, and over time.

    python benchmarks/prove_faults.py mixed --series 12
    python benchmarks/prove_faults.py disk                  # as root: it mounts a small disk
    python benchmarks/prove_faults.py fuzz --count 2000
    python benchmarks/prove_faults.py soak --series 2000
    python benchmarks/prove_faults.py down --minutes 60
    python benchmarks/prove_faults.py clock                 # with a C compiler: see set_clock.c

As prove_node.py, whose node, sender and destination these use: one JSON document as the last line of standard output,
and exit code 1 if a promise is broken. --tls before the command: TLS in and out, with certificates of both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from prove_node import (
    Archive,
    Certificates,
    Node,
    association,
    base_series,
    renamed,
    say,
    small_bundle,
    wait_for,
    working_folder,
)
from prove_node import (
    http as asked,
)
from pydicom.dataset import Dataset

from ctflow import __version__

HOUR_S = 3600
DELIVERED = "SELECT count(*) FROM series WHERE state = 'delivered'"
LEFT = "SELECT count(*) FROM series WHERE state NOT IN ('delivered', 'aside', 'dead')"


def stored(node: Node, series: Sequence[Dataset]) -> list[int]:
    """Send by C-STORE; the status of each, -1 where there was no answer."""
    found = [-1] * len(series)
    with contextlib.suppress(OSError, RuntimeError, ValueError), association(node) as to:
        for number, dataset in enumerate(series):
            found[number] = int(to.send_c_store(dataset).get("Status", -1)) if to.is_established else -1
    return found


def posted(node: Node, series: Sequence[Dataset]) -> list[int]:
    """Send by STOW-RS, all in one request; 0 for each that the answer confirms, else -1."""
    parts = []
    for dataset in series:
        stream = BytesIO()
        dataset.save_as(stream, enforce_file_format=True)
        parts.append(b"--PROVE\r\nContent-Type: application/dicom\r\n\r\n" + stream.getvalue() + b"\r\n")
    kind = 'multipart/related; type="application/dicom"; boundary=PROVE'
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        connection = http.client.HTTPConnection("127.0.0.1", node.web_port, timeout=120)
        connection.request(
            "POST", "/dicom-web/studies", b"".join(parts) + b"--PROVE--\r\n",
            {"Content-Type": kind, "Accept": "application/dicom+json"},
        )  # fmt: skip
        answer = connection.getresponse()
        document = json.loads(answer.read())
        connection.close()
        taken = {each["00081155"]["Value"][0] for each in document.get("00081199", {}).get("Value", [])}
        return [0 if str(dataset.SOPInstanceUID) in taken else -1 for dataset in series]
    return [-1] * len(series)


def checked(node: Node, archive: Archive, series: Sequence[Sequence[Dataset]]) -> dict[str, Any]:
    """Every acknowledged instance is there, and each series has one SEG at the destination."""
    kept = {uid for (uid,) in node.ask("SELECT sop_instance_uid FROM instances")}
    segs = archive.segs_of_series()
    uids = [str(each[0].SeriesInstanceUID) for each in series]
    return {
        "series": len(series),
        "instances": sum(map(len, series)),
        "lost": sum(str(dataset.SOPInstanceUID) not in kept for each in series for dataset in each),
        "exactly_one_seg": sum(len(segs.get(uid, ())) == 1 for uid in uids),
        "not_delivered": node.ask("SELECT state, reason, message FROM series WHERE state != 'delivered'"),
    }


def is_whole(result: dict[str, Any]) -> bool:
    """Whether nothing is lost and each series has one SEG."""
    return not result["lost"] and result["exactly_one_seg"] == result["series"] and not result["not_delivered"]


def prove_mixed(series: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """Half of each series by C-STORE and half by STOW-RS at once, some instances by both, and three kill -9."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        node = Node(folder / "node", bundle or small_bundle(folder), 2.0, archive.port, certificates)
        base = base_series(folder)
        made = [renamed(base, f"mixed {number}") for number in range(series)]
        node.start()

        def send(way: Callable[[Node, Sequence[Dataset]], list[int]], part: slice) -> None:
            for each in made:
                waiting = list(each[part])
                while waiting:
                    answers = way(node, waiting)
                    waiting = [dataset for dataset, status in zip(waiting, answers, strict=True) if status != 0]
                    time.sleep(0.2 if waiting else 0)

        half = len(base) // 2
        threads = [
            threading.Thread(target=send, args=(stored, slice(0, half + 3))),
            threading.Thread(target=send, args=(posted, slice(half, None))),
        ]
        for each in threads:
            each.start()
        kills = 0
        while any(each.is_alive() for each in threads) and kills < 3:
            time.sleep(4)
            node.kill()
            node.start()
            kills += 1
        for each in threads:
            each.join()
        wait_for(lambda: node.ask(LEFT)[0][0] == 0, "every series is delivered", 600)
        result = {"kills": kills, **checked(node, archive, made)}
        node.stop()
        archive.close()
    return result


def prove_disk(bundle: Path | None, tls: bool) -> dict[str, Any]:
    """A disk of 24 MB that others fill in the middle of a series: refused, not lost, and all is well after it."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        node = Node(folder / "node", bundle or small_bundle(folder), 1.0, archive.port, certificates)
        node.data.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", node.data], check=True)
        try:
            base = base_series(folder)
            made = [renamed(base, f"disk {number}") for number in range(4)]
            node.start()
            first = stored(node, made[0])
            filler = node.data / "filler"
            second = stored(node, made[1][:7])
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
            full = stored(node, made[1][7:]) + stored(node, made[2])
            alive = asked(node.web_port, "/healthz")
            time.sleep(3)
            filler.unlink()
            again = [status for each in made[1:] for status in stored(node, each)]
            wait_for(lambda: node.ask(LEFT)[0][0] == 0, "every series is delivered", 300)
            result = {
                "before": dict(Counter(first + second)),
                "while_full": {f"{each:04X}": count for each, count in Counter(full).items()},
                "after": dict(Counter(again)),
                "answered_while_full": alive.startswith(b"HTTP/1.1 200"),
                **checked(node, archive, made),
            }  # fmt: skip
            node.stop()
        finally:
            subprocess.run(["umount", "-l", node.data], check=False)
        archive.close()
    return result


def prove_down(minutes: float, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """A destination that is down for so long, while a series comes each minute; kill -9 in the middle."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        port = archive.port
        archive.close()
        node = Node(folder / "node", bundle or small_bundle(folder), 1.0, port, certificates)
        base, made = base_series(folder), []
        node.start()
        begun = time.monotonic()
        while (minute := len(made)) < minutes:
            made.append(renamed(base, f"down {minute}"))
            if any(status != 0 for status in stored(node, made[-1])):
                raise SystemExit(f"series {minute} was not acknowledged")
            if minute == int(minutes / 2):
                node.kill()
                node.start()
            time.sleep(max(begun + 60 * len(made) - time.monotonic(), 0))
        waiting = node.ask("SELECT count(*) FROM deliveries WHERE state = 'waiting'")[0][0]
        memory, descriptors = node.resident_mb(), node.descriptors()
        back = time.monotonic()
        archive = Archive(certificates, port)
        wait_for(lambda: node.ask(LEFT)[0][0] == 0, "every series is delivered", 300)
        result = {
            "minutes_down": round((back - begun) / 60, 1), "objects_waiting": waiting,
            "node_mb": round(memory, 1), "descriptors": descriptors,
            "delivered_s_after_it_is_back": round(time.monotonic() - back, 1),
            "objects_received": len(archive.received), **checked(node, archive, made), "exit_code": node.stop(),
        }  # fmt: skip
        archive.close()
    return result


class SetClock:
    """The clock that a node sees (set_clock.c)."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "set_clock.so", folder / "set_clock"
        source = Path(__file__).with_name("set_clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "SET_CLOCK": str(self._file)}

    def set_by(self, seconds: int) -> None:
        """Set it to so many seconds after the true one."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", seconds))


def prove_clock(bundle: Path | None, tls: bool) -> dict[str, Any]:
    """The clock set back by an hour and by a day, in the middle of series and of retries, and forward."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive, clock = Archive(certificates), SetClock(folder)
        port, base, made = archive.port, base_series(folder), []
        node = Node(
            folder / "node", bundle or small_bundle(folder), 2.0, port, certificates, environment=clock.environment
        )
        seconds: dict[str, float] = {}

        def step(name: str, seconds_from_now: int, *, is_down: bool = False) -> None:
            """Half a series, the clock, the other half: how long until all that came is delivered."""
            made.append(renamed(base, f"clock {name}"))
            half = len(base) // 2
            answers = stored(node, made[-1][:half])
            if is_down:
                node.kill()
            clock.set_by(seconds_from_now)
            if is_down:
                node.start()
            answers += stored(node, made[-1][half:])
            if any(status != 0 for status in answers):
                raise SystemExit(f"{name}: not acknowledged: {answers}")
            begun = time.monotonic()
            wait_for(lambda: node.ask(LEFT)[0][0] == 0, f"{name}: every series is delivered", 180)
            seconds[name] = round(time.monotonic() - begun, 1)

        node.start()
        wait_for(lambda: b'"ready": true' in asked(node.web_port, "/readyz"), "the worker is open")
        step("as it is", 0)
        archive.close()
        received = archive.received
        made.append(renamed(base, "clock retries"))
        stored(node, made[-1])
        wait_for(
            lambda: node.ask("SELECT 1 FROM deliveries WHERE state = 'waiting' AND last_error IS NOT NULL"),
            "the destination is found to be down",
        )
        clock.set_by(-HOUR_S)
        time.sleep(3)
        archive = Archive(certificates, port)
        archive.received = received
        step("back by an hour, with retries", -HOUR_S)
        step("back by a day, in the middle of a series", -HOUR_S - 24 * HOUR_S)
        step("back by another day while the node is down", -HOUR_S - 48 * HOUR_S, is_down=True)
        step("forward to the true time", 0)
        told = [text for (text,) in node.ask("SELECT text FROM events WHERE kind = 'clock-set' ORDER BY id")]
        result = {"seconds": seconds, "told": told, **checked(node, archive, made), "exit_code": node.stop()}
        result["revisions"] = node.ask("SELECT max(revision) FROM series")[0][0]
        archive.close()
    return result


def _broken(draws: random.Random, good: bytes) -> bytes:
    """A request with some bytes changed, cut, doubled or put in."""
    data = bytearray(good)
    for _ in range(draws.randint(1, 6)):
        place = draws.randrange(len(data)) if data else 0
        kind = draws.randrange(5)
        if kind == 0 and data:
            data[place] = draws.randrange(256)
        elif kind == 1:
            del data[place : place + draws.randint(1, 200)]
        elif kind == 2:
            data[place:place] = draws.randbytes(draws.randint(1, 64))
        elif kind == 3:
            data[place : place + 4] = draws.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        else:
            data[place:place] = data[place : place + draws.randint(1, 300)]
    return bytes(data)


def _recorded(folder: Path) -> list[bytes]:
    """What a sender puts on the wire for an association with an image, recorded from a connection to a deaf port."""
    from pynetdicom import AE, evt  # noqa: PLC0415

    sent: list[bytes] = []
    ae = AE("REC")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1")
    ae.add_supported_context("1.2.840.10008.1.1")
    handlers = [(evt.EVT_C_STORE, lambda event: 0), (evt.EVT_DATA_RECV, lambda event: sent.append(bytes(event.data)))]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    stand_in = Node(folder / "none", folder, port=server.server_address[1])
    with association(stand_in) as to:
        to.send_c_echo()
        to.send_c_store(base_series(folder)[0])
    server.shutdown()
    return sent


def prove_fuzz(count: int, seed: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """Damaged DIMSE and HTTP requests; after each hundred the node answers, and nothing is where it should not be."""
    draws = random.Random(seed)  # noqa: S311  # no secret
    with working_folder() as folder:
        node = Node(
            folder / "node",
            bundle or small_bundle(folder),
            quiet_s=HOUR_S,
            limits="{free_disk: 1 MB, idle_s: 3}",
        )
        wire = _recorded(folder / "recorded")
        forms = [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /series/00?state=dead&q=x HTTP/1.1\r\nHost: localhost\r\nCookie: ctflow=aaaa\r\n\r\n",
            b"POST /series/" + b"0" * 32 + b"/retry HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n\r\ntoken=0123",
            b"POST /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b'Content-Type: multipart/related; type="application/dicom"; boundary=B\r\n\r\n'
            b"40\r\n--B\r\nContent-Type: application/dicom\r\n\r\nDICMDICMDICMDICMDICMDIC"
            b"\r\n\r\n--B--\r\n\r\n0\r\n\r\n",
        ]
        node.start()
        wait_for(lambda: b'"ready": true' in asked(node.web_port, "/readyz"), "the worker is open")
        before, outcomes, slowest = node.descriptors(), Counter[str](), 0.0
        for number in range(count):
            is_http = number % 2
            good = draws.choice(forms) if is_http else b"".join(wire[: draws.randint(1, len(wire))])
            outcomes[_sent(node.web_port if is_http else node.port, _broken(draws, good))] += 1
            if number % 100 == 99:
                start = time.monotonic()
                with association(node) as to:
                    echo = to.send_c_echo().get("Status", -1) if to.is_established else -1
                slowest = max(slowest, time.monotonic() - start)
                if echo != 0 or not asked(node.web_port, "/healthz").startswith(b"HTTP/1.1 200"):
                    raise SystemExit(f"the node does not answer after {number + 1} requests")
                say(f"{number + 1} requests, {node.memory_mb():.0f} MB")
        deadline = time.monotonic() + 120
        while (left := node.descriptors()) > before + 8 and time.monotonic() < deadline:
            time.sleep(0.5)
        log = (node.folder / "log").read_text()
        return {
            "requests": count, "outcomes": dict(outcomes), "slowest_echo_s": round(slowest, 3),
            "node_memory_mb": round(node.memory_mb(), 1), "descriptors": [before, left],
            "tracebacks": tracebacks(log),
            "exit_code": node.stop(),
        }  # fmt: skip


def tracebacks(log: str) -> list[str]:
    """Each traceback of a log: where it ends, and its error."""
    found = []
    for text in log.split("Traceback (most recent call last):")[1:]:
        lines = text.splitlines()
        end = next((number for number, line in enumerate(lines) if line[:1] not in ("", " ")), len(lines) - 1)
        places = [line.strip() for line in lines[:end] if line.startswith('  File "')]
        found.append(f"{places[-1] if places else ''}: {lines[end]}")
    return found


def _sent(port: int, data: bytes) -> str:
    """Send bytes and wait for the other side, which must answer or close; how it ended."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        except TimeoutError:
            return "no answer"
        except OSError:
            return "reset"
    return "answer" if answer else "closed"


def prove_soak(series: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """Many small series one after another: memory and descriptors of the node's process stay as they are."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        more = ["retention: {instances_days: 0.001, results_days: 0.001}", "cases_in_flight: 2"]
        node = Node(folder / "node", bundle or small_bundle(folder), 0.3, archive.port, certificates, more)
        base = base_series(folder)[:16]  # the fewest slices that run
        node.start()
        wait_for(lambda: b'"ready": true' in asked(node.web_port, "/readyz"), "the worker is open")
        samples, begun = [], time.monotonic()
        for number in range(series):
            if any(status != 0 for status in stored(node, renamed(base, f"soak {number}"))):
                raise SystemExit(f"series {number} was not acknowledged")
            wait_for(lambda number=number: number - node.ask(DELIVERED)[0][0] < 40, "results keep up", 300)
            if aside := node.ask("SELECT reason, message FROM series WHERE state IN ('aside', 'dead') LIMIT 1"):
                raise SystemExit(f"not delivered: {aside[0]}")
            if number % max(series // 20, 1) == 0:
                samples.append(
                    {"series": number, "mb": round(node.resident_mb(), 1), "descriptors": node.descriptors()}
                )
                say(json.dumps(samples[-1]))
        wait_for(lambda: node.ask(LEFT)[0][0] == 0, "every series is delivered", 600)
        seconds = time.monotonic() - begun
        samples.append({"series": series, "mb": round(node.resident_mb(), 1), "descriptors": node.descriptors()})
        exactly_one = sum(len(each) == 1 for each in archive.segs_of_series().values())
        result = {
            "series": series, "seconds": round(seconds), "exactly_one_seg": exactly_one, "samples": samples,
            "exit_code": node.stop(),
        }  # fmt: skip
        archive.close()
    return result


def is_flat(result: dict[str, Any]) -> bool:
    """Whether the second half of the run took no more memory or descriptors than the first, but for a little."""
    samples = result["samples"]
    early = samples[len(samples) // 4 : len(samples) // 2 + 1]
    late = samples[len(samples) // 2 + 1 :]
    grown = max(each["mb"] for each in late) - max(each["mb"] for each in early)
    return grown < 15 and max(each["descriptors"] for each in late) <= max(each["descriptors"] for each in early) + 10


PROMISES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "mixed": is_whole,
    "disk": lambda r: is_whole(r) and r["answered_while_full"] and set(r["while_full"]) <= {"A700", "-001"},
    "fuzz": lambda r: (
        r["exit_code"] == 0 and not r["tracebacks"] and r["node_memory_mb"] <= 256 and "no answer" not in r["outcomes"]
    ),
    "down": lambda r: is_whole(r) and r["objects_received"] == 2 * r["series"] and r["exit_code"] == 0,
    "clock": lambda r: is_whole(r) and max(r["seconds"].values()) <= 60 and r["revisions"] == 1 and r["exit_code"] == 0,
    "soak": lambda r: r["exactly_one_seg"] == r["series"] and is_flat(r) and r["exit_code"] == 0,
}


def main() -> int:
    """Run one proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="MONAI bundle (default: a small untrained one is made)")
    parser.add_argument("--tls", action="store_true", help="TLS with certificates of both sides, in and out")
    proofs = parser.add_subparsers(dest="proof", required=True)
    proofs.add_parser("mixed").add_argument("--series", type=int, default=12)
    proofs.add_parser("disk")
    fuzz = proofs.add_parser("fuzz")
    fuzz.add_argument("--count", type=int, default=2000)
    fuzz.add_argument("--seed", type=int, default=0)
    proofs.add_parser("soak").add_argument("--series", type=int, default=2000)
    proofs.add_parser("down").add_argument("--minutes", type=float, default=60)
    proofs.add_parser("clock")
    given = vars(parser.parse_args())
    proof = given.pop("proof")
    tried = {"mixed": prove_mixed, "disk": prove_disk, "fuzz": prove_fuzz, "soak": prove_soak, "down": prove_down,
             "clock": prove_clock}[proof]  # fmt: skip
    begun = time.monotonic()
    result = tried(**given)
    kept = PROMISES[proof](result)
    document = {
        "proof": proof, "tls": given["tls"], "promise_kept": kept, "ctflow": __version__,
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0],
        "seconds_in_all": round(time.monotonic() - begun),
        "senders_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), **result,
    }  # fmt: skip
    sys.stdout.write(json.dumps(document) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
