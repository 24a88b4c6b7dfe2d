"""In the image: the file that its engine runs on a CPU, compared with PyTorch, and the compiled kernels of `fused`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from ctflow.bundle import find_bundle, read_bundle
from ctflow.core.errors import CtflowError, NetworkNotTaken
from ctflow.core.model import Model
from ctflow.engines.fused import PRECISIONS
from ctflow.engines.onnxfile import onnx_key
from ctflow.engines.openvino import FILE
from ctflow.engines.registry import backend_module, batch_range_for
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import INSTALLED, EngineStore
from ctflow.export.measure import measure_engine
from ctflow.export.prepare import prepare_engine
from ctflow.settings.run import read_environment, settings_from_values


def main() -> int:
    """Make the files of an image of the flavour named first, whose engine is named second.

    The CPU's is kept in the folder named third between builds, and copied to the fourth.
    """
    flavour, name, kept, target = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    settings = settings_from_values({}, read_environment())  # the image's own variables
    bundle = find_bundle(Path(os.environ["HOLOSCAN_MODEL_PATH"]))
    model = read_bundle(bundle, settings.config, allow_code=settings.allow_code)
    if flavour == "cuda" and torch.version.cuda is not None and name in ("auto", "fused"):
        compile_kernels(model, required=name == "fused")
    make_cpu_file(model, name, kept, target)
    return 0


def compile_kernels(model: Model, *, required: bool) -> None:
    """Compile the kernels of `fused` into the installation, where a volume mounted as the cache does not hide them."""
    batches = batch_range_for(model.spec, "cuda")
    try:
        for precision in PRECISIONS:
            prepare_engine(EngineRequest("fused", "cuda:0", precision, model.spec.roi, batches, INSTALLED), model)
    except NetworkNotTaken as error:
        if required:
            raise
        sys.stderr.write(f"no compiled kernels: {error}\n")


def make_cpu_file(model: Model, name: str, kept: Path, target: Path) -> None:
    """The CPU engine's file; `auto` and engines for GPUs leave CPUs to OpenVINO, or to PyTorch if it does not run."""
    backend = name if name != "auto" and backend_module(name).FILE in (None, FILE) else "openvino"
    if backend_module(backend).FILE is None:
        return
    store, key = EngineStore(kept), onnx_key(model, model.spec.roi)
    if store.find(key) is None:
        request = EngineRequest(backend, "cpu", None, model.spec.roi, batch_range_for(model.spec, "cpu"), kept)
        try:
            measured = measure_engine(request, model)
        except CtflowError as error:
            if backend == name:
                raise
            sys.stderr.write(f"no engine file for CPUs, so PyTorch computes there: {error}\n")
            return
        sys.stdout.write(f"made and compared with PyTorch: {measured}\n")
    shutil.copytree(store.path_of(key).parent, target / key.name)


if __name__ == "__main__":
    sys.exit(main())
