"""Windows and blending equal MONAI's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from monai.inferers.utils import _get_scan_interval

from ctflow.core.errors import BundleInvalid, DeviceOutOfMemory
from ctflow.window.blend import importance_map, total_weight
from ctflow.window.devices import Worker
from ctflow.window.grid import padding_for_window, shares_of_windows, starts_along_axis, window_axes, window_starts
from ctflow.window.predict import predict_volume
from reasons import raises_reason

sizes = st.tuples(*[st.integers(1, 23)] * 3)
windows = st.tuples(*[st.integers(1, 12)] * 3)
overlaps = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.floats(0, 0.95))


class Network(torch.nn.Module):
    """Depends on the place inside the window, so that wrong windows or weights show."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(inputs * 10 + outputs)
        self.mix = torch.randn(outputs, inputs)

    def forward(self, windows):
        place = torch.linspace(-1, 1, windows[0, 0].numel()).reshape(windows.shape[2:])
        return torch.einsum("oc,bcdhw->bodhw", self.mix, windows) * (1 + place) + place


class ElementwiseNetwork(Network):
    """Sums channel by channel: a window's answer has the same bits in every batch, which BLAS does not promise."""

    def forward(self, windows):
        place = torch.linspace(-1, 1, windows[0, 0].numel()).reshape(windows.shape[2:])
        mixed = sum(self.mix[:, n].reshape(1, -1, 1, 1, 1) * windows[:, n : n + 1] for n in range(windows.shape[1]))
        return mixed * (1 + place) + place


class NetworkRoundedByBatch(Network):
    """What BLAS does on some machines, on every one: the last bit depends on how many windows the batch holds."""

    def forward(self, windows):
        return super().forward(windows) * (1 + torch.finfo(torch.float32).eps * (len(windows) % 2))


def assert_same_but_for_rounding(found, expected, tolerance=1e-5):
    """Logits within the tolerance, and the same label wherever the two best differ by more than that."""
    assert torch.allclose(found, expected, atol=tolerance, rtol=tolerance)
    best = expected.topk(2, dim=1).values
    sure = (best[:, 0] - best[:, 1]) > 2 * tolerance * (1 + best.abs().amax(dim=1))
    assert torch.equal(found.argmax(dim=1)[sure], expected.argmax(dim=1)[sure])


def padded_image(shape, share):
    """(1, C, D, H, W): noise in this share of each axis, -1 behind it, and 0.5 in the last column."""
    volume = torch.from_numpy(np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32))
    for axis, part in enumerate(share, start=2):
        count = volume.shape[axis]
        volume.narrow(axis, int(count * part), count - int(count * part)).fill_(-1.0)
    if share[2] < 1:
        volume[..., -1] = 0.5
    return volume


