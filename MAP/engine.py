"""In the image: the file that its engine runs on a CPU, compared with PyTorch, copied where ctflow looks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ctflow.bundle import find_bundle, read_bundle
from ctflow.core.errors import CtflowError
from ctflow.engines.onnxfile import onnx_key
from ctflow.engines.openvino import FILE
from ctflow.engines.registry import backend_module, batch_range_for
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import EngineStore
from ctflow.export.measure import measure_engine


def main() -> int:
    """Make the file of the engine named first, in the folder named second, unless it is there; copy it to the third.

    `auto` and the engines for GPUs leave CPUs to OpenVINO, or to PyTorch where it does not run the model.
    """
    name, kept, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    model = read_bundle(find_bundle(Path(os.environ["HOLOSCAN_MODEL_PATH"])))
    backend = name if name != "auto" and backend_module(name).FILE in (None, FILE) else "openvino"
    if backend_module(backend).FILE is None:
        return 0
    store, key = EngineStore(kept), onnx_key(model, model.spec.roi)
    if store.find(key) is None:
        request = EngineRequest(backend, "cpu", None, model.spec.roi, batch_range_for(model.spec, "cpu"), kept)
        try:
            measured = measure_engine(request, model)
        except CtflowError as error:
            if backend == name:
                raise
            sys.stderr.write(f"no engine file for CPUs, so PyTorch computes there: {error}\n")
            return 0
        sys.stdout.write(f"made and compared with PyTorch: {measured}\n")
    shutil.copytree(store.path_of(key).parent, target / key.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
