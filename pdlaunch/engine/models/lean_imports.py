"""Saves the imports of transformers that only training and compiling need.

Call ``import_lean_transformers`` before the first import of transformers, in processes that only
load and run models. The import and the construction of a model then take 0.75 s of CPU time instead
of 2.4 s (transformers 5.23, torch 2.13), and a rank needs 120 MiB less memory:

- Some modules use decorators of ``torch._dynamo``, which imports sympy and DTensor (0.8 s). A
  stand-in has decorators that do nothing, and loads the real module if any other name is used.
- transformers' own sharding and its use of accelerate are reported as not available (0.2 s).
- transformers reads the source of all its models, 3,000 files, twice, to collect the names of their
  classes (0.6 s). Here it collects only the auto classes; a model's classes are found at its load.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"
_DYNAMO_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"
_AVAILABILITY = "transformers.utils.import_utils"  # transformers' checks of available packages


def import_lean_transformers() -> None:
    """Make later imports of transformers lean. No effect if transformers is imported already."""
    if "transformers" in sys.modules:
        return
    if _DYNAMO not in sys.modules:
        decorators = ("allow_in_graph", "assume_constant_result", "disable")
        _stand_in(_DYNAMO, dict.fromkeys(decorators, _unchanged))
        index = "TransformGetItemToIndex"
        _stand_in(_DYNAMO_MASKS, {index: lambda: getattr(_load(_DYNAMO_MASKS), index)()})
    sys.meta_path.insert(0, _Finder())


class _StandIn(ModuleType):
    """Has a few names of a module, and loads the real module for any other name."""

    def __getattr__(self, name: str) -> Any:
        # ``inspect`` and the import system read such names of all modules.
        if name.startswith("__") and (name != "__path__" or self.__name__ != _DYNAMO):
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


def _stand_in(name: str, content: dict[str, Callable[..., Any]]) -> None:
    module = sys.modules[name] = _StandIn(name)
    module.__dict__.update(content)


def _load(name: str) -> ModuleType:
    """Remove all stand-ins and return the real module."""
    for other, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[other]
    return importlib.import_module(name)


def _unchanged(function: Any = None, *_arguments: object, **_options: object) -> Any:
    """A decorator, with or without arguments, that returns the function unchanged."""
    return (lambda decorated: decorated) if function is None else function


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _AVAILABILITY:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None:
                execute = partial(_execute_lean, spec.loader.exec_module)
                spec.loader.exec_module = execute  # type: ignore[method-assign]
            return spec
        # The real module has just replaced its stand-in, and has loaded this submodule.
        if fullname.startswith(f"{_DYNAMO}.") and fullname in sys.modules:
            return spec_from_loader(fullname, _Loaded())
        return None


class _Loaded(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass  # it has been executed already


def _execute_lean(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Load transformers' checks of available packages, and replace three of its functions."""
    execute(module)
    for name in ("is_torch_distributed_available", "is_accelerate_available"):
        if hasattr(module, name):
            setattr(module, name, lambda *_arguments, **_options: False)
    name = "create_import_structure_from_path"
    if hasattr(module, name):
        setattr(module, name, _names_of_auto_classes(getattr(module, name)))


def _names_of_auto_classes(
    collect: Callable[[Any], dict[Any, Any]],
) -> Callable[[Any], dict[Any, Any]]:
    """``collect`` returns the names by module in a folder, or in the folder of a file."""

    def collect_few(module_path: Any) -> dict[Any, Any]:
        folder = Path(module_path)
        if folder.suffix == ".py":
            folder = folder.parent
        is_of_all_models = (folder / "auto").is_dir()
        return {"auto": collect(folder / "auto")} if is_of_all_models else collect(module_path)

    return collect_few
