"""Load this checkout under one canonical name, and make a ComfyUI checkout importable in this process.

Inside ComfyUI the module name of the pack is its absolute path. Tests, benchmarks and scripts need a stable one: they
load the same folder as `tidetable`: `from tidetable.schedules import shift`, `from tidetable.tests.gaussians import …`.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tidetable"
HOST_FOLDERS = ("models", "custom_nodes", "input", "output", "temp", "user")

# torch.library keeps an operator only as long as the library object that defined it lives.
_torchvision_operators = []


def unshadow() -> None:
    """Take the checkout off `sys.path`: with it there, our `nodes` folder would hide ComfyUI's `nodes.py`."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]


def load_checkout() -> ModuleType:
    """Import this checkout as `tidetable` (once) and return the package. Needs neither torch nor ComfyUI."""
    unshadow()
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    return package


def comfyui_path() -> Path | None:
    """The ComfyUI checkout that `COMFYUI_PATH` names, or None where it is unset. FileNotFoundError for a wrong one."""
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        return None
    path = Path(value).expanduser().resolve()
    if not (path / "comfy" / "cli_args.py").is_file():
        raise FileNotFoundError(f"COMFYUI_PATH={value} has no comfy/cli_args.py: point it at the folder with main.py.")
    return path


def prepare_host(base_directory: str | os.PathLike | None = None) -> Path:
    """Make `comfy`, `nodes`, `folder_paths` … importable from COMFYUI_PATH, on the CPU where there is no CUDA.

    `base_directory`: where ComfyUI shall look for models, input, output, temp and user, not in its own folder (created
    when missing); it counts only before `folder_paths` is first imported. Returns the ComfyUI folder.
    """
    path = comfyui_path()
    if path is None:
        raise RuntimeError("COMFYUI_PATH is not set: run this through `python3 dev.py exec` or `python3 dev.py test`.")
    unshadow()
    sys.path[:] = [str(path), *(entry for entry in sys.path if entry != str(path))]

    import torch
    from comfy.cli_args import args

    if not torch.cuda.is_available():
        args.cpu = True
    if base_directory is not None:
        args.base_directory = str(base_directory)
        for name in HOST_FOLDERS:
            Path(base_directory, name).mkdir(parents=True, exist_ok=True)
    tolerate_torchvision()
    # As main.py does, before ComfyUI's nodes.py puts its comfy/ folder, which has a utils.py, first on the path.
    importlib.import_module("utils")
    return path


def tolerate_torchvision() -> None:
    """From now on let `import torchvision` succeed where its compiled operators are missing.

    A CPU build of torch cannot load the operators of a CUDA build of torchvision, and torchvision refuses to import
    without `nms`. ComfyUI uses only its transforms, so declaring the operators by name is enough. Nothing happens (and
    torch is not imported) until somebody imports torchvision.
    """
    if "torchvision" not in sys.modules and not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Finds torchvision as usual, once, and makes its import try again after declaring the missing operators."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_or_declare(module: ModuleType) -> None:
                try:
                    exec_module(module)
                except RuntimeError as error:
                    if "torchvision::" not in str(error):
                        raise
                    _declare_torchvision_operators()
                    exec_module(module)

            spec.loader.exec_module = exec_or_declare
        return spec


def _declare_torchvision_operators() -> None:
    import torch

    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_operators.append(library)
