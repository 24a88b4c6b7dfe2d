"""A cohort on several raylets of this machine, whose processes are killed: every row ends once, as it should."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster_support import POISONED
from ctflow.cohort.manifest.rows import CohortRow, write_manifest
from ctflow.cohort.outcome import MarkName
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import small_volume

PROGRAM = Path(__file__).with_name("cluster_support.py")
STORE_BYTES = 80_000_000
# As `ctflow.cohort.cluster.connection` starts a local Ray: everything listens on 127.0.0.1 only.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_timeout_ms": "60000",  # a killed raylet refuses at once; that of a busy machine answers late
    "AUTOSCALER_METRIC_PORT": "0",
    "RAY_AUTH_MODE": "token",
    "OMP_NUM_THREADS": "1",
}
NONE = ("lost", "double", "committed_again", "without_result", "results_too_many", "results_that_differ", "notes_left",
        "work_left", "processes_left")  # fmt: skip
MOST_RESTART_S = 60.0
AT_ONCE = 5  # rows that a worker of `scaled` has
EXPECTED = {"good": ("done", "done"), "gap": ("rejected", "gap"), "none": ("failed", "not-a-folder"),
            "killer": ("failed", "worker-ended")}  # fmt: skip


class Machines:
    """A Ray cluster of a head without workers and some raylets, each of which stands for a machine."""

    def __init__(self, count: int) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once a process
        from ray.cluster_utils import Cluster  # noqa: PLC0415  # it reads the environment when imported

        head = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._cluster = started(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.nodes = [self._new() for _ in range(count)]

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        return self._cluster.address

    @property
    def workers(self) -> list[int]:
        """Processes of workers; other clusters of this machine have theirs."""
        raylets = {each.process.pid for node in self.nodes for each in node.all_processes.get("raylet", [])}
        found = []
        for path in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if (path / "cmdline").read_bytes().startswith(b"ray::CohortWorker"):
                    parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                    found += [int(path.name)] if int(parent) in raylets else []
        return found

    def _new(self) -> Any:
        return started(lambda: self._cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE_BYTES))

    def replace_lost(self) -> int:
        """Machines in the place of those that Ray gave up; returns how many."""
        lost = [number for number, node in enumerate(self.nodes) if not is_running(node)]
        for number in lost:
            self.lose(number)
        return len(lost)

    def lose(self, number: int) -> None:
        """Kill a raylet; another machine comes in its place, as spot machines do."""
        node = self.nodes[number]
        for each in node.all_processes.get("raylet", []):
            each.process.kill()
        with suppress(Exception):  # it waits for what has ended already
            self._cluster.remove_node(node, allow_graceful=False)
        self.nodes[number] = self._new()


def started(start: Callable[[], Any]) -> Any:
    """What starts at one of three attempts: Ray gives up after 30 s, which a raylet of a busy machine may need."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()


def is_running(node: Any) -> bool:
    raylets = node.all_processes.get("raylet", [])
    return bool(raylets) and raylets[0].process.poll() is None


