"""Which ComfyUI and which Python the development commands use. Standard library only.

In this order: the ComfyUI that `COMFYUI_PATH` names, the one whose `custom_nodes` holds this folder, or one that
`devtools/install.py` builds inside the checkout (`.venv` and `.comfyui`).
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import DevError


ROOT = Path(__file__).resolve().parent.parent

_PYTHONS = ("bin/python", "Scripts/python.exe")


@dataclass(frozen=True)
class Environment:
    """A ComfyUI checkout and the Python that runs it."""

    comfyui: Path
    python: Path
    managed: bool
    """True when dev.py built both inside this checkout."""

    def variables(self) -> dict[str, str]:
        """The environment variables of a process that runs in here."""
        variables = dict(os.environ, COMFYUI_PATH=str(self.comfyui), COMFYUI_PYTHON=str(self.python))
        if self.managed:
            for name in ("PYTHONPATH", "PYTHONHOME"):
                variables.pop(name, None)
            variables["PYTHONNOUSERSITE"] = "1"
        return variables

    def require(self, *modules: str) -> None:
        """Raise DevError with the pip command to run when one of `modules` is not installed here."""
        code = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
        done = subprocess.run(
            [self.python, "-c", code, *modules], capture_output=True, text=True, env=self.variables(), cwd=self.comfyui
        )
        if done.returncode:
            raise DevError(f"{self.python} does not run: {last_line(done.stderr)}")
        packages = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}
        missing = [packages.get(name, name.replace("_", "-")) for name in done.stdout.split()]
        if missing and self.managed:
            raise DevError(f".venv lacks {', '.join(missing)}: delete the folder .venv and run the same command again.")
        if missing:
            raise DevError(
                f"The Python of your ComfyUI lacks {', '.join(missing)}: run  {self.python} -m pip install "
                f"{' '.join(missing)}  or unset COMFYUI_PATH to let dev.py make its own environment."
            )


def find() -> Environment | None:
    """The ComfyUI that is there already: `COMFYUI_PATH`, or the one with this folder in its custom_nodes; or None."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        comfyui = Path(named).expanduser().absolute()
        if not is_comfyui(comfyui):
            raise DevError(
                f"COMFYUI_PATH={named} is not a ComfyUI folder (main.py and comfy/cli_args.py are missing): "
                "point it at the folder that holds main.py, or unset it."
            )
        return Environment(comfyui, python_of(comfyui), managed=False)
    for folder in (ROOT, _folder_as_typed()):
        comfyui = folder.parent.parent
        if folder.parent.name == "custom_nodes" and is_comfyui(comfyui):
            return Environment(comfyui, python_of(comfyui), managed=False)
    return None


def _folder_as_typed() -> Path:
    """This checkout as the user reached it: Python resolves a link in custom_nodes, the shell does not."""
    folder = Path(os.environ.get("PWD", "."), sys.argv[0]).absolute().parent
    return folder if folder.resolve() == ROOT else ROOT


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "cli_args.py").is_file()


def python_of(comfyui: Path) -> Path:
    """The Python that runs this ComfyUI: COMFYUI_PYTHON, its own virtual environment, or the one that runs dev.py."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        if not Path(named).is_file():
            raise DevError(f"COMFYUI_PYTHON={named} does not exist: set it to the Python that runs {comfyui}.")
        return Path(named).absolute()
    candidates = [comfyui / folder / python for folder in ("venv", ".venv") for python in _PYTHONS]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")  # the portable Windows build spells it so
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if importlib.util.find_spec("torch") is not None:
        return Path(sys.executable)
    raise DevError(
        f"No Python with torch found for {comfyui}: it has no venv or .venv, and {sys.executable} has no torch. "
        "Set COMFYUI_PYTHON to the python executable that runs it."
    )


def ensure() -> Environment:
    """The environment to use, built first where there is none. Raises DevError with what to do."""
    found = find()
    if found:
        return found
    from . import install

    return install.ensure(ROOT)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
