"""How exact and how fast an engine was found to be: parts of result.json, which need no torch to be read or written."""

from __future__ import annotations

from dataclasses import dataclass

from ctflow.engines.contract import Precision


@dataclass(frozen=True)
class ParityResult:
    """How close an engine is to PyTorch in fp32.

    Attributes:
        relative_error: Largest difference of logits, relative to the largest logit; in full batches, and of the first
            window alone.
        dice: Overlap of the masks of all windows together: the smallest of all segments with at
            least `ctflow.export.parity.FEWEST_VOXELS`, of all segments together if none has so many; None if nothing
            was segmented.
        windows: How many windows were compared.
        judged: "labels" where masks decided along with logits, else "logits".
    """

    relative_error: float
    dice: float | None
    windows: int
    judged: str


@dataclass(frozen=True)
class Measured:
    """One engine on this machine.

    Attributes:
        backend: Its name.
        precision: Number format of the heavy arithmetic.
        window_seconds: Wall time of one window, the best of a few, in batches as large as the engine takes; None if it
            could not be made or run.
        parity: How near it is to PyTorch in fp32 on windows of a phantom; None if it was not compared: it is the
            reference, or a faster one passed.
        reason: Why it is not used; None if it can be.
        batch: Windows per batch that were timed; None if none were.
    """

    backend: str
    precision: Precision
    window_seconds: float | None
    parity: ParityResult | None
    reason: str | None
    batch: int | None = None


@dataclass(frozen=True)
class Agreement:
    """An engine's comparison and its result: a part of result.json.

    Attributes:
        windows: How many windows were compared, at least 1.
        of: How many windows of that CT were computed.
        dice: Overlap of the masks of these windows (`ParityResult`); None where nothing was
            segmented in them.
        relative_error: Largest difference of logits, relative to the largest logit.
        judged: "labels" where masks decided along with logits, else "logits".
        engine: Backend and precision of the engine.
        reference: Backend and precision that it was compared with.
        series: Which series the windows come from: "this series" or "an earlier series".
        date: When, as YYYY-MM-DD.
        kept: Whether the figures are in the cache; else each process compares its first CT.
    """

    windows: int
    of: int
    dice: float | None
    relative_error: float
    judged: str
    engine: str
    reference: str
    series: str
    date: str
    kept: bool
