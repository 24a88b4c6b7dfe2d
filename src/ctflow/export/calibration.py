"""Measures how large a network's activations are, for an engine that computes in eight bits."""

from __future__ import annotations

import logging

import torch

from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Model
from ctflow.engines.fused import eight_bit_network
from ctflow.engines.hardware import memory_for, switches
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.calibration import Calibration
from ctflow.export.examples import example_windows
from ctflow.kernels.convolution_fp8 import is_in_eight_bits
from ctflow.networks.channels_last.choice import channels_last_network
from ctflow.networks.eight_bits import RecordingOperations

log = logging.getLogger(__name__)


def calibration_from_phantom(request: EngineRequest, model: Model) -> Calibration:
    """The largest inputs of the convolutions in e4m3, on windows of a synthetic chest in strict fp32.

    Args:
        request: For what; without a GPU the CPU computes, which takes a minute.
        model: The model.

    Raises:
        NetworkNotTaken: It has no such convolution.
        BundleInvalid: The network's values are not finite.
        DeviceOutOfMemory: There is too little memory.
    """
    network = eight_bit_network(request, model)
    device = request.device if torch.cuda.is_available() else "cpu"
    with memory_for("the calibration", device), switches("fp32"), torch.no_grad():
        operations = RecordingOperations(torch.float32, device, is_in_eight_bits(request.roi))
        run = channels_last_network(network, request.roi, operations)
        for window in example_windows(model, request.roi):
            run(window.to(device))
    largest = tuple(tuple(each or 1.0 for each in shares) for shares in operations.largest)
    if not torch.tensor([each for shares in largest for each in shares]).isfinite().all():
        text = "the network returned non-finite values on a synthetic chest: its weights do not suit fp8"
        raise BundleInvalid(text, reason="output-not-finite")
    log.info("fp8 calibration: largest inputs %s", largest)
    return Calibration(tuple(operations.channels), largest)