def resident_mb(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1000
    return 0.0


def write_series(folder: Path, series: int) -> None:
    """Series `s0`..., one with a gap, and one that kills its worker."""
    for number in range(series):
        write_ct_series(small_volume(seed=number, shape=(8, 32, 32)), folder / f"s{number}", seed=number)
    write_ct_series(small_volume(seed=90, shape=(8, 32, 32)), folder / "gap", seed=90)
    sorted((folder / "gap").iterdir())[4].unlink()
    write_ct_series(small_volume(seed=91, shape=(8, 32, POISONED)), folder / "killer", seed=91)


def write_rows(folder: Path, rows: int, series: int, killers: int, seed: int) -> dict[str, str]:
    """The manifest: a tenth poison, of which `killers` kill their worker; returns the kind of each row."""
    draws, kinds, lines = random.Random(seed), dict[str, str](), []
    poison = set(draws.sample(range(rows), rows // 10))
    killing = set(draws.sample(sorted(poison), killers))
    for number in range(rows):
        name = f"row-{number:05d}"
        kind = "good"
        if number in poison:
            kind = "killer" if number in killing else draws.choice(["gap", "none"])
        kinds[name] = kind
        lines.append(CohortRow(name, f"s{number % series}" if kind == "good" else kind))
    write_manifest(lines, folder / "manifest.csv")
    return kinds


@dataclass
class Trial:
    """A cohort in `folder`, its driver, and what was seen of it."""

    folder: Path
    address: str
    kinds: Mapping[str, str]
    wait_s: float = 0.0
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    restarts_s: list[float] = field(default_factory=list)
    changed: int = 0
    driver: subprocess.Popen[bytes] | None = None
    tend: Callable[[], object] = lambda: None

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self) -> None:
        command = [sys.executable, PROGRAM, self.folder / "in" / "manifest.csv", self.output, self.address]
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen([*command, str(self.wait_s)], stdout=log, stderr=log)

    def look(self) -> int:
        """Note every marker that is there, and whether one that was seen before is another file now."""
        with suppress(FileNotFoundError), os.scandir(self.output / "rows") as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        found = entry.stat()
                        now = (found.st_ino, found.st_mtime_ns)
                        self.changed += self.seen.setdefault(entry.name, now) != now
        return len(self.seen)

    def wait_for_more(self, count: int, timeout_s: float) -> bool:
        """Until so many more rows are committed, or the driver has ended."""
        goal, deadline = self.look() + count, time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.look() >= goal:
                return True
            if self.driver is not None and self.driver.poll() is not None:
                return False
            self.tend()
            time.sleep(0.2)
        told = (self.folder / "driver.log").read_text()[-3000:]
        raise AssertionError(f"no row was committed for {timeout_s} s: {told}")

    def kill_driver(self) -> None:
        """Kill and start it again; note when the first row is committed after that."""
        self.driver.kill()
        self.driver.wait()
        begun = time.monotonic()
        self.start()
        if self.wait_for_more(1, 180.0):
            self.restarts_s.append(round(time.monotonic() - begun, 1))

    def checked(self) -> dict[str, Any]:
        """Every row has one marker and one result, each is what its series must have, and nothing else is there."""
        self.look()
        marks = [json.loads(path.read_text()) for path in (self.output / "rows").glob("*.json")]
        count = Counter(mark["id"] for mark in marks)
        results = {path.name for path in (self.output / "results").iterdir()}
        wrong, digests = Counter[str](), dict[str, set[str]]()
        for mark in marks:
            kind = self.kinds[mark["id"]]
            if (mark["status"], mark["reason"]) != EXPECTED[kind]:
                wrong[f"{kind}: {mark['status']} ({mark['reason']})"] += 1
            if mark["status"] == "done":
                location = f"s{int(mark['id'].removeprefix('row-')) % self.series}"
                digests.setdefault(location, set()).add(mark["digest"])
        assert all(MarkName.from_text(name) for name in self.seen)
        return {
            "rows": len(self.kinds),
            "lost": len(self.kinds.keys() - count.keys()),
            "double": sum(each - 1 for each in count.values()),
            "committed_again": self.changed,
            "without_result": len(count.keys() - results),
            "results_too_many": len(results - count.keys()),
            "other_than_expected": dict(wrong),
            "results_that_differ": sum(len(each) - 1 for each in digests.values()),
            "kinds": dict(Counter(self.kinds.values())),
            "attempts": dict(sorted(Counter(mark["attempt"] for mark in marks).items())),
            "notes_left": len(list((self.output / "begun").iterdir())),
            "work_left": sum(each.is_dir() for each in (self.output / ".work").iterdir()),
            "restarts_s": self.restarts_s,
        }

    @property
    def series(self) -> int:
        return sum(path.name.startswith("s") for path in (self.folder / "in").iterdir() if path.is_dir())


@contextmanager
def sampled(trial: Trial, machines: Machines, every_s: float) -> Iterator[list[dict[str, float]]]:
    """Memory of the driver and of the largest worker, from time to time."""
    samples: list[dict[str, float]] = []
    over = threading.Event()

    def sample() -> None:
        begun = time.monotonic()
        while not over.wait(every_s):
            driver = resident_mb(trial.driver.pid) if trial.driver else 0.0
            workers = [resident_mb(pid) for pid in machines.workers]
            samples.append(
                {
                    "s": round(time.monotonic() - begun),
                    "committed": len(trial.seen),
                    "driver_mb": round(driver),
                    "worker_mb": round(max(workers, default=0.0)),
                }
            )

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def killed(folder: Path, rows: int, raylets: int, kills: int, killers: int, seed: int, every_s: float = 30.0):
    """Run a cohort while processes are killed at moments drawn from `seed`; returns what `Trial.checked` says."""
    draws = random.Random(seed)
    (folder / "in").mkdir(parents=True)
    write_series(folder / "in", 6)
    kinds = write_rows(folder / "in", rows, 6, killers, seed)
    plan = [("actor", "raylet", "driver")[number % 3] for number in range(kills)]
    draws.shuffle(plan)
    done: Counter[str] = Counter()
    begun = time.monotonic()
    with Machines(raylets) as machines:

        def tend() -> None:
            done["given up by Ray"] += machines.replace_lost()

        trial = Trial(folder, machines.address, kinds, tend=tend)
        trial.start()
        with sampled(trial, machines, every_s) as samples:
            for number, kind in enumerate(plan):
                mean = 0.7 * (rows - len(trial.seen)) / (kills - number + 1)  # so that there are rows for all
                more = max(1, round(draws.uniform(0.0, 2.0) * mean))
                if not trial.wait_for_more(more, 300.0):
                    break
                time.sleep(draws.uniform(0.0, 0.3))
                if kind == "actor":
                    while not (pids := machines.workers) and trial.driver.poll() is None:
                        tend()
                        time.sleep(0.2)
                    if not pids:
                        break
                    os.kill(draws.choice(pids), signal.SIGKILL)
                elif kind == "raylet":
                    machines.lose(draws.randrange(raylets))
                else:
                    trial.kill_driver()
                done[kind] += 1
                sys.stderr.write(f"{time.monotonic() - begun:.0f} s: {kind} killed at {len(trial.seen)} rows\n")
            code = None
            while code is None:
                trial.look()
                tend()
                with suppress(subprocess.TimeoutExpired):
                    code = trial.driver.wait(1.0)
        seconds, left = time.monotonic() - begun, machines.workers
    return {
        **trial.checked(),
        "kills": dict(+done),
        "exit_code": code,
        "seconds": round(seconds),
        "memory": samples,
        "processes_left": len(left),
    }


def broken_promises(found: Mapping[str, Any], kills: int) -> list[str]:
    """What `killed` found that a cohort promises not to happen, or that leaves a promise untested."""
    broken = [name for name in NONE if found[name]] + [*found["other_than_expected"]]
    done = {kind: found["kills"].get(kind, 0) for kind in ("actor", "raylet", "driver")}
    if sum(done.values()) != kills:
        broken.append(f"{sum(done.values())} kills of {kills}")
    if found["exit_code"] != (0 if set(found["kinds"]) == {"good"} else 6):
        broken.append(f"exit code {found['exit_code']}")
    if done["driver"] and not found["restarts_s"]:
        broken.append("no restart was measured")
    if any(each > MOST_RESTART_S for each in found["restarts_s"]):
        broken.append("a restart took too long")
    return broken


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def scaled(folder: Path, rows: int, raylets: int, wait_s: float) -> float:
    """Rows a second of so many raylets whose segmenter waits, while all of them are busy."""
    (folder / "in").mkdir(parents=True)
    write_series(folder / "in", 6)
    write_manifest(
        [CohortRow(f"row-{number:05d}", f"s{number % 6}") for number in range(rows)], folder / "in" / "manifest.csv"
    )
    with Machines(raylets) as machines:
        trial = Trial(folder, machines.address, {}, wait_s)
        trial.start()
        times: list[tuple[float, int]] = []
        while trial.driver.poll() is None:
            count = trial.look()
            if not times or count > times[-1][1]:
                times.append((time.monotonic(), count))
            time.sleep(0.02)
    assert trial.driver.returncode == 0
    assert times[-1][1] == rows
    return steady_rate(times, rows, raylets)


def steady_rate(times: Sequence[tuple[float, int]], rows: int, raylets: int) -> float:
    """Rows a second without the first third, when workers start, and the last rows, when some workers have none.

    Args:
        times: Seconds and how many rows were committed by then, in order.
        rows: How many there are.
        raylets: How many share them.
    """
    window = [each for each in times if rows / 3 <= each[1] <= rows - AT_ONCE * raylets]
    (begun_s, first), (ended_s, last) = window[0], window[-1]
    assert last - first >= rows / 5, "too few rows for a rate"
    return round((last - first) / (ended_s - begun_s), 3)
