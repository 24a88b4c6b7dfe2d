from __future__ import annotations

import contextlib
import signal
import sys
import types
from functools import partial
from importlib.machinery import ModuleSpec

import pytest
import torch
from monai.networks.nets import UNet

from ctflow.core.errors import BackendUnavailable, BundleInvalid, DeviceOutOfMemory, EngineMismatch, ExportFailed
from ctflow.core.model import Model
from ctflow.core.progress import silent
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import EngineStore
from ctflow.engines.tensorrt import torch_program
from ctflow.export.torch_program import program_from_model
from model_support import unet_model
from reasons import raises_reason

ROI = (16, 16, 16)
ARGUMENTS = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8, 16], "strides": [2, 2]}


@pytest.fixture(scope="module")
def model() -> Model:
    return unet_model(ARGUMENTS, ROI)


def divided_network():
    """As Torch-TensorRT divides one: two parts for TensorRT, of three operations, and one for PyTorch of one."""
    parts = torch.nn.Module()
    parts.add_module("_run_on_acc_0", torch.fx.symbolic_trace(lambda x: torch.relu(torch.sin(x))))
    parts.add_module("_run_on_gpu_1", torch.fx.symbolic_trace(lambda x: torch.sort(x)[0]))
    parts.add_module("_run_on_acc_2", torch.fx.symbolic_trace(lambda x: -x))
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for name, _ in parts.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    return torch.fx.GraphModule(parts, graph)


class TensorRt:
    """Stands in for tensorrt."""

    __version__ = "10.15.1"

    class IProgressMonitor:
        pass


