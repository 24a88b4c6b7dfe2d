"""Test on this GPU what ctflow promises of an engine, and record the results (`make test-gpu`).

    python benchmarks/prove_gpu.py --out DIR [--engine tensorrt] [--ct DIR ...] [--wide BUNDLE | --feature-size 48]
                                   [--batch 8] [--steps engine,cases,contract,volume]

Steps: build the bundle's engine, time it and compare it with PyTorch; run the application (Holoscan) and `ctflow run`
on each CT series and on a synthetic chest, check that both write the same SEG, and compare it with PyTorch in fp32; run
the contract suite on the GPU; measure whole volumes with a wider network. DIR gets record.json, and the log and
result.json of each case. The last line of the output is one JSON document; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CTFLOW = (sys.executable, "-c", "import sys; from ctflow.cli.main import main; sys.exit(main())")
LEAST_DICE = 0.998  # of the whole mask, against PyTorch in fp32


def call(command: Sequence[str], log: Path) -> tuple[int, float, str]:
    """Run a program from the repository's root.

    Args:
        command: Program and arguments.
        log: Gets its standard error.

    Returns:
        Exit code, seconds and standard output.
    """
    start = time.perf_counter()
    with log.open("wb") as stream:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stream, check=False)
    return done.returncode, round(time.perf_counter() - start, 2), done.stdout.decode(errors="replace")


def last_json(text: str) -> Any:
    """The document in the last line; None if there is none."""
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None


def prove_contract(given: argparse.Namespace) -> dict[str, Any]:
    """The contract suite and the transfers to and from GPU memory."""
    tests = ("tests/contract/test_engines.py", "tests/unit/test_gpu_pipeline.py")
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default")
    code, seconds, text = call((sys.executable, "-m", "pytest", *options, *tests), given.out / "contract.log")
    (given.out / "contract.txt").write_text(text, encoding="utf-8")
    return {"passed": code == 0, "seconds": seconds, "summary": (text.strip().splitlines() or [""])[-1]}


def prove_engine(given: argparse.Namespace) -> dict[str, Any]:
    """The demonstration model's engine: made unless it exists, timed, compared with PyTorch in fp32.

    The wider network's is made at the same time, as a build occupies one CPU core and hardly the GPU.
    """
    command = (*CTFLOW, "export", "-m", "bundle", "--engine", given.engine, "--device", given.device, "-o",
               str(given.cache))  # fmt: skip
    with (given.out / "wide-engine.log").open("wb") as log:
        wide = None
        if "volume" in given.steps:
            wide = subprocess.Popen((*volume_command(given), "--only-prepare"), cwd=ROOT, stdout=log, stderr=log)
        _, made_s, _ = call(command, given.out / "engine-made.log")
        wide_code = 0 if wide is None else wide.wait()
    # Once more for the figures, as the other build disturbed them.
    code, _, text = call(command, given.out / "engine.log")
    return {"passed": code == wide_code == 0, "made_s": made_s, "measured": last_json(text)}


def prove_cases(given: argparse.Namespace) -> dict[str, Any]:
    """Every CT series and a synthetic chest."""
    phantom = given.out / "phantom"
    if not phantom.exists():
        code, _, _ = call(
            (*CTFLOW, "phantom", str(phantom), "--seed", "21", "--tumours", "4"), given.out / "phantom.log"
        )
        if code:
            return {"passed": False, "phantom": code}
    cases = {path.name: path for path in given.ct} | {"phantom": phantom / "ct"}
    found = {name: prove_case(name, path, given) for name, path in cases.items()}
    return {"passed": all(case["passed"] for case in found.values()), "cases": found}


def prove_case(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One series through the application, through `ctflow run`, and through PyTorch in fp32."""
    commands = {
        "app": (sys.executable, "app", "--engine", given.engine),
        "run": (*CTFLOW, "run", "--engine", given.engine),
        "fp32": (*CTFLOW, "run", "--engine", "eager", "--precision", "fp32"),
    }
    runs, files = {}, {}
    for entry, command in commands.items():
        output = given.out / f"{name}-{entry}"
        shutil.rmtree(output, ignore_errors=True)
        common = (
            "-i",
            str(folder),
            "-o",
            str(output),
            "-m",
            "bundle",
            "--cache",
            str(given.cache),
            "--device",
            given.device,
        )
        code, seconds, _ = call((*command, *common), given.out / f"{name}-{entry}.log")
        results = sorted(output.glob("*/result.json"))
        runs[entry] = {"exit_code": code, "process_s": seconds}
        if len(results) != 1:
            runs[entry]["reason"] = f"{len(results)} results: give folders of one CT series each"
        else:
            files[entry] = results[0].parent / "segmentation.dcm"
            document = json.loads(results[0].read_text(encoding="utf-8"))
            runs[entry] |= {"stage_seconds": document["stage_seconds"], "engine": document["engine"]}
            shutil.copy(results[0], given.out / f"{name}-{entry}.result.json")
            runs[entry]["sha256"] = hashlib.sha256(files[entry].read_bytes()).hexdigest()
    if len(files) < len(commands):
        return {"passed": False, "runs": runs}
    same, dice = runs["app"]["sha256"] == runs["run"]["sha256"], dice_of(files["run"], files["fp32"])
    return {"passed": same and dice >= LEAST_DICE, "same_file": same, "dice_to_fp32": dice, "runs": runs}


