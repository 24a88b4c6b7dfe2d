"""Measure the steps in host memory of the compared configurations 0b, 0d and 1 to 5, for a volume of two classes.

    python benchmarks/host_steps.py [--shape 512,512,300] [--batch 8] [--repeats 3]

Steps: the argmax over the channels of a whole volume, as MONAI and the article compute it, and what replaces it for
one channel; softmax and merge of a batch of windows of 96^3. The last line of the output is one JSON document with the
median seconds of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch

WINDOW = 96


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median after one call."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken[1:]), 4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="512,512,300")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    size = tuple(map(int, given.shape.split(",")))
    both, weights = torch.rand(2, *size), torch.ones(size)
    logits = torch.rand(given.batch, 2, WINDOW, WINDOW, WINDOW)
    weight = torch.rand(WINDOW, WINDOW, WINDOW)

    def merge(channels: int) -> None:
        for number in range(given.batch):
            place = (slice(None), *(slice(number, number + WINDOW) for _ in size))
            both[:channels][place] += logits[number, :channels] * weight
            weights[place[1:]] += weight

    steps: dict[str, Callable[[], object]] = {
        "argmax over two channels of a volume, fp32": lambda: both.argmax(dim=0),
        "the same in fp16": lambda: both.half().argmax(dim=0),
        "one channel of a volume above a half": lambda: both[0] > 0.5,
        "division of two channels by the weights": lambda: both.div_(weights),
        "softmax of a batch of windows": lambda: torch.softmax(logits, dim=1),
        "merge of two channels of a batch": lambda: merge(2),
        "merge of one channel of a batch": lambda: merge(1),
    }
    print(json.dumps({  # noqa: T201
        "shape": size, "batch": given.batch, "threads": torch.get_num_threads(), "processors": os.cpu_count(),
        "torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d"),
        "seconds": {name: seconds(step, given.repeats) for name, step in steps.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