@settings(max_examples=150, deadline=None)
@given(
    size=sizes,
    roi=windows,
    overlap=overlaps,
    blend=st.sampled_from(["constant", "gaussian"]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    batch_size=st.integers(1, 5),
    image=st.tuples(*[st.sampled_from([0.2, 0.5, 1.0])] * 3),
)
def test_prediction_equals_monai(size, roi, overlap, blend, channels, batch_size, image):
    """Also where a part of each axis holds an image and the rest one value."""
    volume = padded_image((channels[0], *size), image)
    network = Network(*channels)
    ours = predict_volume(volume, network, roi=roi, overlap=overlap, blend=blend, batch_size=batch_size)
    theirs = sliding_window_inference(volume, roi, batch_size, network, overlap=overlap, mode=blend)
    assert ours.shape == theirs.shape == (1, channels[1], *size)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(size=sizes, roi=windows, overlap=overlaps)
def test_the_grid_is_monais(size, roi, overlap):
    padded = tuple(max(pair) for pair in zip(size, roi, strict=True))
    interval = _get_scan_interval(padded, roi, 3, (overlap,) * 3)
    theirs = [tuple(int(axis.start) for axis in place) for place in dense_patch_slices(padded, roi, interval)]
    assert window_starts(padded, roi, overlap) == theirs


@settings(max_examples=50, deadline=None)
@given(roi=st.tuples(*[st.integers(1, 40)] * 3), blend=st.sampled_from(["constant", "gaussian"]))
def test_the_weights_are_monais(roi, blend):
    ours = importance_map(roi, blend, torch.device("cpu"))
    assert torch.equal(ours, compute_importance_map(roi, mode=blend, sigma_scale=0.125))
    assert ours.min() > 0


def test_an_unknown_blend_is_a_programming_mistake():
    with pytest.raises(ValueError, match="unknown blend"):
        importance_map((2, 2, 2), "mean", torch.device("cpu"))


def test_windows_cover_every_voxel_and_end_at_the_border():
    assert starts_along_axis(10, 4, 0.0) == [0, 4, 6]
    assert starts_along_axis(4, 4, 0.5) == [0]
    assert starts_along_axis(5, 4, 0.99) == [0, 1]
    assert padding_for_window((3, 4, 9), (4, 4, 6)) == ((0, 1), (0, 0), (0, 0))


@settings(max_examples=100, deadline=None)
@given(size=sizes, roi=windows, overlap=overlaps, blend=st.sampled_from(["constant", "gaussian"]))
def test_the_total_weight_is_the_sum_of_every_windows_weight(size, roi, overlap, blend):
    padded = tuple(max(pair) for pair in zip(size, roi, strict=True))
    weight = importance_map(roi, blend, torch.device("cpu"))
    expected = torch.zeros(padded)
    for start in window_starts(padded, roi, overlap):
        expected[tuple(slice(n, n + length) for n, length in zip(start, roi, strict=True))] += weight
    found = total_weight(weight, window_axes(padded, roi, overlap), padded)
    assert torch.allclose(found, expected, rtol=1e-5)


@given(windows=st.integers(1, 60), count=st.integers(1, 70))
def test_shares_are_contiguous_equal_and_never_empty(windows, count):
    starts = [(n, 0, 0) for n in range(windows)]
    shares = shares_of_windows(starts, count)
    assert [start for share in shares for start in share] == starts
    assert len(shares) == min(count, windows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("blend", ["constant", "gaussian"])
def test_constant_in_constant_out(blend):
    volume = torch.full((1, 1, 17, 9, 30), 3.0)
    logits = predict_volume(volume, lambda windows: windows * 2, roi=(8, 8, 8), overlap=0.6, blend=blend, batch_size=3)
    assert torch.allclose(logits, torch.full_like(logits, 6.0))


def test_progress_counts_windows():
    steps = []
    predict_volume(
        torch.rand(1, 1, 8, 8, 8),
        lambda windows: windows,
        roi=(4, 4, 4),
        overlap=0,
        batch_size=3,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [("segment", n, 8) for n in (0, 3, 6, 8)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"volume": torch.rand(1, 8, 8, 8)},
        {"volume": torch.rand(2, 1, 8, 8, 8)},
        {"roi": (4, 4)},
        {"roi": (4, 4, 0)},
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"overlap": float("nan")},
        {"batch_size": 0},
        {"predict": lambda windows: windows[:1]},
    ],
)
def test_wrong_arguments_are_named(wrong):
    arguments = {"volume": torch.rand(1, 1, 8, 8, 8), "predict": lambda windows: windows, "roi": (4, 4, 4), **wrong}
    with pytest.raises(ValueError, match=r"."):
        predict_volume(arguments.pop("volume"), arguments.pop("predict"), **arguments)


@pytest.mark.parametrize("answer", [lambda windows: windows[:, :, :2], lambda windows: windows.mean((2, 3, 4))])
def test_a_network_without_a_value_for_each_voxel_is_the_models_fault(answer):
    with raises_reason(BundleInvalid, "network", names="windows of (4, 4, 4)"):
        predict_volume(torch.rand(1, 1, 8, 8, 8), answer, roi=(4, 4, 4))


def predict_up_to(most: int, calls: list[int]):
    """A network whose device has memory for `most` windows."""

    def predict(windows):
        calls.append(len(windows))
        if len(windows) > most:
            raise DeviceOutOfMemory("too little memory")
        return windows * 2

    return predict


