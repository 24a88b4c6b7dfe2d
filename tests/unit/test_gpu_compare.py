"""What `benchmarks/gpu_compare.sh` asks for, with stand-ins for the GPUs and for what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_compare.sh"
ONE_GPU = {
    "0a",
    "0b",
    "0c",
    "0d",
    "1",
    "1b",
    "2",
    "3",
    "4",
    *(f"{name}-fp16" for name in ("eager", "compile", "tensorrt", "fused")),
    "fused-fp8",
}
STAND_INS = {
    "nvidia-smi": 'for number in $(seq "$GPUS"); do echo "GPU $number"; done',
    "python": 'case "$*" in *--only-prepare*) [ -z "$FAILS" ] || exec sleep 600;; esac; echo "{}"',
    "ctflow": """
echo "${CUDA_VISIBLE_DEVICES:-all} $*" >> "$CALLS"
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2;; --configurations) configurations=$2;; --seed) seed=$2;; esac
  shift
done
mkdir -p "$out"; touch "$out/compare.json" "$out/compare.png" "$out/segmentation.dcm"
[ -n "$FAILS" ] && [ "$configurations" = "$FAILS" ] && exit 4
[ "$seed" != "${FAILING_SEED:-none}" ] || exit 4
""",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for machines with NVIDIA GPUs")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "out" / "wide" / "models").mkdir(parents=True)
    (tmp_path / "out" / "wide" / "models" / "model.pt").touch()
    (tmp_path / "out" / "chest").mkdir()

    def start(gpus: int, **more: str) -> tuple[int, list[dict], str]:
        given = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "GPUS": str(gpus),
            "CALLS": str(tmp_path / "calls"),
        }
        done = subprocess.run(
            ["bash", str(SCRIPT), str(tmp_path / "out")], env={"FAILS": "", **given, **more}, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        calls = [parsed(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, calls, (tmp_path / "out" / "steps.txt").read_text()

    return start


def parsed(line: str) -> dict:
    visible, command, *words = line.split()
    options = dict(zip(words, [*words[1:], ""], strict=True))
    return {
        "gpus": visible, "command": command, "devices": options.get("--device"), "seed": options.get("--seed"),
        "configurations": options["--configurations"].split(",") if "--configurations" in options else [],
        "kept": "--only-kept" in words,
    }  # fmt: skip


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_configuration_is_measured_once_and_shown(run, gpus):
    code, calls, steps = run(gpus)
    assert code == 0
    assert steps.splitlines()[-1].endswith("finished")
    assert calls[0]["command"] == "export"  # the calibration of fused-fp8
    measuring = [call for call in calls if call["command"] == "bench" and not call["kept"] and call["seed"] is None]
    configurations = [each for call in measuring for each in dict.fromkeys(call["configurations"])]
    several = {f"{name}x{count}" for name in ("5", "tensorrt-fp16", "fused-fp16") for count in (2, 4)}
    assert sorted(configurations) == sorted(ONE_GPU | several)
    assert measuring[0]["configurations"][0] == "fused-fp16"
    assert measuring[1]["gpus"] == "1" or "1" in measuring[1]["configurations"]  # references come early
    shown = {call["devices"]: set(call["configurations"]) for call in calls if call["kept"]}
    wanted = {"cuda:0": ONE_GPU, "cuda:0,1": several_of(2), "cuda:0,1,2,3": several_of(4)}
    assert shown == {devices: configurations for devices, configurations in wanted.items() if devices.count(",") < gpus}
    assert sorted(call["seed"] for call in calls if call["seed"]) == ["1001", "1002", "1003"]
    assert sum(call["command"] == "run" for call in calls) == 3


def several_of(count: int) -> set[str]:
    return ONE_GPU | {f"5x{count}", f"tensorrt-fp16x{count}", f"fused-fp16x{count}"}


def test_a_phantom_that_fails_is_told_of_and_the_rest_goes_on(run):
    code, calls, steps = run(2, FAILING_SEED="1002")
    assert code == 0
    assert "not all phantoms were compared" in steps
    assert sum(call["command"] == "run" for call in calls) == 3


def test_a_failure_leaves_nothing_running(run, tmp_path):
    code, calls, _ = run(4, FAILS="1,0b,2")
    assert code == 1
    assert not any(call["kept"] for call in calls)
    deadline = time.monotonic() + 10
    while (left := sleepers(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def sleepers(folder: Path) -> list[int]:
    """Processes that the script's builder became, by the folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(folder).encode() in (process / "environ").read_bytes()
                and (process / "comm").read_text() == "sleep\n"
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found
