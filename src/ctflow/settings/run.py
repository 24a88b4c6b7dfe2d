"""Settings of a run: one schema for the command line, the environment, and the files of the node and the cohort."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ctflow.core.errors import SettingsInvalid
from ctflow.settings.document import Given
from ctflow.settings.schema import (
    Group,
    Key,
    Reads,
    Refused,
    Switch,
    Text,
    choices_of,
    keys_of,
    one_line,
    path,
    shown,
    text_of_scalar,
    whole,
    wrong_choice,
)
from ctflow.settings.variables import warn_of_unknown
from ctflow.settings.viewers import VIEWERS, choose_for_viewer

SegGrid = Literal["source", "resampled"]
Holes = Literal["keyhole", "separate", "xor"]


def _overlap(value: Any) -> float:
    text = text_of_scalar(value)
    try:
        number = float(text)
    except ValueError:
        number = 1.0
    # Python also takes digits of other scripts, and underscores between digits.
    if not 0.0 <= number < 1.0 or not text.isascii() or "_" in text:
        raise ValueError(f"must be a number at least 0 and below 1, not {shown(value)}")
    return number


def _devices(value: Any) -> str:
    found = one_line(value)
    kind, colon, numbers = found.partition(":")
    if found in {"cpu", "cuda"}:
        return found
    gpus = numbers.split(",")
    if kind != "cuda" or not colon or not all(number.isascii() and number.isdecimal() for number in gpus):
        raise ValueError(wrong_choice(found, ["cpu", "cuda", "cuda:N", "cuda:N,M"]))
    if len({int(number) for number in gpus}) < len(gpus):
        raise ValueError(f"{shown(found)} names a GPU twice")
    return found


# Names by which volumes of a series are told apart (`ctflow.dicom.read.select.volumes`).
VOLUME_NAMES = (
    "temporal",
    "stack",
    "acquisition",
    "time",
    "trigger",
    "phase",
    "type",
    "contrast",
    "energy",
    "kernel",
    "object",
)


def read_volume(value: Any) -> str:
    """Which volume of a series is meant, as `Processing.volume` takes it; a ValueError if it is nothing of the kind."""
    text = text_of_scalar(value)
    if text in {"all", "first"} or (text.isascii() and text.isdecimal() and 0 < int(text) < 10_000):
        return text if text.isalpha() else str(int(text))
    name, sign, wanted = text.partition("=")
    if not sign or name not in VOLUME_NAMES or not wanted:
        names = ", ".join(f"{each}=" for each in VOLUME_NAMES)
        raise ValueError(
            f"must be all, first, a number from 1 on, or a value such as phase=50 ({names}), not {shown(text)}"
        )
    return text


def _folder_or_none(value: Any) -> Path | None:
    return None if value == "" else path(value)


def read_environment() -> Mapping[str, str]:
    """The process's environment variables (no other module reads them)."""
    return dict(os.environ)


def _user_folder(environment: Mapping[str, str], variable: str, *below: str) -> Path | None:
    """By the XDG base directory specification; None where there is neither the variable nor a home folder."""
    if environment.get(variable):
        return Path(environment[variable]) / "ctflow"
    return Path(environment["HOME"], *below, "ctflow") if environment.get("HOME") else None


def _cache_folder(environment: Mapping[str, str]) -> Path | str:
    """The variable's or the user's; empty where there is none."""
    return environment.get("CTFLOW_CACHE", _user_folder(environment, "XDG_CACHE_HOME", ".cache") or "")


