"""Where files go, and how they get there: complete or not at all, and never over an older one."""

import os
import tempfile
from itertools import count
from pathlib import Path

import folder_paths
from safetensors.torch import save_file
from torch import Tensor


MAX_NAME = 180
"""Characters of a file name prefix; file systems stop at 255 bytes, and a counter follows."""
_REFUSED = "could not write {}: {}. Free some space or choose another folder, then queue again"


def loras_folder() -> Path:
    """ComfyUI's output/loras where it is on the loras path (core saves there), else the first loras folder."""
    listed = [Path(path) for path in folder_paths.get_folder_paths("loras")]
    output = Path(folder_paths.get_output_directory()) / "loras"
    return output if output in listed or not listed else listed[0]


def runs_folder() -> Path:
    """Where runs keep their checkpoints, each in a folder of its own."""
    return Path(folder_paths.get_output_directory()) / "tidetable" / "runs"


def tensorboard_folder(run: str) -> Path:
    """Where TensorBoard's events of a run go, made."""
    return _made("tensorboard", run)


def previews_folder(run: str | None = None) -> Path:
    """Where the pictures of a run go, made; without a run, a new folder."""
    base = Path(folder_paths.get_output_directory()) / "tidetable" / "previews"
    free = (f"training_{number:05}" for number in count(1))
    return _made("previews", run or next(name for name in free if not (base / name).exists()))


def _made(kind: str, run: str) -> Path:
    folder = Path(folder_paths.get_output_directory()) / "tidetable" / kind / run
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"could not make {folder}: {error}. Free some space, or start ComfyUI with another --output-directory"
        ) from error
    return folder


def as_output(path: Path) -> dict[str, str]:
    """A file in the output folder as ComfyUI's page names images."""
    place = path.parent.relative_to(folder_paths.get_output_directory())
    return {"filename": path.name, "subfolder": str(place), "type": "output"}


def log_file(name: str) -> Path:
    """A file of this name under ComfyUI's output folder. ValueError for a name that leaves it."""
    base = Path(folder_paths.get_output_directory()).resolve()
    path = (base / name).resolve() if "\0" not in name else base
    if path == base or base not in path.parents:
        raise ValueError(f"{name!r} is not a file inside {base}: use a plain name, or sub/name.jsonl")
    return path


def rescue_folders() -> list[Path]:
    """Where a LoRA may go when a run is cut short: the loras folder, or what can be written in its place."""
    output = Path(folder_paths.get_output_directory()) / "loras"
    return list(dict.fromkeys([loras_folder(), output, Path(tempfile.gettempdir())]))


def save_lora(tensors: dict[str, Tensor], prefix: str, metadata: dict[str, str], base: Path | None = None) -> Path:
    """Write `<prefix>_<counter>_.safetensors` into the loras folder, or into `base`, and return its path.

    The prefix may name subfolders. ValueError for an empty, too long or escaping prefix, and for a disk that is full.
    """
    if not prefix.strip() or len(prefix) > MAX_NAME or "\0" in prefix:
        raise ValueError(
            f"the file name must have 1 to {MAX_NAME} characters, this one has {len(prefix)}: {prefix[:40]!r}"
        )
    base = base or loras_folder()
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(base))
    except OSError as error:
        raise ValueError(_REFUSED.format(base / prefix, error)) from error
    except Exception as error:  # ComfyUI raises a bare Exception for a path that leaves the folder
        raise ValueError(f"{prefix!r} is not a place inside {base}: use a plain name, or sub/name") from error
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except Exception as error:  # safetensors wraps the operating system's error in a class of its own
        raise ValueError(_REFUSED.format(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cache_folder(name: str) -> Path:
    """The folder of the cache of this name, below output/tidetable/cache. ValueError for a name that leaves it."""
    base = (Path(folder_paths.get_output_directory()) / "tidetable" / "cache").resolve()
    path = (base / name.strip()).resolve() if name.strip() and "\0" not in name and len(name) <= MAX_NAME else base
    if base not in path.parents:
        raise ValueError(f"{name[:40]!r} is not a name for a cache in {base}: use a plain name, or sub/name")
    return path