class Runtime(types.ModuleType):
    """Stands in for torch_tensorrt: "compiles" to the exported program itself, on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch_tensorrt")
        self.__spec__ = ModuleSpec("torch_tensorrt", None)  # MONAI and torch look for it
        self.compiled, self.saved = [], []
        self.error = None
        self.parts = divided_network()
        self.configurations = []
        self.interpreter = type("TRTInterpreter", (), {"_populate_trt_builder_config": self.configure})
        self.dynamo = types.SimpleNamespace(
            compile=self.compile,
            partitioning=types.SimpleNamespace(
                fast_partition=lambda program: (self.parts, "supported"), global_partition=None
            ),
            conversion=types.SimpleNamespace(
                _TRTInterpreter=types.SimpleNamespace(TRTInterpreter=self.interpreter),
            ),
        )

    def configure(self, *_):
        self.configurations.append(types.SimpleNamespace(progress_monitor=None))
        return self.configurations[-1]

    def compile(self, exported_program, **options):
        self.compiled.append((exported_program, options))
        if self.error is not None:
            raise self.error
        if self.parts is not None:
            self.dynamo.partitioning.fast_partition(exported_program)
            for name, _ in self.parts.named_children():
                if "_run_on_acc" in name:
                    self.build(self.interpreter._populate_trt_builder_config(self.interpreter))
        return exported_program

    def build(self, configuration):
        """As TensorRT does: phases within a phase, each with steps; a step that says False ends it."""
        monitor = configuration.progress_monitor
        if monitor is None:
            return
        monitor.phase_start("whole", None, 4)
        monitor.phase_start("inner", "whole", 2)
        for phase, step in (("inner", 0), ("whole", 1), ("inner", 1), ("whole", 4)):
            if not monitor.step_complete(phase, step):
                raise AssertionError("no engine")  # as Torch-TensorRT
        monitor.phase_finish("inner")
        monitor.phase_finish("whole")

    def save(self, module, file_path, **options):
        self.saved.append((file_path, options))
        torch.export.save(module, file_path)


@pytest.fixture
def runtime(monkeypatch):
    """A machine with Torch-TensorRT and a GPU whose memory is the CPU's."""
    made = Runtime()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", made)
    monkeypatch.setattr(torch_program, "load_runtime", lambda _: TensorRt)
    monkeypatch.setattr(torch_program, "version", lambda name: {"torch-tensorrt": "2.14.0", "monai": "1.6.1"}[name])
    monkeypatch.setattr(torch_program, "gpu_identity", lambda _: "NVIDIA H200, compute capability 9.0, driver 580.1")
    monkeypatch.setattr(torch_program, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return made


@pytest.fixture
def on_cpu(monkeypatch):
    """The engine's checks let the CPU pass as a GPU."""
    monkeypatch.setattr(torch_program, "DEVICES", ("cuda", "cpu"))


def build(model, path, precision="fp32", batch=4, roi=ROI, progress=silent):
    program_from_model(model, roi, precision=precision, batch=batch, path=path, device="cpu", progress=progress)
    return path


asked = partial(EngineRequest, "torch-tensorrt")


def opened(model, folder, precision="fp32", batch_range=(1, 4)):
    return torch_program.open_backend(asked("cpu", precision, ROI, batch_range, folder), model)


def stored(model, folder, precision="fp32", batch_range=(1, 4)):
    key = torch_program.program_key(asked("cpu", precision, ROI, batch_range), model)
    EngineStore(folder).put(key, lambda path: build(model, path, precision, batch_range[1]))
    return opened(model, folder, precision, batch_range)


def plain(model, windows):
    network = UNet(**ARGUMENTS).eval()
    network.load_state_dict(model.weights)
    with torch.inference_mode():
        return network(windows)


# -------------------------------------------------------------------------------------------------------- availability


def installed(monkeypatch, *names, version="2.14.0"):
    monkeypatch.setattr(torch_program, "find_spec", lambda name: object() if name in names else None)
    monkeypatch.setattr(torch_program, "version", lambda _: version)
    below = (True, "tensorrt") if "tensorrt" in names else (False, "pip install 'ctflow[tensorrt]'")
    monkeypatch.setattr(torch_program, "runtime_state", lambda _: below)


@pytest.mark.parametrize(
    ("names", "version", "available", "match"),
    [
        ((), "", False, "pip install 'ctflow.torch-tensorrt.'"),
        (("torch_tensorrt",), "2.14.0", False, "pip install 'ctflow.tensorrt.'"),
        (("torch_tensorrt", "tensorrt"), "2.10.1", False, "2.10.1 is older than 2.11"),
        (("torch_tensorrt", "tensorrt"), "2.11.0+cu130", True, "^torch-tensorrt 2.11.0.cu130$"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, names, version, available, match):
    installed(monkeypatch, *names, version=version)
    found, reason = torch_program.is_available()
    assert found is available
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(reason)


def test_a_package_that_does_not_load_gives_its_reason(monkeypatch, runtime):
    def broken(name):
        raise Exception("import error when try to import _TensorRTProxyModule\nmore")

    monkeypatch.setattr(torch_program.importlib, "import_module", broken)
    monkeypatch.setattr(torch_program, "load_runtime", lambda _: runtime)
    with raises_reason(BackendUnavailable, "not-loadable", names="_TensorRTProxyModule"):
        torch_program.load_torch_tensorrt()


def test_tensorrt_is_loaded_before_torch_tensorrt_replaces_it(monkeypatch, runtime):
    order = []
    monkeypatch.setattr(torch_program, "load_runtime", order.append)
    monkeypatch.setattr(torch_program.importlib, "import_module", lambda name: order.append(name) or runtime)
    assert torch_program.load_torch_tensorrt() is runtime
    assert order == ["tensorrt", "torch_tensorrt"]


def test_settings(model):
    with raises_reason(BackendUnavailable, "wrong-device", names="cpu"):
        torch_program.check_settings("cpu", "fp32")
    with raises_reason(BackendUnavailable, "wrong-precision", names=("fp32, tf32, bf16, fp16", "int8")):
        torch_program.check_settings("cuda:0", "int8")
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        torch_program.check_settings("cuda:3", precision)
    assert torch_program.precisions("cuda:0") == ("fp16",)
    assert (torch_program.FILE, torch_program.DEVICES) == ("program", ("cuda",))
    with raises_reason(BackendUnavailable, "wrong-device", names="cpu"):
        opened(model, None)


# ----------------------------------------------------------------------------------------------------------------- key


def test_the_key_holds_all_that_a_program_depends_on(model, runtime):
    key = torch_program.program_key(asked("cuda:1", "fp16", ROI, (1, 4)), model)
    assert key.kind == "program"
    assert key.version == f"torch {torch.__version__}, torch-tensorrt 2.14.0, tensorrt 10.15.1, monai 1.6.1"
    assert key.device == "NVIDIA H200, compute capability 9.0, driver 580.1, cuda:1"
    assert (key.weights_digest, key.network, key.arguments) == (model.weights_digest, "UNet", ARGUMENTS)
    assert (key.roi, key.batch_range, key.precision, key.head) == (ROI, (4, 4), "fp16", "difference")
    assert key == torch_program.program_key(asked("cuda:1", "fp16", ROI, (2, 4)), model)
    for device, precision, roi, batches in (
        ("cuda:0", "fp16", ROI, (1, 4)),
        ("cuda:1", "fp32", ROI, (1, 4)),
        ("cuda:1", "fp16", (32, 16, 16), (1, 4)),
        ("cuda:1", "fp16", ROI, (1, 2)),
    ):
        assert torch_program.program_key(asked(device, precision, roi, batches), model).name != key.name


# --------------------------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_it_is_compiled_and_saved_with_the_right_arguments(model, runtime, tmp_path, precision):
    path = build(model, tmp_path / "engine.program", precision)
    ((exported, options),) = runtime.compiled
    (windows,) = options.pop("inputs")
    assert tuple(windows.shape) == (4, 1, *ROI)
    assert windows.dtype == torch.float32
    timing = options.pop("timing_cache_path")
    assert timing.startswith(str(tmp_path))
    assert options == {
        "device": torch.device("cpu"),
        "disable_tf32": precision != "tf32",
        "require_full_compilation": False,
    }
    ((made, options),) = runtime.saved
    assert made.endswith(".pt2")
    (given,) = options.pop("inputs")
    assert given is windows
    assert options == {"output_format": "exported_program"}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    assert {weight.dtype for weight in exported.state_dict.values()} == {half}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("error", "expected", "reason", "names"),
    [
        (
            RuntimeError("no converter for aten.strange\nmore"),
            ExportFailed,
            "not-buildable",
            ("UNet", "no converter for aten.strange"),
        ),
        (AssertionError(), ExportFailed, "not-buildable", ("UNet", "AssertionError")),
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemory, "out-of-memory", ()),
    ],
)
def test_a_build_that_fails_has_a_name(model, runtime, tmp_path, error, expected, reason, names):
    runtime.error = error
    with raises_reason(expected, reason, names=names):
        build(model, tmp_path / "engine.program")
    assert not list(tmp_path.iterdir())


def test_a_window_that_the_network_cannot_take_is_the_bundles_fault(model, runtime, tmp_path):
    with raises_reason(BundleInvalid, "window-size", names="14, 16, 16"):
        build(model, tmp_path / "engine.program", roi=(14, 16, 16))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_fault_of_the_model(model, runtime, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime, "save", full)
    with pytest.raises(OSError, match="No space left"):
        build(model, tmp_path / "engine.program")
    assert not list(tmp_path.iterdir())


def test_a_build_says_what_it_takes_before_it_takes_it_and_shows_its_steps(model, runtime, tmp_path, caplog):
    told = []

    def progress(stage, done, total):
        if stage == "build engine" and not told.count(stage):
            assert "fp16, batch 4: parts that TensorRT builds: 2, with 3 operations" in caplog.text
            assert "operations left to PyTorch: 1" in caplog.text
        told.extend([stage, (done, total)])

    partition, configure = runtime.dynamo.partitioning.fast_partition, runtime.interpreter._populate_trt_builder_config
    build(model, tmp_path / "engine.program", "fp16", progress=progress)
    once = [
        ("export network", (0, 1)),
        ("export network", (1, 1)),
        ("divide network", (0, 1)),
        ("divide network", (1, 1)),
    ]
    steps = [(0, 200), (25, 200), (100, 200), (125, 200), (199, 200), (200, 200)]
    assert list(zip(told[::2], told[1::2], strict=True)) == once + [("build engine", step) for step in steps]
    assert runtime.dynamo.partitioning.fast_partition is partition
    assert runtime.interpreter._populate_trt_builder_config == configure


def test_a_network_that_tensorrt_computes_nothing_of_is_named(model, runtime, tmp_path, caplog):
    runtime.parts = None  # it has too few operations to be divided
    build(model, tmp_path / "engine.program")
    assert "TensorRT builds no part of this network" in caplog.text


def test_another_version_builds_without_progress_and_says_so(model, runtime, tmp_path, caplog):
    del runtime.interpreter._populate_trt_builder_config
    runtime.parts = None
    build(model, tmp_path / "engine.program")
    assert "shows no progress" in caplog.text
    assert "_populate_trt_builder_config" in caplog.text


@pytest.mark.parametrize("when", ["in a step", "between the parts"])
def test_ctrl_c_ends_a_build_and_leaves_nothing(model, runtime, tmp_path, monkeypatch, when):
    def press(*_):
        signal.raise_signal(signal.SIGINT)

    def progress(stage, done, total):
        if stage == "build engine" and done == 25 and when == "in a step":
            press()

    def built(self, configuration):
        if len(runtime.configurations) == 2:
            pytest.fail("it went on")
        build_part(configuration)
        if when == "between the parts":
            press()

    build_part = runtime.build
    monkeypatch.setattr(runtime, "build", types.MethodType(built, runtime))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "engine.program", progress=progress)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


