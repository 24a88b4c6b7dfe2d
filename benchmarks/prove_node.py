"""Test on a running node what `ctflow serve` promises: kill -9, load, hostile UIDs, idle sockets, latency.

    python benchmarks/prove_node.py kill --count 100 --models 2
    python benchmarks/prove_node.py load --associations 25 --images 40
    python benchmarks/prove_node.py hostile --count 1000
    python benchmarks/prove_node.py idle --sockets 200
    python benchmarks/prove_node.py latency --repeats 3
    python benchmarks/prove_node.py workers --devices cuda:0,cuda:1 --series 64

--tls before the command: the node demands TLS and a certificate of its senders, the destination of the node.

Each command starts `ctflow serve` on loopback with a small untrained network (its marks do not matter here), sends to
it, and prints one JSON document as the last line of standard output. The exit code is 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from ctflow import __version__
from ctflow.compat.pynetdicom import keep_answers
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.identity import uid_from_parts
from ctflow.phantom import phantom_from_seed

REPOSITORY = Path(__file__).parents[1]
SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"
EXPLICIT = "1.2.840.10008.1.2.1"
PATIENCE_S = 180.0


def say(text: str) -> None:
    """Print a progress line."""
    sys.stderr.write(text + "\n")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(happened: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    """Wait for another process; end the benchmark if it does not happen."""
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            raise SystemExit(f"did not happen in {limit_s:g} s: {what}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Certificates:
    """An authority with a certificate for the node, its senders and its destination, as files."""

    ca: Path
    node: Any
    sender: Any

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """New ones (tests/certificate_support.py)."""
        sys.path.insert(0, str(REPOSITORY / "tests"))
        from certificate_support import Authority  # noqa: PLC0415

        authority = Authority(folder / "certificates")
        return cls(authority.ca, authority.issue("node"), authority.issue("sender"))

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Of the other side: it shows the senders' certificate, and demands one of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(self.sender.certificate, self.sender.key)
        context.load_verify_locations(self.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    @property
    def settings(self) -> list[str]:
        """Of the node."""
        return [f"tls: {{certificate: {self.node.certificate}, key: {self.node.key}, ca: {self.ca}}}"]

    @property
    def of_destination(self) -> str:
        """Of the node's destination."""
        return f", tls: {{ca: {self.ca}, certificate: {self.node.certificate}, key: {self.node.key}}}"

    @property
    def words(self) -> list[str]:
        """Of DCMTK's senders."""
        return ["+tls", str(self.sender.key), str(self.sender.certificate), "+cf", str(self.ca)]


class Archive:
    """The destination: keeps the headers of received objects."""

    def __init__(self, tls: Certificates | None = None, port: int = 0) -> None:
        self.received: list[Dataset] = []
        self.times: list[float] = []
        ae = AE("PACS")
        for abstract in (SEG, SR):
            ae.add_supported_context(abstract, EXPLICIT)
        handlers = [(evt.EVT_C_STORE, self._store)]
        context = tls.context(server=True) if tls else None
        self._server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers, ssl_context=context)
        self.port = self._server.server_address[1]

    def _store(self, event: Any) -> int:
        self.received.append(event.dataset)
        self.times.append(time.time())
        return 0x0000

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()

    def segs_of_series(self) -> dict[str, set[str]]:
        """Source SeriesInstanceUID -> SOPInstanceUIDs of its SEGs."""
        found: dict[str, set[str]] = defaultdict(set)
        for dataset in list(self.received):
            if dataset.SOPClassUID == SEG:
                found[dataset.ReferencedSeriesSequence[0].SeriesInstanceUID].add(dataset.SOPInstanceUID)
        return found


