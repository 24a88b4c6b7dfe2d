"""What is compiled, the file that keeps it, and the compilers themselves, which need no GPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from ctflow.core.errors import BackendUnavailable, EngineMismatch
from ctflow.kernels.machine_code import compiler
from ctflow.kernels.machine_code.compiler import compile_forms
from ctflow.kernels.machine_code.cubins import read_cubins, write_cubins
from ctflow.kernels.machine_code.forms import CONSTANT, HOPPER, Cubin, CudaForm, TritonForm, triton_form
from ctflow.kernels.machine_code.launch import KernelList
from reasons import raises_reason

HALF = torch.empty(64, dtype=torch.float16)
SUMS = torch.empty(64)


def form_of(voxels=4096, channels=48, per=64, x=HALF, **settings) -> TritonForm:
    options = {"warps": 8, "stages": 3, **settings}
    return triton_form("sum_channels", (x, SUMS, voxels, channels, per, 64, 64), **options)[0]


def test_a_form_is_specialised_as_triton_does_it():
    form, passed = triton_form("sum_channels", (HALF, SUMS, 4097, 48, 1, 64, 64), 8, 3)
    types = (("*fp16", 1), ("*fp32", 1), ("i32", 0), ("i32", 1), (CONSTANT, 1), (CONSTANT, 64), (CONSTANT, 64))
    assert form == TritonForm("sum_channels", types, 8, 3)
    assert passed[0] is HALF
    assert passed[2:] == [4097, 48]  # one is a constant like those of the signature


def test_what_changes_the_machine_code_changes_the_key():
    forms = [
        form_of(), form_of(channels=40), form_of(per=1), form_of(voxels=1 << 32), form_of(x=HALF[1:]), form_of(x=SUMS),
        form_of(x=HALF.bfloat16()), form_of(warps=4), form_of(stages=2),
    ]  # fmt: skip
    assert len({form.key for form in forms}) == len(forms)
    assert form_of(voxels=8192).key == form_of().key  # which is passed
    sources = [
        CudaForm("a", "f", 32, 0),
        CudaForm("b", "f", 32, 0),
        CudaForm("a", "g", 32, 0),
        CudaForm("a", "f", 64, 0),
    ]
    assert len({form.key for form in sources}) == 4


def test_a_number_of_arguments_that_the_kernel_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        triton_form("sum_channels", (HALF, SUMS), 8, 3)
    with pytest.raises(ValueError, match="no_kernel"):
        triton_form("no_kernel", (), 8, 3)
    with pytest.raises(ValueError, match="null"):
        triton_form("sum_channels", (HALF, None, 1, 1, 1, 64, 64), 8, 3)


def test_a_list_launches_nothing():
    kernels = KernelList()
    for voxels in (16, 32, 33):
        kernels.triton("sum_channels", (1,), HALF, SUMS, voxels, 48, 64, 64, 64, warps=8)
    kernels.cuda(CudaForm("a", "f", 32, 0), 1, HALF)
    assert [form.name for form in kernels.forms.values()] == ["sum_channels", "sum_channels", "f"]


def cubin_of(code: bytes) -> Cubin:
    return Cubin(code, "f", 128, 1024, 2, "triton 3.6.0")


def test_a_file_of_kernels_is_the_same_each_time_and_comes_back(tmp_path):
    cubins = {"b" * 64: cubin_of(b"\x7fELF" * 100), "a" * 64: cubin_of(b"")}
    write_cubins(cubins, tmp_path / "one")
    write_cubins(dict(reversed(cubins.items())), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_cubins(tmp_path / "one") == cubins


@pytest.mark.parametrize("damage", [b"", b"PK\x05\x06" + b"\0" * 18, None])
def test_a_file_that_is_none_is_named(tmp_path, damage):
    path = tmp_path / "cubins-1" / "engine.cubins"
    path.parent.mkdir()
    write_cubins({"a" * 64: cubin_of(b"code" * 50)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"\xff" * 20 + whole[60:] if damage is None else damage)
    with raises_reason(EngineMismatch, "stored-engine", names="cubins-1"):
        read_cubins(path)


@pytest.mark.parametrize(
    ("form", "module", "package"),
    [(form_of(), "triton", "triton"), (CudaForm("", "f", 32, 0), "cuda.bindings", "cuda-bindings")],
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, form, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with raises_reason(BackendUnavailable, "not-installed", names=(f"pip install {package}", "ctflow export")):
        compile_forms([form], HOPPER, 1)


@pytest.mark.parametrize("error", [BrokenProcessPool("ended"), OSError(11, "no process")])
def test_where_processes_end_or_cannot_start_one_compiles_all(monkeypatch, caplog, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(compiler, "_compiled_in_processes", fails)
    monkeypatch.setattr(compiler, "compile_form", lambda form, target: form.name)
    forms = [CudaForm(str(number), f"f{number}", 32, 0) for number in range(8)]
    assert sorted(compile_forms(forms, HOPPER, 2).values()) == [form.name for form in forms]
    assert "in one process" in caplog.text


def test_a_driver_without_memory_is_no_broken_driver():
    status = type("Status", (int,), {"name": "CUDA_ERROR_OUT_OF_MEMORY"})(2)
    with raises_reason(compiler.DeviceOutOfMemory, "out-of-memory"):
        compiler.checked((status,), "loading")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton has wheels for Linux on x86-64 only"
)
def test_kernels_compile_without_a_gpu_a_c_compiler_or_a_cache(tmp_path):
    """In processes of their own, which see no program and may write in the folder for temporary files alone."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import torch
            from ctflow.kernels.machine_code.compiler import compile_forms
            from ctflow.kernels.machine_code.forms import HOPPER
            from ctflow.kernels.machine_code.launch import KernelList

            kernels = KernelList()
            x, sums = torch.empty(64, dtype=torch.float16), torch.empty(64)
            for rows in (16, 32, 64, 128):
                for channels in (46, 47, 48):
                    kernels.triton("sum_channels", (1,), x, sums, 4096, channels, 128, 64, rows, warps=8)
            # Without a guard: nothing of this runs in the others.
            made = compile_forms(kernels.forms.values(), HOPPER, 2)
            for cubin in made.values():
                assert cubin.code.startswith(b"\\x7fELF"), cubin
                assert (cubin.name, cubin.threads, cubin.nulls) == ("sum_channels", 256, 2), cubin
                assert cubin.compiler.startswith("triton "), cubin
            print(len(made))
        """)
    )
    (tmp_path / "file").touch()
    environment = {
        **os.environ, "PATH": str(tmp_path), "CC": "", "HOME": str(tmp_path / "file"),
        "TRITON_CACHE_DIR": str(tmp_path / "file" / "cache"),
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "8\n"  # 46 and 47 channels, no multiples of 16, take the same kernel