# -------------------------------------------------------------------------------------------------------------- engine


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randn(4, 1, *ROI, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_those_of_the_network(model, runtime, on_cpu, tmp_path, windows, precision):
    engine = stored(model, tmp_path, precision)
    assert len(runtime.compiled) == 1
    before, expected = windows.clone(), plain(model, windows)
    for count in (4, 1, 3):
        with torch.inference_mode():
            logits = engine.predict(windows[:count])
        assert logits.shape == (count, engine.info.out_channels, *ROI)
        assert logits.dtype == torch.float32
        difference = (logits - expected[:count]).abs().max() / expected.abs().max()
        assert difference <= {"fp32": 1e-5, "bf16": 5e-2}[precision]
    assert torch.equal(windows, before)
    assert engine.info.batch_range == (1, 4)
    assert engine.info.fewest_computed == 4, "a smaller batch is filled up"
    assert engine.info.versions == {
        "torch": torch.__version__,
        "torch-tensorrt": "2.14.0",
        "tensorrt": "10.15.1",
        "driver": "580.1",
    }
    with pytest.raises(ValueError, match="takes 1 to 4 windows"):
        engine.predict(torch.zeros(5, 1, *ROI))
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.predict(windows)


def test_an_engine_without_its_program_says_how_to_make_it(model, runtime, on_cpu, tmp_path):
    for folder in (None, tmp_path):
        with raises_reason(BackendUnavailable, "not-exported", names="`ctflow export --engine torch-tensorrt`"):
            opened(model, folder)


def test_a_program_of_another_shape_is_refused(model, runtime, on_cpu, tmp_path):
    key = torch_program.program_key(asked("cpu", "fp32", ROI, (1, 4)), model)
    EngineStore(tmp_path).put(key, lambda path: build(model, path, batch=2))
    with raises_reason(EngineMismatch, "other-tensors", names=("(2, 2, 16, 16, 16)", "(4, 1")):
        opened(model, tmp_path)


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (RuntimeError("enqueue failed\nmore"), BackendUnavailable, "device-failed"),
        (torch.OutOfMemoryError("out"), DeviceOutOfMemory, "out-of-memory"),
    ],
)
def test_a_failure_while_computing_has_a_name(model, runtime, on_cpu, tmp_path, windows, error, expected, reason):
    engine = stored(model, tmp_path)

    def fail(_):
        raise error

    engine._program = fail
    with raises_reason(expected, reason):
        engine.predict(windows)


def test_a_file_that_torch_cannot_read_is_named(model, runtime, on_cpu, tmp_path, monkeypatch):
    stored(model, tmp_path).close()

    def broken(_):
        raise RuntimeError("no class __torch__.torch.classes.tensorrt.Engine\nmore")

    monkeypatch.setattr(torch.export, "load", broken)
    with raises_reason(BackendUnavailable, "not-loadable", names="no class"):
        opened(model, tmp_path)
