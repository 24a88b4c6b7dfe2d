"""Settings of a run: one table of options for the command line, the application and the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ctflow.core.errors import SettingsInvalid

Pick = Literal["all", "best"]
Roi = Literal["none", "body"]
ConstantWindowsAre = Literal["background", "compute"]
Report = Literal["html", "none"]
SegKind = Literal["binary", "labelmap", "fractional"]
SegmentPer = Literal["class", "finding"]
SegGrid = Literal["source", "resampled"]


@dataclass(frozen=True)
class Settings:
    """What a person may choose about a run; None leaves the choice to the bundle or the machine.

    Attributes:
        series: Run only the series with this SeriesInstanceUID.
        pick: Run every series that is fit, or the best one of each study and frame of reference.
        force: Run series that the fitness rules set aside, with a warning.
        allow_gaps: Interpolate where one slice is missing between two, with a warning.
        engine: Backend name, or "auto".
        precision: Number format of the heavy arithmetic; None takes the engine's own.
        overlap: Overlap of neighbouring windows, 0 <= overlap < 1; None takes the bundle's.
        roi: Which part of the volume gets windows and marks: "none" is the whole volume, "body" where the body is.
        constant_windows: What is marked in windows that hold a single HU value (padding): "background" is nothing,
            unless another window holds the voxel too; "compute" is what the network says, as MONAI does.
        device: torch device, or several GPUs ("cuda:0,1"); None takes the first GPU, or the CPU where there is none.
        cache: Folder of made engines and what was measured about them; None keeps none, and only engines that need no
            file can run.
        report: Whether report.html is written beside the SEG.
        secondary_capture: Whether the preview is written as a DICOM image, too.
        seg: Kind of the SEG: a bit a pixel and segment, one label a pixel, or each segment's probability.
        seg_grid: Where the SEG's frames lie: on the source's slices, or, where those are tilted or were resampled, on a
            right-angled regular grid.
        segments: A segment of the SEG for each class of the bundle, or for each finding (connected component).
        omit_empty_frames: Leave frames without a marked pixel out of the SEG.
        nifti: Write the mask as NIfTI, too.
    """

    series: str | None = None
    pick: Pick = "all"
    force: bool = False
    allow_gaps: bool = False
    engine: str = "auto"
    precision: str | None = None
    overlap: float | None = None
    roi: Roi = "none"
    constant_windows: ConstantWindowsAre = "background"
    device: str | None = None
    cache: Path | None = None
    report: Report = "html"
    secondary_capture: bool = False
    seg: SegKind = "binary"
    seg_grid: SegGrid = "source"
    segments: SegmentPer = "class"
    omit_empty_frames: bool = True
    nifti: bool = False


@dataclass(frozen=True)
class Option:
    """One setting as a flag (`--overlap`) and an environment variable (`CTFLOW_OVERLAP`).

    Attributes:
        name: The field of `Settings`.
        metavar: What stands for the value in the help.
        help: One sentence.
        parse: Text to value; a ValueError says what is wrong.
        switch: Takes no value.
        of_files: Says what is written, and so means nothing to commands that write no result folder.
    """

    name: str
    metavar: str
    help: str
    parse: Callable[[str], Any]
    switch: bool = field(default=False)
    of_files: bool = field(default=False)

    @property
    def flag(self) -> str:
        """The flag, as typed."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The environment variable that gives the default."""
        return f"CTFLOW_{self.name.upper()}"


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is none of {', '.join(allowed)}")
        return text

    return parse