@pytest.mark.parametrize(
    ("most", "calls", "halved"),
    [
        (8, [8, 8, 2], []),
        (7, [8, 4, 4, 4, 4, 2], [(8, 4)]),
        (3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2], [(8, 4), (4, 2)]),
        (1, [8, 4, 2, *[1] * 18], [(8, 4), (4, 2), (2, 1)]),
    ],
)
def test_too_little_memory_halves_the_batch_and_changes_no_result(most, calls, halved):
    volume = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 1, 8, 12, 12), np.float32))
    arguments = {"roi": (4, 4, 4), "overlap": 0.0, "batch_size": 8}
    called, told, steps = [], [], []
    found = predict_volume(
        volume,
        predict_up_to(most, called),
        **arguments,
        progress=lambda *step: steps.append(step),
        on_halved=lambda device, tried, left: told.append((str(device), tried, left)),
    )
    assert called == calls
    assert told == [("cpu", *pair) for pair in halved]
    assert steps[-1] == ("segment", 18, 18)
    assert torch.equal(found, predict_volume(volume, lambda windows: windows * 2, **arguments))


def test_a_short_last_batch_is_halved_too():
    limits = iter([8, 2, 2, 2, 2])
    told = []

    def predict(windows):
        if len(windows) > next(limits):
            raise DeviceOutOfMemory("too little memory")
        return windows

    arguments = {"roi": (4, 4, 4), "overlap": 0.0, "batch_size": 8}
    volume = torch.rand(1, 1, 4, 4, 44)
    found = predict_volume(volume, predict, **arguments, on_halved=lambda _, *pair: told.append(pair))
    assert told == [(3, 1)]
    assert torch.allclose(found, volume)


def test_too_little_memory_for_one_window_is_the_cases_error():
    with raises_reason(DeviceOutOfMemory, "out-of-memory"):
        predict_volume(torch.zeros(1, 1, 8, 8, 8), predict_up_to(0, []), roi=(4, 4, 4), batch_size=4)


@pytest.mark.parametrize(("fewest", "called"), [(8, [8]), (4, [8, 4]), (3, [8, 4, 3]), (1, [8, 4, 2, 1])])
def test_a_smaller_batch_is_not_tried_where_it_would_be_filled_up(fewest, called):
    """A plan of one fixed batch needs the same memory for fewer windows."""
    tried = []
    worker = Worker(predict_up_to(0, tried), torch.device("cpu"), fewest)
    with raises_reason(DeviceOutOfMemory, "out-of-memory"):
        predict_volume(torch.rand(1, 1, 8, 12, 12), [worker], roi=(4, 4, 4), overlap=0.0, batch_size=8)
    assert tried == called


def test_no_graph_is_kept():
    network = torch.nn.Conv3d(1, 2, 1)
    assert not predict_volume(torch.zeros(1, 1, 8, 8, 8), network, roi=(4, 4, 4)).requires_grad


