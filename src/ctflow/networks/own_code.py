"""A network of a bundle's own code, which is imported from the bundle's folder only, and only if that was allowed."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ctflow.core.errors import BundleInvalid, first_line
from ctflow.core.model import OwnCode

_MOST_FILES = 2_000
TORCHSCRIPT = "TorchScript"


def code_of_folder(folder: Path, more: tuple[str, ...] = ()) -> OwnCode:
    """A bundle's Python files, with the digest of their names and content.

    Args:
        folder: The bundle.
        more: Other files whose content is executed, as paths inside it.

    Raises:
        BundleInvalid: They cannot be read, or there are too many.
    """
    try:
        files = sorted(path for path in folder.rglob("*.py") if path.is_file())
        if len(files) > _MOST_FILES:
            raise BundleInvalid(f"the bundle has more than {_MOST_FILES} Python files", reason="own-code")
        digest = hashlib.sha256()
        for path in (*files, *(folder / name for name in more)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError as error:
        raise BundleInvalid(f"the bundle's code cannot be read: {error.strerror}", reason="own-code") from None
    return OwnCode(str(folder.resolve()), digest.hexdigest())


def own_class(path: str, code: OwnCode) -> type[nn.Module]:
    """The class of a bundle's own code.

    Args:
        path: Its dotted path, such as "scripts.networks.unest.UNesT".
        code: The bundle's code.

    Raises:
        BundleInvalid: The module is not in the bundle's folder, cannot be imported, or has no such network.
    """
    module_name, _, name = path.rpartition(".")
    folder = Path(code.folder)
    top = module_name.split(".")[0]
    if not all(part.isidentifier() for part in path.split(".")) or not (
        (folder / top).is_dir() or (folder / f"{top}.py").is_file()
    ):
        raise BundleInvalid(
            f"network_def#_target_ is {path[:80]!r}, which the bundle's folder lacks", reason="own-code"
        )
    with _only_from(folder, top):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise BundleInvalid(
                f"the bundle's {module_name} cannot be imported: {type(error).__name__}: {first_line(error)}",
                reason="own-code",
            ) from error
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(folder):
        raise BundleInvalid(f"{module_name} is not of the bundle's folder", reason="own-code")
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise BundleInvalid(f"{module_name} has no network {name[:80]!r}", reason="own-code")
    network: type[nn.Module] = found
    return network


@contextmanager
def _only_from(folder: Path, top: str) -> Iterator[None]:
    """The bundle's package in place of any of that name; its modules are forgotten, its classes keep them."""
    before = {name: module for name, module in sys.modules.items() if name == top or name.startswith(f"{top}.")}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
            del sys.modules[name]
        sys.modules.update(before)


def scripted_network(path: Path) -> nn.Module:
    """A TorchScript file as a network.

    Raises:
        BundleInvalid: It cannot be loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such
            network: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError, ValueError) as error:
        raise BundleInvalid(f"{path.name} cannot be loaded: {first_line(error)}", reason="torchscript") from None
    return network.eval()
