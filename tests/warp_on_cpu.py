"""Kernels in CUDA C++ on a CPU: a C++ compiler makes them of the same text, for blocks of one warp."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from torch import Tensor

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
_KINDS = {Tensor: ctypes.c_void_p, type(None): ctypes.c_void_p, int: ctypes.c_int}


class WarpOnCpu:
    """Launches kernels as `ctflow.kernels.machine_code.launch.Kernels` does.

    Args:
        folder: For what is compiled.
    """

    multiprocessors = 2

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def cuda(self, form, blocks, *arguments):
        """Compute a launch; float16 alone."""
        source = form.source
        for name in ("halves.cuh", "instructions.cuh"):
            source = source.replace(files("ctflow.kernels").joinpath(name).read_text("utf-8"), "")
        source = source.replace('extern "C"', "")
        taken = re.search(rf"{form.name}\((.*?)\)\s*{{", source, re.DOTALL)[1]
        names = ", ".join(re.findall(r"(\w+)(?:,|$)", taken))
        text = f'#include "{Path(__file__).with_suffix(".h")}"\n{source}\n' + (
            f'extern "C" void run(int blocks, {taken}) {{ run_blocks(blocks, [=] {{ {form.name}({names}); }}); }}\n'
        )
        library = self._folder / f"{form.key}.so"
        if not library.exists():
            subprocess.run(
                ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-x", "c++", "-", "-o", library, "-lpthread"],
                input=text, text=True, check=True,
            )  # fmt: skip
        values = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        run = ctypes.CDLL(str(library)).run
        run.argtypes = [ctypes.c_int, *(_KINDS[type(each)] for each in arguments)]
        run(blocks, *values)
