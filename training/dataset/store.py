"""A cache on disk: records of tensors in safetensors shards, read one record at a time through a memory map.

A shard is written once, under a name of its own, and never changed; its header says what is in it. There is no index
file: the index is what the headers say together. So two processes can fill one cache at once, a run that is cut short
keeps its finished shards, and a damaged shard costs its own records only.
"""

import json
import mmap
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoint import _pack, map_tensors


HEADER = "tidetable_shard"
PATTERN = "*.safetensors"
SHARD_BYTES = 128 << 20
"""A shard is written when its records reach this."""
RESIDENT_BYTES = 64 << 20
"""After reading so much, the pages are handed back: what has been read does not pile up in memory."""
OPEN_SHARDS = 256
"""Memory maps held at once; each takes a file handle."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class DamagedShardError(ValueError):
    """The file is not a shard, or not all of one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is."""

    shard: Path
    value: Any
    """The nest as `_pack` leaves it; each tensor is {"tensor": (dtype, shape, first byte, bytes)}."""
    info: Mapping[str, Any]
    checksum: int

    def tensors(self) -> list[tuple[torch.dtype, tuple[int, ...], int, int]]:
        found: list = []
        _unpack(self.value, lambda where: found.append(where))
        return found


class ShardWriter:
    """Collects records and writes them as shards. `close` writes the rest; leaving the `with` block does so too."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.pending: list[tuple[str, Any, Mapping[str, Any]]] = []
        self.bytes = 0
        self.written: list[Path] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, key: str, value: Any, info: Mapping[str, Any] | None = None) -> None:
        """A nest of tensors and plain values under a key. OSError where the disk refuses it."""
        self.pending.append((key, map_tensors(value, lambda tensor: tensor.detach().cpu().clone()), info or {}))
        self.bytes += sum(tensor.nbytes for tensor in _tensors(self.pending[-1][1]))
        if self.bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        if self.pending:
            self.written.append(write_shard(self.folder, self.kind, self.pending))
        self.pending, self.bytes = [], 0


def write_shard(folder: Path, kind: str, records: Iterable[tuple[str, Any, Mapping[str, Any]]]) -> Path:
    """One shard of (key, nest, info); it has its name only when all of it is on the disk."""
    tensors: dict[str, Tensor] = {}
    described = []
    for number, (key, value, info) in enumerate(records):
        own: dict[str, Tensor] = {}
        packed = _pack(value, f"{number:06}", own)
        tensors |= own
        described.append({"key": key, "value": packed, "info": dict(info), "checksum": _checksum(own.values())})
    path = folder / f"{kind}-{uuid.uuid4().hex[:16]}.safetensors"
    temporary = path.with_suffix(".tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(save(tensors, metadata={HEADER: json.dumps({"kind": kind, "records": described})}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Store:
    """What the shards of a folder hold, by key. Reading gives views of the map: clone what is kept or changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.damaged: list[tuple[Path, str]] = []
        """Shards that could not be opened, and why."""
        self._maps: dict[Path, mmap.mmap] = {}
        self._read_bytes = 0
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def refresh(self) -> None:
        """Read the headers anew."""
        self.places, self.damaged = {}, []
        for path in sorted(self.folder.glob(PATTERN)):
            try:
                for key, place in _read_header(path):
                    self.places.setdefault(key, place)
            except FileNotFoundError:
                continue  # another process has set it aside just now
            except DamagedShardError as error:
                self.damaged.append((path, str(error)))

    def read(self, key: str) -> Any:
        """The nest under a key. KeyError where there is none; DamagedShardError where its shard is gone."""
        place = self.places[key]
        shard = self._map(place.shard)
        return _unpack(place.value, lambda where: self._view(shard, where))

    def is_whole(self, key: str) -> bool:
        """Whether the bytes are those that were written."""
        try:
            return _checksum(_tensors(self.read(key))) == self.places[key].checksum
        except (DamagedShardError, OSError):
            return False

    def forget(self, key: str) -> None:
        self.places.pop(key, None)

    def close(self) -> None:
        self._maps.clear()

    def _view(self, shard: mmap.mmap, where: tuple[torch.dtype, tuple[int, ...], int, int]) -> Tensor:
        dtype, shape, first, size = where
        if not size:
            return torch.empty(shape, dtype=dtype)
        self._read_bytes += size
        if self._read_bytes > RESIDENT_BYTES:
            self._release()
        return torch.frombuffer(shard, dtype=dtype, count=size // dtype.itemsize, offset=first).reshape(shape)

    def _map(self, path: Path) -> mmap.mmap:
        found = self._maps.get(path)
        if found is None:
            if len(self._maps) >= OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]
            try:
                with path.open("rb") as file:  # a private copy on write: nothing that a reader does reaches the file
                    found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise DamagedShardError(
                    f"{path.name} could not be opened ({error}): encode the data set again"
                ) from None
            _advise(found, "MADV_RANDOM")  # else the system reads ahead, many times what is asked for
            self._maps[path] = found
        return found

    def _release(self) -> None:
        self._read_bytes = 0
        for shard in self._maps.values():
            _advise(shard, "MADV_DONTNEED")


def set_aside(path: Path) -> Path:
    """Give a damaged shard a name that is not read again."""
    target = path.with_suffix(".damaged")
    path.rename(target)
    return target


def _advise(shard: mmap.mmap, name: str) -> None:
    if hasattr(shard, "madvise") and hasattr(mmap, name):  # not on Windows, which trims a process's pages itself
        shard.madvise(getattr(mmap, name))


def _read_header(path: Path) -> Iterator[tuple[str, Place]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise DamagedShardError("it is cut off in its header")
            header = json.loads(file.read(length))
        layout = {name: value for name, value in header.items() if name != "__metadata__"}
        end = max((value["data_offsets"][1] for value in layout.values()), default=0)
        if 8 + length + end != size:
            raise DamagedShardError(f"it has {size} bytes, but {8 + length + end} belong to it")
        records = json.loads(header["__metadata__"][HEADER])["records"]
        where = {name: _where(value, 8 + length) for name, value in layout.items()}
        found = [
            (record["key"], Place(path, _located(record["value"], where), record["info"], record["checksum"]))
            for record in records
        ]
    except (DamagedShardError, FileNotFoundError):
        raise
    except Exception as error:  # damaged JSON is any of these
        raise DamagedShardError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    yield from found


def _where(described: Mapping[str, Any], start: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    first, last = described["data_offsets"]
    return _DTYPES[described["dtype"]], tuple(described["shape"]), start + first, last - first


def _located(packed: Any, where: Mapping[str, tuple]) -> Any:
    """What `_pack` made, with the tensors' places in place of their names."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return {"tensor": where[content]}
    if kind == "dict":
        return {"dict": [[key, _located(item, where)] for key, item in content]}
    return {kind: [_located(item, where) for item in content]}


def _unpack(value: Any, tensor_at: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor_at(content)
    if kind == "dict":
        return {key: _unpack(item, tensor_at) for key, item in content}
    items = [_unpack(item, tensor_at) for item in content]
    return items if kind == "list" else tuple(items)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


def _checksum(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found
