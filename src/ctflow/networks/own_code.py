"""A network of a bundle's own code, which is imported from the bundle's folder only, and only if that was allowed."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from importlib.machinery import PathFinder, all_suffixes
from importlib.util import module_from_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from torch import nn

from ctflow.core.errors import BundleInvalid, first_line
from ctflow.core.model import OwnCode

_MOST_FILES = 2_000
_IMPORTABLE = tuple(all_suffixes())  # .py, .pyc, .so and the like
_NEEDED = frozenset({"ctflow", "monai", "numpy", "torch"})
TORCHSCRIPT = "TorchScript"


def code_of_folder(folder: Path, more: tuple[str, ...] = ()) -> OwnCode:
    """A bundle's files that Python can import, with the digest of their names and content.

    Args:
        folder: The bundle.
        more: Other files whose content is executed, as paths inside it.

    Raises:
        BundleInvalid: They cannot be read, or there are too many.
    """
    try:
        files = sorted(path for path in folder.rglob("*") if path.name.endswith(_IMPORTABLE) and path.is_file())
        files = [path for path in files if "__pycache__" not in path.parts]  # which is not read
        leading_out = [path for path in folder.rglob("*") if path.is_symlink() and not _is_inside(path, folder)]
        if leading_out:
            raise BundleInvalid(f"{leading_out[0].name} is a link that leads out of the bundle", reason="own-code")
        if len(files) > _MOST_FILES:
            raise BundleInvalid(f"the bundle has more than {_MOST_FILES} files of code", reason="own-code")
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
    with only_from(folder, {top}):
        try:
            module = _imported(module_name, folder)
        except BundleInvalid:
            raise
        except Exception as error:
            raise BundleInvalid(
                f"the bundle's {module_name} cannot be imported: {type(error).__name__}: {first_line(error)}",
                reason="own-code",
            ) from error
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise BundleInvalid(f"{module_name} has no network {name[:80]!r}", reason="own-code")
    network: type[nn.Module] = found
    return network


def _imported(module_name: str, folder: Path) -> ModuleType:
    """Import a module and the packages around it, each found in the folder before anything of it is executed."""
    search: Sequence[str] = [str(folder)]
    name, parent = "", None
    for part in module_name.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, search)
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        if spec is None or not places or not all(_is_inside(Path(place), folder) for place in places):
            raise BundleInvalid(f"{name} is not of the bundle's folder", reason="own-code")
        module = module_from_spec(spec)
        sys.modules[name] = module
        if spec.loader is not None:
            spec.loader.exec_module(module)
        if parent is not None:
            setattr(parent, part, module)
        parent, search = module, list(spec.submodule_search_locations or ())
    return sys.modules[module_name]


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def packages_of(folder: Path) -> set[str]:
    """The names under which Python finds a bundle's files, without those of packages that everything needs."""
    names = {path.name.split(".")[0] for path in folder.iterdir() if path.is_dir() or path.name.endswith(_IMPORTABLE)}
    return names - sys.stdlib_module_names - _NEEDED


@contextmanager
def only_from(folder: Path, tops: Set[str]) -> Iterator[None]:
    """The bundle's packages in place of any of these names.

    All modules that come from the folder are forgotten, so that another bundle finds its own; their classes keep them.
    """
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}
    for name in before:
        del sys.modules[name]
    known, prefix = set(sys.modules), sys.pycache_prefix
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    with TemporaryDirectory() as empty:
        sys.pycache_prefix = empty  # byte code in the folder is not of the digest
        try:
            yield
        finally:
            sys.pycache_prefix = prefix
            sys.path.remove(str(folder))
            for name in set(sys.modules) - known:
                if _comes_from(sys.modules[name], folder):
                    del sys.modules[name]
            sys.modules.update(before)


def _comes_from(module: ModuleType, folder: Path) -> bool:
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    return any(isinstance(place, str) and _is_inside(Path(place), folder) for place in places)


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
