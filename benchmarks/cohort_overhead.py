"""What Ray costs a row, and what it does about a row that kills its worker: actors fed by the driver, or Ray Data.

    python benchmarks/cohort_overhead.py --rows 2000

Starts a Ray of its own on 127.0.0.1; rows do nothing but one, at which its worker is killed. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from ctflow.cohort.cluster.connection import connected

LIMIT, PATIENCE_S = 14, 120.0  # rows in flight of a worker with 12 processes


class Actor:
    """Stands for a worker."""

    def row(self, number: int) -> dict[str, int]:
        """One row of plain actors."""
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"id": number}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of one row of Ray Data."""
        for number in batch["id"]:
            self.row(int(number))
        return batch


def fed(ray: Any, numbers: list[int], workers: int) -> dict[str, Any]:
    """One call a row, each with its own answer; a killed worker's rows are known, and one of them is to blame."""
    import queue  # noqa: PLC0415

    kind, events, begun = ray.remote(Actor), queue.Queue(), 0.0
    options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2 * LIMIT}
    actors = [kind.options(**options).remote() for _ in range(workers)]
    ray.get([actor.row.remote(0) for actor in actors])
    begun, left, under_way, done, failed = time.perf_counter(), iter(numbers), 0, 0, 0

    def give(actor: Any) -> int:
        number = next(left, None)
        if number is None:
            return 0
        actor.row.remote(number).future().add_done_callback(lambda future: events.put((actor, future)))
        return 1

    for actor in actors:
        under_way += sum(give(actor) for _ in range(LIMIT))
    while under_way:
        actor, future = events.get()
        under_way -= 1
        if future.exception() is None:
            done += 1
            under_way += give(actor)
        else:
            failed += 1
    seconds = time.perf_counter() - begun
    return {
        "ms_a_row": round(1000 * seconds / len(numbers), 3),
        "answered": done,
        "known_to_be_open": len(numbers) - done,
    }


def of_ray_data(ray: Any, numbers: list[int], workers: int, errored_blocks: int) -> dict[str, Any]:
    """`map_batches` with an actor pool, a row a block, which is the finest account that Ray Data gives."""
    from ray import data  # noqa: PLC0415

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = errored_blocks
    found: dict[str, Any] = {}

    def run() -> None:
        rows = data.from_items([{"id": number} for number in numbers], override_num_blocks=len(numbers))
        mapped = rows.map_batches(Actor, batch_size=1, compute=data.ActorPoolStrategy(size=workers), num_cpus=0.5)
        begun = time.perf_counter()
        try:
            found["answered"] = sum(1 for _ in mapped.iter_rows())
        except Exception as error:  # noqa: BLE001  # whatever it raises is what is asked
            found["ended_with"] = type(error).__name__
        found["ms_a_row"] = round(1000 * (time.perf_counter() - begun) / len(numbers), 3)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if thread.is_alive():
        found["ended_with"] = f"nothing: still running after {PATIENCE_S:.0f} s"
    return dict(found)


def main() -> int:
    """Compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    numbers = list(range(1, given.rows + 1))
    poisoned = [*numbers[:50], -1, *numbers[50:100]]
    with connected(None, 0) as ray:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        found = {
            "actors": fed(ray, numbers, given.workers),
            "actors, a row kills": fed(ray, poisoned, given.workers),
            "data": of_ray_data(ray, numbers, given.workers, 0),
            "data, a row kills": of_ray_data(ray, poisoned, given.workers, 0),
            "ray": ray.__version__,
        }
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
        os._exit(0)  # Ray Data may still be running


if __name__ == "__main__":
    main()