def _overlap(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{text} is not at least 0 and below 1")
    return value


def _device(text: str) -> str:
    kind, colon, numbers = text.partition(":")
    if text in {"cpu", "cuda"}:
        return text
    gpus = numbers.split(",")
    if kind != "cuda" or not colon or not all(number.isascii() and number.isdecimal() for number in gpus):
        raise ValueError(f"{text!r} is none of cpu, cuda, cuda:N, cuda:N,M")
    if len({int(number) for number in gpus}) < len(gpus):
        raise ValueError(f"{text!r} names a GPU twice")
    return text


def _roi(text: str) -> str:
    if text == "lung":
        raise ValueError("lung is not built yet; none and body are")
    return _one_of("none", "body")(text)


def _switch(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def _series(text: str) -> str:
    if not text.strip():
        raise ValueError("a SeriesInstanceUID is needed")
    return text.strip()


OPTIONS: tuple[Option, ...] = (
    Option("series", "UID", "Run only the series with this SeriesInstanceUID.", _series),
    Option("pick", "all|best", "Run every fit series, or the best of each study.", _one_of("all", "best")),
    Option("force", "", "Run series that the fitness rules set aside, with a warning.", _switch, switch=True),
    Option("allow_gaps", "", "Interpolate single missing slices, with a warning.", _switch, switch=True),
    Option("engine", "NAME", "Backend that computes (see `ctflow engines`).", str),
    Option(
        "precision",
        "P",
        "fp32, tf32, bf16 or fp16 (default: the engine's own).",
        _one_of("fp32", "tf32", "bf16", "fp16"),
    ),
    Option("overlap", "F", "Overlap of neighbouring windows, 0 <= F < 1 (default: the bundle's).", _overlap),
    Option("roi", "none|body", "Compute and mark the whole volume (default), or only where the body is.", _roi),
    Option(
        "constant_windows",
        "background|compute",
        "Mark nothing in windows of a single HU value (default), or what the network says, as MONAI does.",
        _one_of("background", "compute"),
    ),
    Option("cache", "DIR", "Keeps made engines (default: the user's cache folder; empty keeps none).", str),
    Option("device", "cpu|cuda|cuda:N,M", "Where to compute (default: the first GPU, or the CPU).", _device),
    Option(
        "report",
        "html|none",
        "Write report.html, a viewer in one file, or leave it out.",
        _one_of("html", "none"),
        of_files=True,
    ),
    Option(
        "secondary_capture",
        "",
        "Write the preview as a DICOM Secondary Capture, too.",
        _switch,
        switch=True,
        of_files=True,
    ),
    Option(
        "seg",
        "KIND",
        "Kind of the SEG: binary (default), labelmap or fractional.",
        _one_of("binary", "labelmap", "fractional"),
        of_files=True,
    ),
    Option(
        "seg_grid",
        "source|resampled",
        "SEG of a tilted or uneven series: on its slices (default), or on a right-angled grid.",
        _one_of("source", "resampled"),
        of_files=True,
    ),
    Option(
        "segments",
        "class|finding",
        "A segment for each class of the bundle (default), or for each finding.",
        _one_of("class", "finding"),
        of_files=True,
    ),
    Option(
        "omit_empty_frames",
        "yes|no",
        "Leave frames without a mark out of the SEG (default: yes).",
        _switch,
        of_files=True,
    ),
    Option("nifti", "", "Write segmentation.nii.gz, too.", _switch, switch=True, of_files=True),
)


def settings_from_values(values: Mapping[str, str | bool | None], environment: Mapping[str, str]) -> Settings:
    """Settings from what a person typed and, where they typed nothing, from the environment.

    Args:
        values: Option name -> text as typed (or whether a switch was given); None and False mean "not given".
        environment: Environment variables.

    Returns:
        The settings.

    Raises:
        SettingsInvalid: A value is wrong; names the flag or the variable.
    """
    chosen: dict[str, Any] = {}
    for option in OPTIONS:
        given = values.get(option.name)
        where, text = option.flag, given
        if given is None or given is False:
            where, text = option.variable, environment.get(option.variable)
        if text is None:
            continue
        try:
            chosen[option.name] = option.parse(str(text))
        except ValueError as error:
            raise SettingsInvalid(f"{where}: {error}", reason="invalid-value") from error
    if chosen.get("seg") == "fractional" and chosen.get("segments") == "finding":
        raise SettingsInvalid(
            "--segments finding: fractions around a finding belong to none; use another --seg", reason="conflict"
        )
    chosen["cache"] = _cache(chosen.get("cache"), environment)
    return Settings(**chosen)


def _cache(given: str | None, environment: Mapping[str, str]) -> Path | None:
    """The folder as given, else the user's by the XDG base directory specification; None where there is neither."""
    if given is not None:
        return Path(given) if given else None
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "ctflow"
    return Path(environment["HOME"]) / ".cache" / "ctflow" if environment.get("HOME") else None


def data_folder_from_environment(environment: Mapping[str, str]) -> Path:
    """Where the DICOM node keeps its data by default: the user's data folder by the XDG base directory specification.

    Args:
        environment: Environment variables.

    Raises:
        SettingsInvalid: There is neither XDG_DATA_HOME nor HOME.
    """
    if environment.get("XDG_DATA_HOME"):
        return Path(environment["XDG_DATA_HOME"]) / "ctflow"
    if environment.get("HOME"):
        return Path(environment["HOME"]) / ".local" / "share" / "ctflow"
    raise SettingsInvalid(
        "the user has no home folder: give the node a folder with the key data of its file", reason="missing-folder"
    )


@dataclass(frozen=True)
class Paths:
    """Where a run reads and writes; `model` None means the demonstration bundle."""

    input: Path
    output: Path
    model: Path | None


def paths_from_values(values: Mapping[str, str | None], environment: Mapping[str, str]) -> Paths:
    """Paths from -i, -o and -m or, where absent, from HOLOSCAN_{INPUT,OUTPUT,MODEL}_PATH.

    Args:
        values: "input", "output" and "model" as typed, or None.
        environment: Environment variables.

    Returns:
        The paths, not resolved and not checked.

    Raises:
        SettingsInvalid: No input or no output is given.
    """
    found = {name: values.get(name) or environment.get(f"HOLOSCAN_{name.upper()}_PATH") for name in _PATHS}
    for name in ("input", "output"):
        if not found[name]:
            raise SettingsInvalid(
                f"no {name} folder: give -{name[0]} DIR or set HOLOSCAN_{name.upper()}_PATH", reason="missing-folder"
            )
    model = found["model"]
    return Paths(Path(str(found["input"])), Path(str(found["output"])), Path(model) if model else None)


def model_path_from_value(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The bundle as typed, else HOLOSCAN_MODEL_PATH, else None for the demonstration bundle."""
    return given or environment.get("HOLOSCAN_MODEL_PATH") or None


_PATHS = ("input", "output", "model")


def read_environment() -> Mapping[str, str]:
    """The process's environment variables (no other module reads them)."""
    return dict(os.environ)
