"""Which GPUs kernels are made for, and that what networks need can be made for each of them."""

from __future__ import annotations

import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from ctflow.core.model import NetworkSpec
from ctflow.kernels.machine_code.forms import (
    CONSTANT,
    HOPPER,
    TARGETS,
    CudaForm,
    KernelTarget,
    TritonForm,
    kernel_target,
)
from ctflow.kernels.machine_code.launch import KernelList
from ctflow.kernels.operations import HopperOperations
from ctflow.networks.build import network_from_spec
from ctflow.networks.channels_last.choice import channels_last_network

PORTABLE = [KernelTarget(each.capability) for each in TARGETS]
SWIN = ("SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 48})
UNET = ("dynamic_network_architectures.architectures.unet.PlainConvUNet", {
    "input_channels": 1, "num_classes": 14, "n_stages": 4, "features_per_stage": [32, 64, 128, 256],
    "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[3] * 3] * 4, "strides": [[1] * 3, *[[2] * 3] * 3],
    "conv_bias": True, "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True}, "n_conv_per_stage": [2] * 4, "n_conv_per_stage_decoder": [2] * 3,
})  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), None), ((8, 0), (8, 0)), ((8, 6), (8, 6)), ((8, 7), (8, 6)), ((8, 9), (8, 9)), ((9, 0), (9, 0)),
     ((10, 3), (10, 0)), ((11, 0), None), ((12, 0), (12, 0)), ((12, 1), (12, 0))],
)  # fmt: skip
def test_a_gpu_runs_the_code_of_the_nearest_target_before_it(capability, expected):
    found = kernel_target(capability)
    assert (found and found.capability) == expected


def test_hopper_alone_has_kernels_of_its_own():
    assert [each for each in TARGETS if not each.portable] == [HOPPER]
    assert HOPPER.name == "compute capability 9.0"
    assert len({each.name for each in (*TARGETS, *PORTABLE)}) == len(TARGETS) + 1


def forms_of(target: KernelTarget, dtype: torch.dtype = torch.float16) -> list[CudaForm | TritonForm]:
    """What two networks need, each with one and with several windows."""
    kernels = KernelList(target)
    with torch.no_grad():
        for (name, arguments), roi in ((SWIN, (96, 96, 96)), (UNET, (128, 128, 128))):
            network = network_from_spec(NetworkSpec(name, arguments)).eval()
            dry = channels_last_network(network, roi, HopperOperations(dtype, "meta", kernels))
            for batch in (1, 4):
                dry(torch.empty((batch, 1, *roi), device="meta"))
    return list(kernels.forms.values())


def size_of(form: CudaForm | TritonForm) -> tuple[int, int]:
    if isinstance(form, CudaForm):
        return form.shared, sum(map(int, re.findall(r"^#define \w+ (\d+)$", form.source, re.MULTILINE)))
    return math.prod(value for kind, value in form.parameters if kind == CONSTANT and value > 1), 0


def largest(forms: list[CudaForm | TritonForm], target: KernelTarget) -> list[CudaForm | TritonForm]:
    """The largest form of each function; for targets beside 8.0 and 12.0 of three: Triton treats them alike."""
    found = {form.name: form for form in sorted(forms, key=size_of)}
    if target.capability not in ((8, 0), (12, 0)):
        found = {name: found[name] for name in ("convolve", "attend_windows", "add_pointwise")}
    return list(found.values())


def everything(forms: list[CudaForm | TritonForm], target: KernelTarget) -> list[CudaForm | TritonForm]:
    """Every form for 8.0; for each target it takes six minutes, and they have passed (2026-11-30)."""
    return forms if target.capability == (8, 0) else largest(forms, target)


def compiled(tmp_path, wanted) -> list[list]:
    """Compile (target, forms) in another process, where Triton compiles: here its interpreter may be chosen."""
    (tmp_path / "wanted").write_bytes(pickle.dumps(wanted))
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
            import json, pickle, sys
            from ctflow.core.processes import usable_cpus
            from ctflow.kernels.machine_code.compiler import compile_forms

            with open(sys.argv[1], "rb") as file:
                wanted = pickle.load(file)
            for target, forms in wanted:
                for cubin in compile_forms(forms, target, usable_cpus()).values():
                    assert cubin.code.startswith(b"\\x7fELF"), cubin.name
                    print(json.dumps([target.name, cubin.name, cubin.shared, target.shared]))
        """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "wanted"],
        env=environment, capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton has wheels for Linux on x86-64 only"
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chosen", [largest, pytest.param(everything, marks=pytest.mark.exhaustive)])
def test_what_networks_need_compiles_for_every_target_and_fits_it(tmp_path, chosen):
    forms = {target: forms_of(target) for target in PORTABLE}
    # Attention alone depends on how much a block's shared memory holds.
    assert len({frozenset(form.key for form in each if form.name != "attend_windows") for each in forms.values()}) == 1
    wanted = [(target, chosen(forms[target], target)) for target in PORTABLE]
    found = compiled(tmp_path, wanted)
    assert len(found) == sum(len(forms) for _, forms in wanted)
    assert {name for name, *_ in found} == {target.name for target in PORTABLE}
    assert {name for _, name, *_ in found} >= {"convolve", "attend_windows", "compute_tokens", "upsample"}
    for row in found:
        assert row[2] <= row[3], row


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton has wheels for Linux on x86-64 only"
)
@pytest.mark.timeout(600)
def test_products_in_float32_fit_the_gpus_with_the_least_shared_memory(tmp_path):
    target = min(PORTABLE, key=lambda each: each.shared)
    products = {"sum_pointwise", "add_pointwise", "upsample"}
    found = {form.name: form for form in sorted(forms_of(target, torch.float32), key=size_of) if form.name in products}
    assert found.keys() == products
    for row in compiled(tmp_path, [(target, list(found.values()))]):
        assert row[2] <= row[3], row