def dice_of(first: Path, second: Path) -> float:
    """Overlap of everything that two SEGs of one series mark."""
    import pydicom  # noqa: PLC0415

    masks = []
    for path in (first, second):
        dataset = pydicom.dcmread(path)
        frames = {}
        pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
        for item, frame in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
            position = tuple(map(float, item.PlanePositionSequence[0].ImagePositionPatient))
            frames[position] = frames.get(position, 0) | frame.astype(bool)
        masks.append(frames)
    voxels = [sum(int(frame.sum()) for frame in frames.values()) for frames in masks]
    both = sum(int((masks[0][place] & masks[1][place]).sum()) for place in set(masks[0]) & set(masks[1]))
    return 2 * both / sum(voxels) if sum(voxels) else 1.0


def prove_volume(given: argparse.Namespace) -> dict[str, Any]:
    """Whole volumes with a wider network."""
    code, seconds, text = call(volume_command(given), given.out / "volume.log")
    found = last_json(text)
    return {"passed": code == 0 and found is not None, "seconds": seconds, "found": found}


def volume_command(given: argparse.Namespace) -> tuple[str, ...]:
    """The benchmark of the wider network."""
    width = (
        ("--feature-size", str(given.feature_size)) if given.wide is None else ("--model", str(given.wide.resolve()))
    )
    batch = () if given.batch is None else ("--batch", str(given.batch))
    options = ("--engine", given.engine, *width, *batch)
    places = ("--cache", str(given.cache), "--device", given.device)
    return (sys.executable, "benchmarks/gpu_volume.py", *options, *places)


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "engine": prove_engine,
    "cases": prove_cases,
    "contract": prove_contract,
    "volume": prove_volume,
}


def main() -> None:
    """Run the steps and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", default="tensorrt")
    parser.add_argument("--ct", type=Path, action="append", default=[])
    parser.add_argument("--wide", type=Path, help="bundle for the step volume (default: one with random weights)")
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument(
        "--batch", type=int, help="windows per call in the step volume (default: the bundle's, at least 4)"
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS))
    given = parser.parse_args()
    if len({path.resolve().name for path in given.ct} | {"phantom"}) <= len(given.ct):
        parser.error("--ct: folders of the same name, or one named phantom, would lie over each other")
    given.out, given.steps = given.out.resolve(), given.steps.split(",")
    given.out.mkdir(parents=True, exist_ok=True)
    given.cache = (given.cache or given.out / "engines").resolve()
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "steps": {}}
    for name in given.steps:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)  # noqa: T201
        record["steps"][name] = STEPS[name](given)
        (given.out / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, separators=(",", ":")))  # noqa: T201
    sys.exit(0 if all(step["passed"] for step in record["steps"].values()) else 1)


if __name__ == "__main__":
    main()