@dataclass(frozen=True)
class Processing(Group):
    """How a series is computed and what is written of it; None leaves the choice to the bundle or the machine."""

    cases_in_flight: Annotated[
        int | None,
        whole(1, 64),
        Key(
            "Series that are read, segmented and written at the same time; 1 takes one after another.",
            "N",
            "what CPUs and memory allow",
        ),
    ] = None
    volume: Annotated[
        str,
        Reads(read_volume),
        Key("Of a series that holds several volumes: all, the first, the N-th, or by value, such as phase=50.", "V"),
    ] = "all"
    allow_gaps: Annotated[Switch, Key("Interpolate single missing slices, with a warning.")] = False
    engine: Annotated[Text, Key("Backend that computes (see `ctflow engines`).", "NAME")] = "auto"
    precision: Annotated[
        Literal["fp32", "tf32", "bf16", "fp16", "fp8"] | None,
        Key("Number format: fp32, tf32, bf16, fp16 or, with the engine fused, fp8.", "P", "the engine's own"),
    ] = None
    overlap: Annotated[
        float | None, Reads(_overlap), Key("Overlap of neighbouring windows, 0 <= F < 1.", "F", "the bundle's")
    ] = None
    config: Annotated[
        Text | None,
        Key("The bundle's configuration: files of its `configs`, joined by commas.", "FILE", "inference.json or .yaml"),
    ] = None
    allow_code: Annotated[
        Switch, Key("Execute a network of the bundle's own Python code, or its TorchScript file.")
    ] = False
    mirror: Annotated[
        Literal["none", "plans"],
        Key("Average mirrored windows as an nnU-Net model was trained to (`plans`), or not."),
    ] = "plans"
    roi: Annotated[
        Literal["none", "body"], Key("Compute and mark the whole volume (`none`), or only where the body is.")
    ] = "none"
    constant_windows: Annotated[
        Literal["background", "compute"],
        Key("Marks in windows of a single HU value: none, or the network's output, as in MONAI."),
    ] = "background"
    cache: Annotated[
        Path | None,
        Reads(_folder_or_none),
        Key("Folder for engine files and their measurements; empty keeps none.", "DIR", "the user's cache folder"),
    ] = field(default_factory=lambda: _folder_or_none(_cache_folder(read_environment())))
    report: Annotated[
        Literal["html", "none"], Key("Write report.html, a viewer in one file, or omit it.", of_files=True)
    ] = "html"
    secondary_capture: Annotated[Switch, Key("Also write the preview as a DICOM Secondary Capture.", of_files=True)] = (
        False
    )
    pdf: Annotated[Switch, Key("Also write report.dcm, the report as a DICOM Encapsulated PDF.", of_files=True)] = False
    viewer: Annotated[
        Literal["ohif", "slicer", "pacs"] | None,
        Key(
            "Viewer that the SEG is for: chooses its kind, grid, segments and frames, where they are not given.",
            "ohif|slicer|pacs",
            "none",
            of_files=True,
        ),
    ] = None
    seg: Annotated[
        Literal["binary", "labelmap", "fractional"],
        Key("Kind of the SEG: a bit per pixel and segment, one label per pixel, or probabilities.", of_files=True),
    ] = "binary"
    seg_grid: Annotated[
        SegGrid,
        Key("Grid of the SEG of a tilted or uneven series: its slices, or a right-angled regular grid.", of_files=True),
    ] = "source"
    segments: Annotated[
        Literal["class", "finding"],
        Key("A segment for each class of the bundle, or for each finding.", of_files=True),
    ] = "class"
    omit_empty_frames: Annotated[Switch, Key("Omit frames without marks from the SEG.", "yes|no", of_files=True)] = True
    rtstruct: Annotated[Switch, Key("Also write structures.dcm, an RT Structure Set.", of_files=True)] = False
    rtstruct_holes: Annotated[
        Holes,
        Key(
            "Holes in structures.dcm: by keyhole, or as separate contours of type CLOSED_PLANAR or CLOSEDPLANAR_XOR.",
            of_files=True,
        ),
    ] = "keyhole"
    nifti: Annotated[Switch, Key("Also write segmentation.nii.gz.", of_files=True)] = False

    def __post_init__(self) -> None:
        """Refuse words that a key does not take, which Python would let pass, and what does not go together.

        Raises:
            SettingsInvalid: A value, or two of them.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in (*choices, getattr(Processing, name)):  # the default may be None
                raise Refused(f"{name}: {wrong_choice(str(value), list(choices))}", name)
        for name, word in VIEWERS.get(self.viewer or "", {}).items():  # in Python; text is read by `add_layers`
            if getattr(self, name) == getattr(Processing, name):
                object.__setattr__(self, name, {"yes": True}.get(word, word))
        object.__setattr__(self, "viewer", None)  # a changed copy keeps what it chose
        if not isinstance(self.cache, Path | None):
            raise Refused(f"cache: must be a pathlib.Path or None, not {shown(self.cache)}", "cache")
        if self.overlap is not None and not 0.0 <= self.overlap < 1.0:
            raise Refused(f"overlap: must be a number at least 0 and below 1, not {self.overlap}", "overlap")
        if self.seg == "fractional" and self.segments == "finding":
            raise Refused(
                "finding: a fractional SEG has no segments for findings; use another --seg",
                "segments",
                reason="conflict",
            )


_WORDS = {"viewer": "for"}  # of flags and variables, where they are not the keys'
_CHOICES = {
    name: choices for name, (annotation, _) in keys_of(Processing).items() if (choices := choices_of(annotation))
}


@dataclass(frozen=True)
class Settings(Processing):
    """The settings of a run (docs/settings.md); None leaves the choice to the bundle or the machine."""

    series: Annotated[Text | None, Key("Segment only the series with this SeriesInstanceUID.", "UID", "all")] = None
    pick: Annotated[
        Literal["all", "best"], Key("Segment every eligible series, or the best of each study and frame of reference.")
    ] = "all"
    force: Annotated[Switch, Key("Also segment series that are not eligible but possible, with a warning.")] = False
    device: Annotated[
        str | None,
        Reads(_devices),
        Key("Where to compute; several GPUs share a volume.", "cpu|cuda|cuda:N,M", "the first GPU, or the CPU"),
    ] = None


@dataclass(frozen=True)
class Option:
    """One setting as a flag (`--overlap`) and an environment variable (`CTFLOW_OVERLAP`).

    Attributes:
        name: The field of `Settings`.
        key: What it means.
        metavar: What stands for the value in the help; empty for a switch, which takes none.
        default: What holds without it.
    """

    name: str
    key: Key
    metavar: str
    default: str

    @property
    def flag(self) -> str:
        """The flag, as typed."""
        return flag_of(self.name)

    @property
    def variable(self) -> str:
        """The environment variable that gives the default."""
        return f"CTFLOW_{_WORDS.get(self.name, self.name).upper()}"


def flag_of(name: str) -> str:
    """The flag of a key."""
    return f"--{_WORDS.get(name, name).replace('_', '-')}"


_DEFAULTS: Mapping[str, Any] = {each.name: each.default for each in fields(Settings)}
OPTIONS = tuple(
    Option(
        name,
        key,
        key.metavar or "|".join(choices_of(annotation)),
        key.default or {True: "yes", False: "no"}.get(_DEFAULTS[name], str(_DEFAULTS[name])),
    )
    for name, (annotation, key) in keys_of(Settings).items()
)


def add_layers(given: Given, kind: type[Group], typed: Mapping[str, Any], environment: Mapping[str, str]) -> Given:
    """Add what was typed, which wins over the file, and what the environment says of options that neither gives.

    Args:
        given: By the file, if any; is changed.
        kind: The group that it is for.
        typed: Name of a key -> what was typed (or whether a switch was given); None and False mean "not given".
        environment: Environment variables.
    """
    for name, value in typed.items():
        if value is not None and value is not False:
            given.data[name], given.named[name] = str(value), flag_of(name)
    choose_for_viewer(given, [name for name, value in typed.items() if value] if typed.get("viewer") else given.data)
    known = keys_of(kind)
    warn_of_unknown(environment, {option.variable for option in OPTIONS})
    for option in OPTIONS:
        value = environment.get(option.variable)
        is_given = value or (value == "" and option.name == "cache")  # an empty variable is as none, but for the cache
        if is_given and option.name in known and option.name not in given.data:
            given.data[option.name], given.named[option.name] = value, option.variable
    choose_for_viewer(given, given.data)
    given.data.setdefault("cache", _cache_folder(environment))
    return given


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
    typed = {option.name: values.get(option.name) for option in OPTIONS}
    return add_layers(Given(), Settings, typed, environment).read(Settings)


def data_folder_from_environment(environment: Mapping[str, str]) -> Path:
    """Where the DICOM node keeps its data by default: the user's data folder by the XDG base directory specification.

    Args:
        environment: Environment variables.

    Raises:
        SettingsInvalid: There is neither XDG_DATA_HOME nor HOME.
    """
    folder = _user_folder(environment, "XDG_DATA_HOME", ".local", "share")
    if folder is None:
        raise SettingsInvalid(
            "the user has no home folder: give the node a folder with the key data of its file", reason="missing-folder"
        )
    return folder


@dataclass(frozen=True)
class Paths:
    """Where a run reads and writes; `model` None means the demonstration bundle."""

    input: Path
    output: Path
    model: Path | None

    def absolute(self) -> Paths:
        """The same from every working directory."""
        return Paths(self.input.absolute(), self.output.absolute(), self.model and self.model.absolute())


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
