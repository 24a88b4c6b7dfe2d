"""Logits in blocks are those of the whole volume, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctflow.core.errors import DeviceOutOfMemory
from ctflow.core.model import WindowPadding
from ctflow.window.devices import Worker
from ctflow.window.mirror import mirrored
from ctflow.window.predict import predict_blocks, predict_volume

CPU = torch.device("cpu")
sizes = st.tuples(*[st.integers(1, 23)] * 3)
windows = st.tuples(*[st.integers(1, 9)] * 3)
overlaps = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.floats(0, 0.95), st.just((0.6, 0.0, 0.3)))


def network(channels):
    """Depends on the place inside the window, and not on the batch; returns the same memory at every call."""
    memory = {}

    def predict(windows):
        place = torch.linspace(-1, 1, windows[0, 0].numel()).reshape(windows.shape[2:])
        key = windows.shape
        if key not in memory:
            memory[key] = torch.empty(len(windows), channels, *windows.shape[2:])
        for channel in range(channels):
            memory[key][:, channel] = windows[:, 0] * (channel + 1 + place) + place * channel
        return memory[key]

    return predict


def volume_of(size, seed):
    """Noise, with constant regions that hold whole windows."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand((1, 1, *size), generator=generator)
    for value, axis in ((-1.0, seed % 3), (0.5, (seed + 1) % 3)):
        volume.narrow(2 + axis, size[axis] // 3, (size[axis] + 1) // 2).fill_(value)
    return volume


def in_blocks(volume, predict, axis, **arguments):
    """All blocks; each is copied at once, as its memory is used again."""
    rows, blocks = [], []
    for place, logits in predict_blocks(volume, predict, axis=axis, **arguments):
        rows += range(place.start, place.stop)
        blocks.append(logits.clone())
    assert rows == list(range(volume.shape[2 + axis]))
    return torch.cat(blocks, dim=2 + axis)


@settings(max_examples=120, deadline=None)
@given(
    size=sizes,
    roi=windows,
    overlap=overlaps,
    blend=st.sampled_from(["constant", "gaussian", "nnunet"]),
    placement=st.sampled_from(["dense", "even"]),
    channels=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    mirror=st.sampled_from([(), (0,), (1, 2), (0, 1, 2)]),
    seed=st.integers(0, 99),
    leave_out=st.integers(0, 3),
)
def test_blocks_along_the_first_axis_have_the_bits_of_the_whole(
    size, roi, overlap, blend, placement, channels, batch_size, mirror, seed, leave_out
):
    arguments = {
        "roi": roi, "overlap": overlap, "blend": blend, "placement": placement, "batch_size": batch_size,
        "padding": WindowPadding("constant", -1.0),
    }  # fmt: skip
    volume, predict = volume_of(size, seed), mirrored(network(channels), mirror)
    called = []

    def is_wanted(start):
        called.append(start)
        return leave_out == 0 or sum(start) % (leave_out + 1) == 0 or len(called) == 1

    whole = predict_volume(volume, predict, is_wanted=is_wanted, **arguments)
    order = list(called)
    called.clear()
    assert torch.equal(in_blocks(volume, predict, 0, is_wanted=is_wanted, **arguments), whole)
    assert called == order


@settings(max_examples=60, deadline=None)
@given(
    size=sizes,
    roi=windows,
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    axis=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_blocks_along_another_axis_differ_by_rounding_only(size, roi, overlap, axis, seed):
    """The order in which overlapping windows are added follows the axis."""
    volume, predict = volume_of(size, seed), network(3)
    found = in_blocks(volume, predict, axis, roi=roi, overlap=overlap)
    torch.testing.assert_close(found, predict_volume(volume, predict, roi=roi, overlap=overlap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("axis", [0, 2])
def test_several_devices_give_the_same_logits(count, axis):
    volume = volume_of((20, 11, 17), 4)
    arguments = {"roi": (6, 5, 4), "overlap": 0.4, "batch_size": 2}
    told = []
    found = in_blocks(
        volume, [Worker(network(3), CPU) for _ in range(count)], axis,
        progress=lambda *step: told.append(step), **arguments,
    )  # fmt: skip
    whole = predict_volume(volume, network(3), **arguments)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2]


def test_the_sum_has_no_more_rows_than_a_window(monkeypatch):
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **given: made.append(shape) or zeros(*shape, **given))
    in_blocks(torch.rand(1, 1, 40, 9, 9), network(7), 0, roi=(8, 8, 8), overlap=0.5)
    assert made == [((1, 7, 8, 9, 9),)]


def test_too_little_memory_halves_the_batch_once():
    told = []

    def predict(windows):
        if len(windows) > 1:
            raise DeviceOutOfMemory("no")
        return network(2)(windows)

    volume = torch.rand(1, 1, 12, 12, 6)
    arguments = {"roi": (4, 4, 4), "overlap": 0.0}
    found = in_blocks(volume, predict, 0, batch_size=2, on_halved=lambda _, *pair: told.append(pair), **arguments)
    assert torch.equal(found, predict_volume(volume, network(2), **arguments))
    assert told == [(2, 1)]


def test_no_window_wanted_is_refused():
    with pytest.raises(ValueError, match="no window is wanted"):
        next(predict_blocks(torch.zeros(1, 1, 8, 8, 8), network(1), axis=0, roi=(4, 4, 4), is_wanted=lambda _: False))
