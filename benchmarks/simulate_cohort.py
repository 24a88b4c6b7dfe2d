"""What bounds a cohort on many machines: a simulation from measured times of a row's stages.

    python benchmarks/simulate_cohort.py --nodes 100 --gpus 8

A row waits for the driver, which gives out one row at a time, then for the store's bandwidth, a CPU of its node to read
it, its GPU, and a CPU again to write the result; all in order of arrival. A worker has as many rows as it has
processes, and two more. Times vary evenly by a third, drawn from a seed. Prints one JSON
document with the share of time in which each is busy: the largest one is the bottleneck.

Defaults: seconds of a CT of 300 slices with the demonstration model on an H200, the driver's time for a
row from `benchmarks/cohort_overhead.py`, and a node with 16 CPUs a GPU. The store's rate and latency are assumed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import deque
from collections.abc import Callable


class Server:
    """Serves so many at a time, first come, first served."""

    def __init__(self, events: Events, count: int) -> None:
        self._events, self.count, self._free = events, count, count
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self.busy_s = 0.0

    def serve(self, seconds: float, then: Callable[[], None]) -> None:
        """Serve for some seconds once it is free."""
        self._waiting.append((seconds, then))
        self._begin()

    def _begin(self) -> None:
        while self._free and self._waiting:
            seconds, then = self._waiting.popleft()
            self._free -= 1
            self.busy_s += seconds
            self._events.after(seconds, lambda then=then: self._end(then))

    def _end(self, then: Callable[[], None]) -> None:
        self._free += 1
        then()
        self._begin()


class Events:
    """What happens, in order of time."""

    def __init__(self) -> None:
        self.now_s, self._number = 0.0, 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Let something happen then."""
        self._number += 1
        heapq.heappush(self._heap, (self.now_s + seconds, self._number, what))

    def run(self) -> None:
        """Until nothing happens any more."""
        while self._heap:
            self.now_s, _, what = heapq.heappop(self._heap)
            what()


def simulated(given: argparse.Namespace) -> dict[str, object]:
    """Run all rows."""
    events, draws = Events(), random.Random(1)  # noqa: S311  # any will do
    driver, store = Server(events, 1), Server(events, 1)
    nodes = [Server(events, given.cpus) for _ in range(given.nodes)]
    gpus = [[Server(events, 1) for _ in range(given.gpus)] for _ in range(given.nodes)]
    left = given.rows
    transfer_s = given.megabytes / (given.store_gbytes_s * 1000)

    def vary(seconds: float) -> float:
        return seconds * draws.uniform(2 / 3, 4 / 3)

    def give(node: int, gpu: int) -> None:
        nonlocal left
        if not left:
            return
        left -= 1
        steps: list[Callable[[Callable[[], None]], None]] = [
            lambda then: driver.serve(given.driver_ms / 1000, then),
            lambda then: store.serve(transfer_s, then),
            lambda then: events.after(vary(given.latency_s), then),
            lambda then: nodes[node].serve(vary(given.read_s), then),
            lambda then: gpus[node][gpu].serve(vary(given.compute_s), then),
            lambda then: nodes[node].serve(vary(given.write_s), then),
        ]

        def step(number: int) -> None:
            if number < len(steps):
                steps[number](lambda: step(number + 1))
            else:
                give(node, gpu)

        step(0)

    for node in range(given.nodes):
        for gpu in range(given.gpus):
            for _ in range(given.processes + 2):
                give(node, gpu)
    events.run()
    total = events.now_s
    busy = {
        "driver": driver.busy_s / total,
        "store": store.busy_s / total,
        "cpus": sum(each.busy_s for each in nodes) / total / given.nodes / given.cpus,
        "gpus": sum(each.busy_s for line in gpus for each in line) / total / given.nodes / given.gpus,
    }
    return {
        "rows": given.rows,
        "seconds": round(total, 1),
        "rows_a_second": round(given.rows / total, 1),
        "of_the_gpus": round(given.rows / total / (given.nodes * given.gpus / given.compute_s), 3),
        "busy": {name: round(share, 3) for name, share in busy.items()},
        "bottleneck": max(busy, key=lambda name: busy[name]),
    }


def main() -> int:
    """Simulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--gpus", type=int, default=8, help="a node")
    parser.add_argument("--cpus", type=int, default=128, help="a node")
    parser.add_argument("--processes", type=int, default=12, help="a GPU's worker")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--driver-ms", type=float, default=0.8)
    parser.add_argument("--latency-s", type=float, default=0.3, help="of a series' requests to the store (assumed)")
    parser.add_argument("--megabytes", type=float, default=158, help="of a series")
    parser.add_argument("--store-gbytes-s", type=float, default=100.0, help="of the store, to all nodes (assumed)")
    parser.add_argument("--read-s", type=float, default=0.6)
    parser.add_argument("--compute-s", type=float, default=0.25)
    parser.add_argument("--write-s", type=float, default=0.4)
    given = parser.parse_args()
    sys.stdout.write(json.dumps(simulated(given)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
