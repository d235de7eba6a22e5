"""A run on disk: one safetensors file per checkpoint, complete or not there at all, the last few kept.

Tensors are stored as tensors and everything else as JSON in the header, so that reading one runs no code. A run's
randomness is a function of (seed, step): with the weights, the optimizer and the step number, it goes on bit for bit.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


HEADER = "tidetable_checkpoint"
PATTERN = "step_*.safetensors"
_MISSING = "(not there)"


class DamagedCheckpointError(ValueError):
    """The file exists and is not a checkpoint, or not all of one."""


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `state` (nested dicts, lists and tuples of tensors and plain values) and drop all but the `keep` newest.

    The file appears under its name when its bytes are on the disk, and older ones go only after that. OSError where it
    cannot be written; the folder is then as it was.
    """
    tensors: dict[str, Tensor] = {}
    header = {"state": _pack(dict(state), "state", tensors), "digest": digest(tensors)}
    data = save(tensors, metadata={HEADER: json.dumps(header)})
    path = folder / f"step_{step:08}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    for old in checkpoints(folder)[max(keep, 1) :]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given. FileNotFoundError, or DamagedCheckpointError with the reason."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has a class of its own for every kind of damage
        raise DamagedCheckpointError(f"{path.name} is cut off or damaged ({error})") from error
    if header is None:
        raise DamagedCheckpointError(f"{path.name} is not a checkpoint of a training run")
    if digest(tensors) != header["digest"]:
        raise DamagedCheckpointError(f"{path.name} is damaged: its contents do not match its checksum")
    return _unpack(header["state"], tensors)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, newest first."""
    return sorted(folder.glob(PATTERN), reverse=True)


def read_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that can be read, and a sentence on each newer one that cannot.

    Damaged files are set aside as `.damaged`. DamagedCheckpointError where there are files and none is whole; None
    where there is no file.
    """
    notes: list[str] = []
    for path in checkpoints(folder):
        try:
            return read_checkpoint(path), notes
        except DamagedCheckpointError as error:
            notes.append(f"{error}: going on from the one before it")
            path.rename(path.with_suffix(".damaged"))
    if notes:
        raise DamagedCheckpointError(
            f"no checkpoint in {folder} can be read ({'; '.join(note.split(':')[0] for note in notes)}): set resume to"
            " 'off' to start anew"
        )
    return None, notes


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per field that is not the same: name, value in the checkpoint, value now."""
    return [
        f"{name}: {saved.get(name, _MISSING)} in the checkpoint, {now.get(name, _MISSING)} now"
        for name in sorted({*saved, *now})
        if saved.get(name, _MISSING) != now.get(name, _MISSING)
    ]


def digest(value: Any) -> str:
    """A name for a nest of dicts, lists, tensors and plain values: 16 hexadecimal digits, equal for equal contents."""
    found = hashlib.sha256()

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                found.update(f"{{{key}".encode())
                visit(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                found.update(b"[")
                visit(item)
        else:
            plain = part is None or isinstance(part, bool | int | float | str)
            found.update((repr(part) if plain else type(part).__name__).encode())
        found.update(b";")

    visit(value)
    return found.hexdigest()[:16]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(item, function) for item in value])
    return value


def clone(value: Any) -> Any:
    """The same nest with tensors of its own."""
    return map_tensors(value, lambda tensor: tensor.detach().clone())


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nest; its tensors go into `tensors`. Dicts keep keys that are not strings, tuples stay tuples."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {name}, a {type(value).__name__}: use another optimizer")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _sync_folder(folder: Path) -> None:
    """Makes the new name last through a power cut, where the system lets a folder be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
