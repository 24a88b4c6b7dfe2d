"""The one gate. Its engines here give their windows as logits, so that each test says what they differ in."""

from __future__ import annotations

import pytest
import torch

from ctflow.core.errors import DeviceOutOfMemory, ParityFailed
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines.contract import EngineInfo
from ctflow.engines.request import EngineRequest
from ctflow.export import parity
from ctflow.export.parity import FEWEST_VOXELS, TOLERANCE, TOLERANCE_ALONE, check_parity, is_reference, reference_logits
from reasons import raises_reason

ROI = (16, 16, 16)
UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}


def model_of(channels: int = 2, activation: str = "softmax", threshold: float | None = None) -> Model:
    spec = ModelSpec(
        "m", "1", NetworkSpec("UNet", UNET), 1, channels, (), ROI, 0.25, "gaussian", 4, activation, threshold, (), "",
        False,
    )  # fmt: skip
    return Model(spec, {}, "d" * 64)


class Gives:
    """An engine whose logits are a function of its windows."""

    def __init__(self, function, precision="fp32", most=1) -> None:
        self.predict = function
        self.info = EngineInfo("made up", precision, "cpu", ROI, (1, most), "d" * 64, 1)


def window(marked: int, seed: int = 0) -> torch.Tensor:
    """(1, 1, *ROI) logits: so many voxels of 0.5 to 1, the others between -1 and -0.5."""
    values = 0.5 + 0.5 * torch.rand(16**3, generator=torch.Generator().manual_seed(seed))
    values[marked:] *= -1
    values[0] = -1.0  # the largest logit, whatever is marked
    return values.reshape(1, 1, *ROI)


def check(windows, function=lambda given: given, **arguments):
    precision, most = arguments.pop("precision", "fp32"), arguments.pop("most", 1)
    model = arguments.pop("model", model_of())
    return check_parity(Gives(function, precision, most), model, windows, expected=windows, **arguments)


def test_where_nothing_is_segmented_there_is_no_dice_and_logits_alone_are_judged():
    found = check([window(0)])
    assert (found.dice, found.windows, found.judged) == (None, 1, "logits")
    for precision in ("fp32", "tf32", "bf16", "fp16", "fp8"):
        between = (TOLERANCE[precision] + TOLERANCE_ALONE[precision]) / 2
        assert TOLERANCE_ALONE[precision] < TOLERANCE[precision]
        assert check([window(3000)], lambda given, b=between: given + b, precision=precision).judged == "labels"
        with raises_reason(ParityFailed, "differs"):
            check([window(0)], lambda given, b=between: given + b, precision=precision)


def test_a_mask_of_a_few_voxels_is_told_of_and_not_judged():
    def one_voxel_less(given):
        given = given.clone()
        given.view(-1)[1] = -0.0
        return given

    few = window(5)
    few.view(-1)[1] = 1e-3
    found = check([few], one_voxel_less)
    assert found.judged == "logits"
    assert found.dice == pytest.approx(2 * 3 / (3 + 4))
    assert check([window(FEWEST_VOXELS + 1)]).judged == "labels"


def test_masks_that_differ_on_undecided_voxels_fail_by_their_dice():
    """Logits that no tolerance would refuse: what is undecided falls to the other side."""
    given = window(3000)
    given.view(-1)[1:16] = 1e-3

    def undecided(windows):
        return torch.where(windows.abs() < 0.01, -windows, windows)

    with raises_reason(ParityFailed, "differs", names="Dice 0.997"):
        check([given], undecided)
    assert check([given], undecided, lowest_dice=parity.LOWEST_DICE_OF_CT).dice == pytest.approx(0.9975, abs=1e-4)
    assert check([given], undecided, logits_only=True).judged == "logits"


def test_masks_in_fp8_may_differ_a_little_more():
    given = window(3000)

    def undecided(count):
        given.view(-1)[1 : 1 + count] = 1e-3
        return lambda windows: torch.where(windows.abs() < 0.01, -windows, windows)

    assert check([given], undecided(10), precision="fp8").dice == pytest.approx(0.9983, abs=1e-4)
    with raises_reason(ParityFailed, "differs", names="Dice 0.998"):
        check([given], undecided(10), precision="fp16")
    with raises_reason(ParityFailed, "differs", names="at least 0.998"):
        check([given], undecided(14), precision="fp8")


def test_windows_are_judged_together():
    found = check([window(600, 1), window(0), window(600, 2)])
    assert (found.windows, found.judged, found.dice, found.relative_error) == (3, "labels", 1.0, 0.0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("marked", [0, 3000])
def test_logits_that_are_not_finite_fail(wrong, marked):
    def one_is_wrong(given):
        given = given.clone()
        given.view(-1)[7] = wrong
        return given

    with raises_reason(ParityFailed, "differs"):
        check([window(marked)], one_is_wrong)


def test_comparing_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        check([])


@pytest.mark.parametrize(("one", "other"), [(0, 4), (1, 5), (3, 7), (6, 7), (0, 1)])
def test_windows_that_change_places_in_a_batch_are_found(one, other):
    """Also where the batch holds more windows than are compared, so that some are in it twice."""

    def swapped(given):
        given = given.clone()
        if len(given) == 8:
            given[[one, other]] = given[[other, one]]
        return given

    windows = [window(3000, seed) for seed in range(4)]
    assert check(windows, most=8).relative_error == 0
    with raises_reason(ParityFailed, "differs"):
        check(windows, swapped, most=8)


def test_a_window_alone_and_in_the_batch_that_was_used_is_compared():
    sizes = []

    def predict(given):
        sizes.append(len(given))
        return given

    check([window(10, seed) for seed in range(4)], predict, most=8, batch=2)
    assert sizes == [1, 2, 2]


def test_of_several_segments_the_smallest_that_tells_decides():
    """Two channels with a threshold: a large segment that is right, and a small one that is not."""
    model = model_of(2, "sigmoid", 0.5)
    given = torch.cat([window(3000), window(4)], 1)
    given[0, 1].view(-1)[1:4] = 1e-3

    def small_one_is_gone(windows):
        windows = windows.clone()
        windows[:, 1] -= 2e-3
        return windows

    found = check([given], small_one_is_gone, model=model)
    assert (found.dice, found.judged) == (1.0, "labels")
    with raises_reason(ParityFailed, "differs", names="Dice"):
        check([given.flip(1).contiguous()], lambda windows: -windows, model=model, precision="bf16")


def test_the_reference_is_pytorch_in_fp32_and_nothing_else():
    assert is_reference("eager", "fp32")
    assert not is_reference("eager", "fp16")
    assert not is_reference("openvino", "fp32")


def test_where_the_gpu_is_too_small_the_cpu_computes_the_reference(monkeypatch):
    opened = []

    def open_engine(request, model):
        opened.append(request)
        if request.device != "cpu":
            raise DeviceOutOfMemory("too little memory")
        engine = Gives(lambda given: given + 1)
        engine.close = lambda: opened.append("closed")
        return engine

    monkeypatch.setattr(parity, "open_engine", open_engine)
    (found,) = reference_logits(model_of(), [window(3)], "cuda:1")
    assert torch.equal(found, window(3) + 1)
    strict = ("fp32", ROI, (1, 1))
    assert opened == [EngineRequest("eager", "cuda:1", *strict), EngineRequest("eager", "cpu", *strict), "closed"]