def in_one_part(size, roi):
    """A mask of a part of the volume, and which of the windows touch it, by brute force."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[tuple(slice(n // 3, n // 3 + max(n // 4, 1)) for n in size)] = True

    def is_wanted(start):
        box = (slice(max(n, 0), max(n + length, 0)) for n, length in zip(start, roi, strict=True))
        return bool(mask[tuple(box)].any())

    return mask, is_wanted


@settings(max_examples=100, deadline=None)
@given(
    size=sizes,
    roi=windows,
    overlap=overlaps,
    blend=st.sampled_from(["constant", "gaussian"]),
    batch_size=st.integers(1, 5),
)
@example(size=(1, 1, 4), roi=(5, 4, 2), overlap=0.25, blend="constant", batch_size=3)  # BLAS rounds these otherwise
@example(size=(1, 1, 4), roi=(5, 4, 2), overlap=0.25, blend="gaussian", batch_size=3)
def test_where_all_windows_are_wanted_leaving_others_out_changes_nothing(size, roi, overlap, blend, batch_size):
    volume = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, *size), dtype=np.float32))
    arguments = {"roi": roi, "overlap": overlap, "blend": blend, "batch_size": batch_size}
    mask, is_wanted = in_one_part(size, roi)

    def in_mask(predict, **others):
        return predict_volume(volume, predict, **arguments, **others)[:, :, mask]

    elementwise, network = ElementwiseNetwork(2, 2), NetworkRoundedByBatch(2, 2)
    assert torch.equal(in_mask(elementwise, is_wanted=is_wanted), in_mask(elementwise)), "blending adds no difference"
    # The batches hold other windows then, and a matrix product may round a window otherwise in another batch.
    expected = in_mask(network)
    assert_same_but_for_rounding(in_mask(network, is_wanted=is_wanted), expected)
    workers = [Worker(network, volume.device) for _ in range(3)]  # slabs are added in another order
    assert_same_but_for_rounding(in_mask(workers, is_wanted=is_wanted), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_windows_of_one_value_are_computed_once_for_each_value_and_device(count):
    volume = torch.full((1, 2, 4, 4, 24), -1.0)
    volume[..., 8:16] = 7
    volume[0, 1, 0, 0, 20] = 2  # one window of the last four values is no longer constant
    computed, steps = [], []

    def predict(windows):
        computed.extend(windows[:, 0, 0, 0, 0].tolist())
        return windows.clone()

    workers = [Worker(predict, torch.device("cpu")) for _ in range(count)]
    found = predict_volume(
        volume, workers, roi=(4, 4, 4), overlap=0, batch_size=2, progress=lambda *step: steps.append(step)
    )
    assert torch.allclose(found, volume)
    assert sorted(computed) == ([-1, -1, 7] if count == 1 else [-1, -1, -1, 7, 7])
    assert steps[-1] == ("segment", 6, 6)


def test_a_window_that_holds_no_number_is_no_constant():
    volume = torch.full((1, 1, 4, 4, 8), torch.nan)
    computed = []

    def predict(windows):
        computed.append(len(windows))
        return windows

    predict_volume(volume, predict, roi=(4, 4, 4), overlap=0)
    assert sum(computed) == 2


@pytest.mark.parametrize("count", [1, 2, 5])
def test_only_wanted_windows_are_computed_and_counted(count):
    asked, computed, steps = [], [], []

    def is_wanted(start):
        asked.append(start)
        return start[2] > 0

    def predict(windows):
        computed.append(len(windows))
        return windows + 7

    found = predict_volume(
        torch.rand(1, 1, 8, 6, 12) * 1e-6,
        [Worker(predict, torch.device("cpu")) for _ in range(count)],
        roi=(4, 8, 4),
        overlap=0,
        batch_size=3,
        is_wanted=is_wanted,
        progress=lambda *step: steps.append(step),
    )
    assert asked == [(d, -1, w) for d in (0, 4) for w in (0, 4, 8)], "before the first voxel, where it was padded"
    assert sum(computed) == 4
    assert (steps[0], steps[-1]) == (("segment", 0, 4), ("segment", 4, 4))
    assert (found[..., :4] == 0).all()
    assert torch.allclose(found[..., 4:], torch.tensor(7.0))


def test_too_little_memory_halves_the_batch_of_wanted_windows_too():
    volume = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 1, 8, 12, 12), np.float32))
    arguments = {"roi": (4, 4, 4), "overlap": 0.5, "batch_size": 8, "is_wanted": lambda start: start[1] > 3}
    called = []
    found = predict_volume(volume, predict_up_to(3, called), **arguments)
    assert called[:3] == [8, 4, 2]
    assert torch.equal(found, predict_volume(volume, lambda windows: windows * 2, **arguments))


def test_a_volume_of_which_no_window_is_wanted_is_a_programming_mistake():
    with pytest.raises(ValueError, match="no window is wanted"):
        predict_volume(torch.zeros(1, 1, 8, 8, 8), lambda w: w, roi=(4, 4, 4), is_wanted=lambda _: False)
