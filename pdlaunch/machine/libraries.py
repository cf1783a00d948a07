"""Finds installed packages and plugins on disk; nothing is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pdlaunch.machine.facts import Libraries, NixlInstall

_NIXL_BACKENDS = ("cu12", "cu13", "rocm")
_UCX_PLUGIN = "libplugin_UCX.so"
_MOONCAKE_LIBRARIES = ("libibverbs.so.1",)
_ASSIGNMENT = r"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"\n]*)['\"]"


def find_libraries(environ: Mapping[str, str] = os.environ) -> Libraries:
    """Return what this Python has."""
    torch = _folder("torch")
    version_file = _read(torch / "version.py") if torch else ""
    mooncake = _folder("mooncake")
    return Libraries(
        torch=_torch_version(version_file) if torch else None,
        torch_cuda=_assigned(version_file, "cuda"),
        transformers=_version("transformers"),
        nixl=_find_nixl(environ),
        mooncake=mooncake is not None,
        mooncake_version=_mooncake_version(mooncake) if mooncake else None,
        missing_for_mooncake=tuple(
            name for name in _MOONCAKE_LIBRARIES if mooncake and not _loads(name)
        ),
    )


def missing_modules(extras: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return by extra the first of its modules that is not found; none of them is imported."""
    missing: dict[str, str] = {}
    for extra, modules in extras.items():
        for module in modules:
            if not _is_found(module):
                missing.setdefault(extra, module)
    return missing


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _torch_version(version_file: str) -> str:
    version, hip = (_assigned(version_file, name) for name in ("__version__", "hip"))
    # Wheels say so in their version, builds from source do not.
    if version and hip and "rocm" not in version:
        version = f"{version}{'.' if '+' in version else '+'}rocm{hip}"
    return version or "unknown"


def _find_nixl(environ: Mapping[str, str]) -> NixlInstall:
    backends = {
        name: version
        for name in _NIXL_BACKENDS
        if (version := _version(f"nixl_{name}")) is not None
    }
    with_ucx = frozenset(name for name in backends if _has_ucx(f"nixl_{name}", environ))
    return NixlInstall(_version("nixl"), backends, with_ucx)


def _has_ucx(module: str, environ: Mapping[str, str]) -> bool:
    """Return whether the UCX plugin lies beside the package.

    Editable builds and wheels use different folders.
    """
    package = _folder(module)
    if package is None:
        return False
    folders = [
        package.parent / f".{module}.mesonpy.libs" / "plugins",
        package.parent / f"{module}.libs" / "nixl",
    ]
    if own := environ.get("NIXL_PLUGIN_DIR"):
        folders = [Path(own)]
    return any((folder / _UCX_PLUGIN).is_file() for folder in folders)


def _version(module: str) -> str | None:
    """Read the version from the folder of metadata; ``unknown`` when there is none."""
    folder = _folder(module)
    if folder is None:
        return None
    found = sorted(folder.parent.glob(f"{module}-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else "unknown"


def _mooncake_version(package: Path) -> str | None:
    """Return the version of whichever build is there.

    ``mooncake_transfer_engine`` may have ``_non_cuda`` or a CUDA version behind its name.
    """
    found = sorted(package.parent.glob("mooncake_transfer_engine*-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else None


def _folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _assigned(source: str, name: str) -> str | None:
    match = re.search(_ASSIGNMENT.format(name=re.escape(name)), source, re.MULTILINE)
    return match[1] if match else None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
