"""MONAI is imported without packages that its networks do not need: on a full machine, 9 seconds become 1.

Read for MONAI 1.6.1: `monai/__init__.py` calls `monai.utils.module.load_submodules`, which uses
`pkgutil.walk_packages`, and finds optional packages with `optional_import`. No issue is known.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from ctflow.core.user import named_user

# Packages that MONAI imports if installed, for training, files, pictures, and networks that do not segment volumes
# (TorchVisionFCModel, FCN, MILModel, Transchex).
_OPTIONAL = frozenset({
    "clearml", "cupy", "cupyx", "cv2", "huggingface_hub", "ignite", "itk", "lpips", "matplotlib", "mlflow",
    "nibabel", "nni", "nrrd", "onnx", "onnxruntime", "openslide", "optuna", "pandas", "polygraphy", "pyamg",
    "requests", "skimage", "sklearn", "tensorboard", "tensorboardX", "tensorrt", "tifffile", "torch_tensorrt",
    "torchaudio", "torchvision", "tqdm", "transformers", "zarr",
})  # fmt: skip

_FIRST = "monai.apps"  # MONAI's packages need each other, and its own walk begins there

_importing = threading.Lock()
_lean = False


def import_lean() -> None:
    """From now on `import_monai` leaves out packages that MONAI imports only because they are installed.

    Only for ctflow's own processes: MONAI remembers that a package was missing, and other code in the process
    may want to use it with MONAI.
    """
    global _lean  # noqa: PLW0603  # a property of the process
    _lean = True


def import_all() -> None:
    """From now on `import_monai` leaves nothing out again: a bundle's own code may use any of it with MONAI."""
    global _lean  # noqa: PLW0603
    _lean = False


def import_monai() -> None:
    """Import MONAI without its subpackages, unless it is already imported; in any thread.

    `import monai` walks through its packages and runs every module, twice: five seconds, and so Holoscan where the App
    SDK is installed, which is an ImportError on a machine without the CUDA runtime. A package named later is imported
    then; for `monai.bundle`, which finds components only by name, the walk is made up for.
    """
    with _importing, _left_out(_OPTIONAL if _lean else frozenset()), named_user():
        if _FIRST in sys.modules:
            return
        _import_package(_FIRST)
        importlib.import_module(_FIRST)  # after `import_for_app_sdk` it is still to come
        if _lean:
            importlib.import_module("monai.networks.nets")
            gc.freeze()  # half a million objects of modules, all permanent: 0.3 s per full collection


def import_for_app_sdk() -> None:
    """Import of MONAI what `monai.deploy` needs: in ctflow's own processes a second less than `import_monai`.

    MONAI's packages import each other, and fail in another order than its own: there `import_monai` comes before any of
    them. Elsewhere other code may not know that.
    """
    if not _lean:
        import_monai()
        return
    with _importing, _left_out(_OPTIONAL), named_user():
        _import_package(None)


def _import_package(first: str | None) -> None:
    """Import `monai`, unless it is imported already, and in place of its walk one of its packages, or none."""
    if "monai" in sys.modules:
        return
    walk = pkgutil.walk_packages
    pkgutil.walk_packages = partial(_walk_of_one, walk, first)
    try:
        importlib.import_module("monai")
    finally:
        pkgutil.walk_packages = walk
        if "monai.utils.module" in sys.modules:  # also when the import failed and other code retries it
            sys.modules["monai.utils.module"].walk_packages = walk  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _WalkBeforeBundle())


@contextmanager
def _left_out(packages: frozenset[str]) -> Iterator[None]:
    """Meanwhile this thread does not find packages that have not been imported yet."""
    finder = _NotFound(packages)
    sys.meta_path = [finder, *sys.meta_path]  # another list: other threads may be iterating over this one
    try:
        yield
    finally:
        sys.meta_path = [each for each in sys.meta_path if each is not finder]


class _NotFound(importlib.abc.MetaPathFinder):
    """Reports some packages as not installed, to the thread that made it."""

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages, self._thread = packages, threading.get_ident()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Find nothing, and for these packages stop the search."""
        package = fullname.partition(".")[0]
        if threading.get_ident() == self._thread and package in self._packages and package not in sys.modules:
            raise ModuleNotFoundError(f"{fullname} is left out while MONAI is imported", name=fullname)


def _walk_of_one(
    walk: Callable[..., Any], first: str | None, path: Any = None, prefix: str = "", *rest: Any, **named: Any
) -> Any:
    """Instead of a walk through MONAI, only one package.

    It runs within `import monai`, as that walk does: no other thread reaches a package before.
    """
    if prefix != "monai.":
        return walk(path, prefix, *rest, **named)
    monai: Any = sys.modules["monai"]

    def package(name: str) -> ModuleType:
        if name not in vars(monai).get("__all__", ()):
            raise AttributeError(f"module 'monai' has no attribute {name!r}")
        return importlib.import_module(f"monai.{name}")

    monai.__getattr__ = package
    if first is not None:
        importlib.import_module(first)
    return iter(())


class _WalkBeforeBundle(importlib.abc.MetaPathFinder):
    """Makes up for MONAI's walk when `monai.bundle` is imported, which looks up names in the loaded modules."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Find nothing: the next finder does."""
        if fullname == "monai.bundle" and self in sys.meta_path:
            sys.meta_path = [each for each in sys.meta_path if each is not self]
            monai: Any = sys.modules["monai"]
            load = importlib.import_module("monai.utils.module").load_submodules
            load(monai, True, exclude_pattern=f"{monai.excludes}|(^(monai.deploy))")