@dataclass
class Node:
    """`ctflow serve` in its own process group."""

    folder: Path
    bundle: Path
    quiet_s: float = 1.0
    destination: int | None = None
    tls: Certificates | None = None
    more: Sequence[str] = ()
    limits: str = "{free_disk: 1 MB}"
    environment: Mapping[str, str] = field(default_factory=dict)
    devices: str = "cpu"
    port: int = field(default_factory=free_port)
    web_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """Its data folder."""
        return self.folder / "data"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atexit.register(self.kill)  # a proof may end anywhere
        lines = [
            f"data: {self.data}", f"port: {self.port}", f"quiet_period_s: {self.quiet_s:g}", f"bundle: {self.bundle}",
            "engine: eager", f"devices: [{self.devices}]", "allow_demonstration: true", f"limits: {self.limits}",
            f"web: {{port: {self.web_port}, stow: true}}", *self.more,
        ]  # fmt: skip
        lines += self.tls.settings if self.tls else []
        if self.destination:
            secured = self.tls.of_destination if self.tls else ""
            backoff = "{first_s: 0.5, most_s: 2}"
            entry = f"{{name: pacs, ae_title: PACS, host: 127.0.0.1, port: {self.destination}, backoff: {backoff}"
            lines.append(f"destinations: [{entry}{secured}}}]")
        (self.folder / "node.yaml").write_text("\n".join(lines) + "\n")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ctflow", "serve", "-c", self.folder / "node.yaml"], stdout=log, stderr=log,
                start_new_session=True,
                env={**os.environ, "CTFLOW_REPORT": "none", "OMP_NUM_THREADS": "1", **self.environment},
            )  # fmt: skip
        wait_for(self.listens, "the node listens")

    def listens(self) -> bool:
        """Whether its port accepts connections."""
        if self.process is not None and self.process.poll() is not None:
            raise SystemExit(f"the node ended: {(self.folder / 'log').read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def kill(self) -> None:
        """Kill -9: the node and its worker, at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> int:
        """End it gracefully; return its exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def ask(self, question: str) -> list[tuple[Any, ...]]:
        """Query the journal from outside the node."""
        with contextlib.closing(sqlite3.connect(f"file:{self.data}/journal.sqlite3?mode=ro", uri=True)) as journal:
            return journal.execute(question).fetchall()

    def memory_mb(self) -> float:
        """Peak resident memory of the node's own process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text() if self.process else ""
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024

    def resident_mb(self) -> float:
        """Resident memory of the node's own process now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text() if self.process else ""
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024

    def descriptors(self) -> int:
        """Open descriptors of the node's own process."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir())) if self.process else 0


def small_bundle(folder: Path) -> Path:
    """An untrained UNet whose windows take milliseconds (tests/bundle_support.py)."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from bundle_support import small_unet_bundle  # noqa: PLC0415

    return small_unet_bundle(folder / "bundle")


def with_models(folder: Path, bundle: Path, count: int) -> list[str]:
    """Settings of a node whose every series runs with so many models, each a version of the bundle."""
    if count == 1:
        return []
    names = [f"model{number}" for number in range(count)]
    entries = []
    for number, name in enumerate(names):
        copied = shutil.copytree(bundle, folder / name)
        metadata = json.loads((copied / "configs" / "metadata.json").read_text())
        metadata["version"] = f"0.0.{number + 1}"  # models with the same weights and version have the same results
        (copied / "configs" / "metadata.json").write_text(json.dumps(metadata))
        entries.append(f"{{name: {name}, bundle: {copied}}}")
    return [f"models: [{', '.join(entries)}]", f"rules: [{{run: [{', '.join(names)}]}}]"]


def base_series(folder: Path) -> list[Dataset]:
    """A small chest, as data sets."""
    paths = write_ct_series(phantom_from_seed(5, (20, 64, 64)).volume, folder / "ct", seed=5)
    return [pydicom.dcmread(path) for path in paths]


def renamed(base: Sequence[Dataset], name: str) -> list[Dataset]:
    """The same chest under other UIDs."""
    series = []
    for number, source in enumerate(base):
        dataset = copy.deepcopy(source)
        dataset.StudyInstanceUID = uid_from_parts("prove", name, "study")
        dataset.SeriesInstanceUID = uid_from_parts("prove", name, "series")
        dataset.SOPInstanceUID = uid_from_parts("prove", name, str(number))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        series.append(dataset)
    return series


@contextlib.contextmanager
def association(node: Node, timeout_s: float = 20.0) -> Iterator[Any]:
    """An association that may fail at any moment."""
    ae = AE("PROVE")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = timeout_s
    ae.add_requested_context(CT_IMAGE_STORAGE, EXPLICIT)
    ae.add_requested_context("1.2.840.10008.1.1")
    handlers: list[Any] = [(evt.EVT_CONN_OPEN, lambda event: keep_answers(event.assoc))]
    secured = (node.tls.context(server=False), "localhost") if node.tls else None
    found = ae.associate("127.0.0.1", node.port, ae_title="CTFLOW", evt_handlers=handlers, tls_args=secured)
    try:
        yield found
    finally:
        if found.is_established:
            found.release()
        else:
            found.abort()


# -- kill ---------------------------------------------------------------------------------------------------------


class Sender(threading.Thread):
    """Sends series after series; an acknowledged instance is never sent again."""

    def __init__(self, node: Node, base: Sequence[Dataset], most_open: int, every_s: float) -> None:
        super().__init__(daemon=True)
        self._node, self._base, self._most_open, self._every_s = node, base, most_open, every_s
        self.acknowledged: dict[str, tuple[str, str]] = {}  # SOPInstanceUID -> series, digest of its file's pixels
        self.series: list[str] = []
        self.complete: list[str] = []
        self.ending = threading.Event()

    def run(self) -> None:
        """Run until `ending` is set and the current series is sent."""
        while not self.ending.is_set():
            delivered = self._delivered()
            if len(self.series) - delivered >= self._most_open:
                time.sleep(0.1)
                continue
            waiting = renamed(self._base, f"{os.getpid()} {len(self.series)}")
            self.series.append(str(waiting[0].SeriesInstanceUID))
            while waiting:
                waiting = self._send(waiting)
            self.complete.append(self.series[-1])
            self.ending.wait(self._every_s)

    def _delivered(self) -> int:
        with contextlib.suppress(sqlite3.Error):
            return int(
                self._node.ask("SELECT count(*) FROM series WHERE state IN ('delivered', 'aside', 'dead')")[0][0]
            )
        return 0

    def _send(self, waiting: list[Dataset]) -> list[Dataset]:
        """Send as many as the node takes; return the unacknowledged ones."""
        left = list(waiting)
        try:
            with association(self._node) as found:
                while left and found.is_established:
                    status = found.send_c_store(left[0]).get("Status", -1)
                    if status != 0:
                        break
                    dataset = left.pop(0)
                    self.acknowledged[str(dataset.SOPInstanceUID)] = (str(dataset.SeriesInstanceUID), "")
                    time.sleep(0.05)
        except (OSError, RuntimeError, ValueError):
            pass  # the node was killed meanwhile
        if left:
            time.sleep(0.05)
        return left


def prove_kill(
    count: int,
    seed: int,
    longest_s: float,
    most_open: int,
    every_s: float,
    models: int,
    bundle: Path | None,
    tls: bool,
) -> dict[str, Any]:
    """Kill the node repeatedly while series arrive, run and are delivered.

    A worker needs many seconds to load torch and then less than one for a series of this size. So every fourth kill
    waits until a series runs, and the others come at any time.
    """
    rng = random.Random(seed)  # noqa: S311  # no secret
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        bundle = bundle or small_bundle(folder)
        more = with_models(folder, bundle, models)
        node = Node(folder / "node", bundle, 0.5, archive.port, certificates, more)
        sender = Sender(node, base_series(folder), most_open, every_s)
        node.start()
        sender.start()
        states: Counter[str] = Counter()
        for number in range(count):
            if number % 4 == 3:
                _wait_for_running(node)
                time.sleep(rng.uniform(0.0, 4.0))
            else:
                time.sleep(rng.uniform(0.0, longest_s))
            node.kill()
            states.update(state for (state,) in node.ask("SELECT state FROM series WHERE state != 'delivered'"))
            node.start()
            if number % 10 == 9:
                say(f"{number + 1} kills, {len(sender.acknowledged)} acknowledged, {len(sender.complete)} series sent")
        sender.ending.set()
        sender.join(PATIENCE_S)
        finished = "SELECT count(*) FROM series WHERE state NOT IN ('delivered', 'aside', 'dead')"
        wait_for(lambda: node.ask(finished)[0][0] == 0, "every series is delivered")
        exit_code = node.stop()
        result = _check_kill(node, sender, archive, models)
        archive.close()
    return {
        "kills": count,
        "tls": tls,
        "models": models,
        "states_when_killed": dict(states),
        "exit_code": exit_code,
        **result,
    }


def _wait_for_running(node: Node) -> None:
    """Wait until a series runs; a while at most, as all may be delivered."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        with contextlib.suppress(sqlite3.Error):
            if node.ask("SELECT 1 FROM series WHERE state IN ('running', 'done')"):
                return
        time.sleep(0.02)


def _check_kill(node: Node, sender: Sender, archive: Archive, models: int) -> dict[str, Any]:
    rows = node.ask("SELECT sop_instance_uid, file, sha256 FROM instances")
    kept = {sop: file for sop, file, _ in rows}
    lost = [sop for sop in sender.acknowledged if sop not in kept]
    unreadable = [
        sop for sop in sender.acknowledged
        if sop in kept and str(pydicom.dcmread(node.data / "inbox" / kept[sop]).SOPInstanceUID) != sop
    ]  # fmt: skip
    segs = archive.segs_of_series()
    runs = node.ask(
        "SELECT s.series_uid, r.model, o.sop_instance_uid FROM series s JOIN runs r ON r.series_key = s.key "
        "JOIN results t ON t.run_id = r.id JOIN objects o ON o.result_id = t.id WHERE o.file = 'segmentation.dcm'"
    )
    of_run = Counter((series, model) for series, model, seg in runs if seg in segs.get(series, ()))
    exact = sum(
        len(segs.get(uid, ())) == models and sum(of_run[key] == 1 for key in of_run if key[0] == uid) == models
        for uid in sender.series
    )
    files = {path.relative_to(node.data / "inbox").as_posix() for path in (node.data / "inbox").rglob("*.dcm")}
    return {
        "acknowledged": len(sender.acknowledged),
        "acknowledged_lost": len(lost) + len(unreadable),
        "series": len(sender.series),
        "series_with_exactly_one_seg_a_model": exact,
        "series_with_more_or_fewer": len(sender.series) - exact,
        "results_of_a_run": max((n for (n,) in node.ask("SELECT count(*) FROM results GROUP BY run_id")), default=0),
        "revisions": node.ask("SELECT max(revision) FROM series")[0][0],
        "objects_sent_more_than_once": len(archive.received) - len({str(d.SOPInstanceUID) for d in archive.received}),
        "files_without_a_receipt": len(files - {file for _, file, _ in rows}),
        "not_delivered": node.ask("SELECT state, reason, message FROM series WHERE state != 'delivered'"),
    }


# -- load, hostile, idle, latency -----------------------------------------------------------------------------------


def prove_load(associations: int, images: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """Many associations at once, 512 x 512 images, DCMTK's sender."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        node = Node(folder / "node", bundle or small_bundle(folder), quiet_s=3600, tls=certificates)
        series = _large_series(folder, associations, images)
        node.start()
        wait_for(lambda: b'"ready": true' in http(node.web_port, "/readyz"), "the worker is open")
        before, start_cpu_s = resource.getrusage(resource.RUSAGE_CHILDREN), _cpu_seconds(node)
        start = time.monotonic()
        senders = [_storescu(node, each) for each in series]
        failures = sum(sender.wait() != 0 for sender in senders)
        elapsed_s = time.monotonic() - start
        sent = resource.getrusage(resource.RUSAGE_CHILDREN)
        kept = node.ask("SELECT count(*) FROM instances")[0][0]
        memory = node.memory_mb()
        cpu_s = _cpu_seconds(node) - start_cpu_s
        node.stop()
    return {
        "tls": tls, "associations": associations, "images": associations * images, "failures": failures, "kept": kept,
        "images_per_s": round(associations * images / elapsed_s, 1), "node_memory_mb": round(memory, 1),
        "node_cpu_ms_an_image": round(1000 * cpu_s / (associations * images), 2),
        "senders_cpu_ms_an_image": round(
            1000 * (sent.ru_utime + sent.ru_stime - before.ru_utime - before.ru_stime) / (associations * images), 2
        ),
    }  # fmt: skip


def _cpu_seconds(node: Node) -> float:
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split() if node.process else []
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _large_series(folder: Path, count: int, images: int) -> list[Path]:
    affine = np.diag([0.0, 0.7, 0.0, 1.0])
    affine[2, 0] = affine[0, 2] = 1.0
    affine[1, 1] = 0.7
    values = np.random.default_rng(0).integers(-1000, 1000, (images, 512, 512), dtype=np.int16)
    made = []
    for number in range(count):
        values[0, 0, 0] = number
        made.append(folder / f"series{number}")
        write_ct_series(Volume(values, Geometry(values.shape, affine)), made[-1], seed=number)
    return made


def _storescu(node: Node, folder: Path) -> subprocess.Popen[bytes]:
    secured = node.tls.words if node.tls else []
    words = [
        "storescu",
        *secured,
        "-xe",
        "-aec",
        "CTFLOW",
        "--scan-directories",
        "127.0.0.1",
        str(node.port),
        str(folder),
    ]
    # Without TCP_NODELAY DCMTK waits about 45 ms per image for a TCP acknowledgement.
    return subprocess.Popen(words, env={**os.environ, "TCP_NODELAY": "1"}, stdout=subprocess.DEVNULL)


def prove_hostile(count: int, seed: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """UIDs that resemble paths, commands or statements, or are too long; every file must stay in the inbox."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    parts = [
        "..",
        "/",
        "\\",
        "\0",
        "%2e",
        "etc",
        "passwd",
        "1.2",
        ";",
        "'",
        "--",
        "$(id)",
        "~",
        "C:",
        "\n",
        "*",
        " ",
        ".",
    ]
    with working_folder() as folder:
        # Deep below the searched folder, so that a path upwards ends in it.
        certificates = Certificates.make(folder) if tls else None
        place = folder.joinpath(*"12345678", "node")
        node = Node(place, bundle or small_bundle(folder), quiet_s=3600, tls=certificates)
        (base, *_) = base_series(folder)
        node.start()
        before = _files_outside(folder, node)
        statuses: Counter[str] = Counter()
        done = 0
        while done < count:
            # pynetdicom does not answer a request whose UID has only blanks.
            with association(node, timeout_s=3) as found, pydicom.config.disable_value_validation():
                while done < count and found.is_established:
                    dataset = copy.copy(base)
                    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
                        uid = "".join(rng.choices(parts, k=rng.randint(1, 24)))[: rng.randint(1, 64)]
                        dataset.add_new(keyword, "UI", pydicom.uid.UID(uid.replace("\\", "/")))
                    done += 1
                    try:
                        statuses[f"{found.send_c_store(dataset).get('Status', -1):04X}"] += 1
                    except (ValueError, TypeError, RuntimeError) as error:  # pynetdicom itself does not send it
                        statuses[type(error).__name__] += 1
        outside = _files_outside(folder, node) - before
        kept = node.ask("SELECT count(*) FROM instances")[0][0]
        node.stop()
    return {"uids": count, "statuses": dict(statuses), "kept": kept, "files_outside_the_inbox": len(outside)}


def _files_outside(folder: Path, node: Node) -> set[Path]:
    inbox = node.data / "inbox"
    found = {path for path in folder.rglob("*") if path.is_file() and inbox not in path.parents}
    return {path for path in found if not path.name.startswith(("journal.sqlite3", "audit-position", "log", ".audit"))}


def prove_idle(sockets: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """C-ECHO while so many connections are silent or send only part of a request."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        node = Node(folder / "node", bundle or small_bundle(folder), tls=certificates)
        node.start()
        idle = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(sockets)]
        for each in idle[::2]:
            each.send(b"\x01\x00")
        seconds = []
        for _ in range(5):
            start = time.monotonic()
            with association(node) as found:
                status = found.send_c_echo().get("Status", -1) if found.is_established else -1
                seconds.append(time.monotonic() - start if status == 0 else float("inf"))
        for each in idle:
            each.close()
        node.stop()
    return {
        "idle_sockets": sockets,
        "echo_s": [round(each, 3) for each in seconds],
        "slowest_s": round(max(seconds), 3),
    }


def prove_latency(repeats: int, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """From the last image to the SEG at the destination, less the quiet period and the inference."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        node = Node(
            folder / "node", bundle or small_bundle(folder), quiet_s=1.0, destination=archive.port, tls=certificates
        )
        base = base_series(folder)
        node.start()
        wait_for(lambda: b'"ready": true' in http(node.web_port, "/readyz"), "the worker is open")
        overheads = []
        for number in range(repeats + 1):
            with association(node) as found:
                for dataset in renamed(base, f"latency {number}"):
                    found.send_c_store(dataset)
                last_in = time.time()
            wait_for(lambda number=number: len(archive.times) >= 2 * (number + 1), "SEG and SR are at the destination")
            (elapsed_s,) = node.ask("SELECT elapsed_s FROM results ORDER BY id DESC LIMIT 1")[0]
            overheads.append(archive.times[2 * number] - last_in - node.quiet_s - elapsed_s)
        node.stop()
        archive.close()
    # The first run also includes loading for the first volume.
    return {"quiet_s": 1.0, "beyond_quiet_and_inference_s": [round(each, 3) for each in overheads[1:]]}


def prove_workers(series: int, senders: int, devices: str, bundle: Path | None, tls: bool) -> dict[str, Any]:
    """So many series at once from several senders, a worker for each device, one of which is killed in the middle."""
    with working_folder() as folder:
        certificates = Certificates.make(folder) if tls else None
        archive = Archive(certificates)
        node = Node(folder / "node", bundle or small_bundle(folder), 1.0, archive.port, certificates, devices=devices)
        base = base_series(folder)
        made = [renamed(base, f"workers {number}") for number in range(series)]
        node.start()
        count = len(devices.split(","))
        wait_for(lambda: len(_workers(node)) >= count and b'"ready": true' in http(node.web_port, "/readyz"), "workers")
        answers: list[int] = []

        def send(part: Sequence[list[Dataset]]) -> None:
            for each in part:
                with association(node) as to:
                    answers.extend(int(to.send_c_store(dataset).get("Status", -1)) for dataset in each)

        threads = [threading.Thread(target=send, args=(made[number::senders],)) for number in range(senders)]
        begun = time.monotonic()
        for each in threads:
            each.start()
        done = "SELECT count(*) FROM results"
        wait_for(lambda: node.ask(done)[0][0] >= series // 4, "a quarter of the results is there", 300)
        _kill_a_busy_worker(node)
        for each in threads:
            each.join()
        left = "SELECT count(*) FROM series WHERE state NOT IN ('delivered', 'aside', 'dead')"
        wait_for(lambda: node.ask(left)[0][0] == 0, "every series is delivered", 300)
        elapsed_s = time.monotonic() - begun
        segs = archive.segs_of_series()
        result = {
            "tls": tls, "devices": devices, "series": series, "senders": senders, "seconds": round(elapsed_s, 1),
            "refused": sum(status != 0 for status in answers),
            "exactly_one_seg": sum(len(segs.get(str(each[0].SeriesInstanceUID), ())) == 1 for each in made),
            "results_of_device": dict(Counter(_devices_of_results(node))),
            "most_overtaken_by": _most_overtaken(node),
            "worker_deaths": node.ask("SELECT sum(deaths) FROM runs")[0][0],
            "not_delivered": node.ask("SELECT state, reason, message FROM series WHERE state != 'delivered'"),
            "exit_code": node.stop(),
        }  # fmt: skip
        archive.close()
    return result


def _kill_a_busy_worker(node: Node) -> None:
    """Kill workers until one had a run, which the journal counts as a death of that run."""
    deaths = "SELECT coalesce(sum(deaths), 0) FROM runs"
    for _ in range(10):
        wait_for(lambda: node.ask("SELECT 1 FROM runs WHERE state = 'running'"), "a series runs", 60)
        for victim in _workers(node)[-1:]:
            os.kill(victim, signal.SIGKILL)
        time.sleep(1)
        if node.ask(deaths)[0][0]:
            return


def _workers(node: Node) -> list[int]:
    """Process numbers of the node's workers: of its children those that hold torch, the first one first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            if node.process and int(facts["PPid"]) == node.process.pid and int(facts["VmRSS"].split()[0]) > 200_000:
                found.append(int(facts["Pid"]))
    return sorted(found)


def _devices_of_results(node: Node) -> list[str]:
    folders = node.ask("SELECT folder FROM results")
    documents = [json.loads((node.data / "results" / name / "result.json").read_text()) for (name,) in folders]
    return [str(document["engine"]["device"]) for document in documents]


def _most_overtaken(node: Node) -> int:
    """How many series that were complete later began before one, at most; those that a death interrupted left out."""
    begun = {"complete": {}, "running": {}}  # type: dict[str, dict[str, int]]
    for number, kind, key in node.ask("SELECT id, kind, series_key FROM events WHERE kind IN ('complete', 'running')"):
        begun[kind].setdefault(key, number)
    order = sorted(begun["complete"], key=lambda key: begun["complete"][key])
    return max(
        sum(begun["running"][later] < begun["running"][key] for later in order[place + 1 :])
        for place, key in enumerate(order)
    )


def http(port: int, path: str) -> bytes:
    """The node's page; empty if it does not answer."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer
    return b""


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="prove-node-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


PROMISES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "kill": lambda r: not (r["acknowledged_lost"] or r["series_with_more_or_fewer"] or r["files_without_a_receipt"]),
    "load": lambda r: (
        r["failures"] == 0
        and r["kept"] == r["images"]
        and r["node_memory_mb"] <= 256
        and r["images_per_s"] >= (120 if r["tls"] else 150)
    ),
    "hostile": lambda r: r["files_outside_the_inbox"] == 0,
    "idle": lambda r: r["slowest_s"] <= 1.0,
    "workers": lambda r: (
        r["exactly_one_seg"] == r["series"]
        and not r["refused"]
        and not r["not_delivered"]
        and r["worker_deaths"] >= 1
        and len(r["results_of_device"]) == len(r["devices"].split(","))
        and r["exit_code"] == 0
    ),
    "latency": lambda r: max(r["beyond_quiet_and_inference_s"]) <= 2.0,
}


def main() -> int:
    """Run one proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="MONAI bundle (default: a small untrained one is made)")
    parser.add_argument("--tls", action="store_true", help="TLS with certificates of both sides, in and out")
    proofs = parser.add_subparsers(dest="proof", required=True)
    kill = proofs.add_parser("kill")
    kill.add_argument("--count", type=int, default=100)
    kill.add_argument("--seed", type=int, default=0)
    kill.add_argument(
        "--longest-s", type=float, default=4.0, help="longest time between a start and a kill at a random moment"
    )
    kill.add_argument("--open", dest="most_open", type=int, default=30, help="most series that are not delivered yet")
    kill.add_argument("--every-s", type=float, default=0.0, help="between two series, to receive during all kills")
    kill.add_argument("--models", type=int, default=1, help="models that every series runs with")
    load = proofs.add_parser("load")
    load.add_argument("--associations", type=int, default=25)
    load.add_argument("--images", type=int, default=40)
    hostile = proofs.add_parser("hostile")
    hostile.add_argument("--count", type=int, default=1000)
    hostile.add_argument("--seed", type=int, default=0)
    idle = proofs.add_parser("idle")
    idle.add_argument("--sockets", type=int, default=200)
    latency = proofs.add_parser("latency")
    latency.add_argument("--repeats", type=int, default=3)
    workers = proofs.add_parser("workers")
    workers.add_argument("--series", type=int, default=64)
    workers.add_argument("--senders", type=int, default=8)
    workers.add_argument("--devices", default="cpu", help="cpu, or GPUs: one worker each")
    given = vars(parser.parse_args())
    proof = given.pop("proof")
    tried = {"kill": prove_kill, "load": prove_load, "hostile": prove_hostile, "idle": prove_idle,
             "latency": prove_latency, "workers": prove_workers}[proof]  # fmt: skip
    result = tried(**given)
    kept = PROMISES[proof](result)
    document = {
        "proof": proof, "promise_kept": kept, "ctflow": __version__, "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0], **result,
    }  # fmt: skip
    sys.stdout.write(json.dumps(document) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
