"""A cache on disk: records of tensors in safetensors shards, read one record at a time through a memory map.

A shard is written once, under a name of its own, and never changed; its header says what is in it. There is no index
file: the index is what the headers say together. So two processes can fill one cache at once, a run that is cut short
keeps its finished shards, and a damaged shard costs its own records only.
"""

import json
import math
import mmap
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoint import _pack, map_tensors


HEADER = "tidetable_shard"
HEADER_CHECKSUM = "tidetable_shard_crc32"
PATTERN = "*.safetensors"
SHARD_BYTES = 128 << 20
"""A shard is written when its records reach this."""
RESIDENT_BYTES = 256 << 20
"""Before more is read, the pages are handed back: what has been read does not pile up in memory. Handing them back at
all costs some 5 % of a read, at 64 MB 8 %. Linux may map 2 MB around a smaller record: more is resident then."""
OPEN_SHARDS = 256
"""Memory maps held at once; each takes a file handle."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class DamagedShardError(ValueError):
    """The file is not a shard, or not all of one."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a tensor of a record is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    """Its first byte in the file."""
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is."""

    shard: Path
    name: str
    """The shard's."""
    value: Any
    """The nest that was written, with leaves for tensors."""
    nbytes: int
    info: Mapping[str, Any]
    checksum: int

    def tensors(self) -> list[Leaf]:
        return _leaves(self.value)


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
            text = json.dumps({"kind": kind, "records": described})
            file.write(save(tensors, metadata={HEADER: text, HEADER_CHECKSUM: str(zlib.crc32(text.encode()))}))
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
        self.shards: list[Path] = []
        """Those that are whole, the oldest first."""
        self.damaged: list[tuple[Path, str]] = []
        """Shards that could not be opened, and why."""
        self._shards: dict[str, _Shard] = {}
        self._views: dict[str, Any] = {}
        """The records read so far as views, some hundred bytes each, as the index has too. A second read looks at
        nothing else: with many records each object is far away in memory, and one more costs a percent."""
        self._largest = 1
        """Bytes of the largest record so far."""
        self._left = 0
        """Reads until the pages are handed back."""
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def refresh(self) -> None:
        """Read the headers anew."""
        self.places, self.shards, self.damaged = {}, [], []
        self._views.clear()
        for path in sorted(self.folder.glob(PATTERN), key=_age):
            try:
                for key, place in _read_header(path):
                    self.places[key] = place  # the newest has the last word: it may be a repair
                self.shards.append(path)
            except FileNotFoundError:
                continue  # another process has set it aside just now
            except DamagedShardError as error:
                self.damaged.append((path, str(error)))

    def read(self, key: str) -> Any:
        """The nest under a key, the same one at each call: copy what you change.

        KeyError where there is none; DamagedShardError where its shard is gone.
        """
        try:
            nest = self._views[key]
        except KeyError:
            nest = self._look(key)
        self._left -= 1
        if self._left < 0:
            self._hand_back()
        return nest

    def is_whole(self, key: str) -> bool:
        """Whether the bytes are those that were written."""
        try:
            return _checksum(_tensors(self.read(key))) == self.places[key].checksum
        except (DamagedShardError, OSError):
            return False

    def forget(self, key: str) -> None:
        self.places.pop(key, None)
        self._views.pop(key, None)

    def close(self) -> None:
        self._shards.clear()
        self._views.clear()

    def _hand_back(self) -> None:
        self._left = RESIDENT_BYTES // self._largest
        for shard in self._shards.values():
            _advise(shard.map, "MADV_DONTNEED")

    def _look(self, key: str) -> Any:
        place = self.places[key]
        shard = self._shards.get(place.name)
        if shard is None:
            if len(self._shards) >= OPEN_SHARDS:
                for seen in self._shards.pop(next(iter(self._shards))).keys:
                    self._views.pop(seen, None)
            shard = self._shards[place.name] = _Shard(place.shard)
        shard.keys.append(key)
        if place.nbytes > self._largest:
            self._largest = place.nbytes
            self._left = min(self._left, RESIDENT_BYTES // self._largest)
        found = self._views[key] = _build(place.value, shard.view)
        return found


class _Shard:
    """A memory map and views of it."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:  # a private copy on write: nothing that a reader does reaches the file
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            text = f"{path.name} could not be opened ({error}): encode the data set again"
            raise DamagedShardError(text) from None
        _advise(self.map, "MADV_RANDOM")  # else the system reads ahead, many times what is asked for
        self.bases: dict[torch.dtype, Tensor] = {}
        """The whole file as each dtype that it has."""
        self.keys: list[str] = []
        """The records of which there are views."""

    def view(self, leaf: Leaf) -> Tensor:
        base = self.bases.get(leaf.dtype)
        if base is None:
            base = self.bases[leaf.dtype] = torch.frombuffer(
                self.map, dtype=leaf.dtype, count=len(self.map) // leaf.dtype.itemsize
            )
        size = base.element_size()
        if leaf.first % size:  # safetensors aligns what it writes, but does not have to
            count = math.prod(leaf.shape)
            return torch.frombuffer(self.map, dtype=leaf.dtype, count=count, offset=leaf.first).reshape(leaf.shape)
        return base.as_strided(leaf.shape, leaf.strides, leaf.first // size)


def set_aside(path: Path) -> None:
    """Give a damaged shard a name that is not read again. Another process may have done so just now."""
    with suppress(FileNotFoundError):
        path.replace(path.with_suffix(".damaged"))


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name


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
        text = header["__metadata__"][HEADER]
        if str(zlib.crc32(text.encode())) != header["__metadata__"][HEADER_CHECKSUM]:
            raise DamagedShardError("its list of records does not match its checksum")
        records = json.loads(text)["records"]
        where = {name: _where(value, 8 + length) for name, value in layout.items()}
        found = [
            (record["key"], _place(path, _located(record["value"], where), record["info"], record["checksum"]))
            for record in records
        ]
    except (DamagedShardError, FileNotFoundError):
        raise
    except Exception as error:  # damaged JSON is any of these
        raise DamagedShardError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    yield from found


def _where(described: Mapping[str, Any], start: int) -> Leaf:
    first, last = described["data_offsets"]
    dtype, shape = _DTYPES[described["dtype"]], tuple(described["shape"])
    if math.prod(shape) * dtype.itemsize != last - first:
        raise DamagedShardError(f"a tensor {shape} of {dtype} cannot have {last - first} bytes")
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return Leaf(dtype, shape, start + first, strides)


def _located(packed: Any, where: Mapping[str, Leaf]) -> Any:
    """The nest of which `_pack` made this, with leaves for tensors."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return where[content]
    if kind == "dict":
        return {key: _located(item, where) for key, item in content}
    items = [_located(item, where) for item in content]
    return items if kind == "list" else tuple(items)


def _place(path: Path, value: Any, info: Mapping[str, Any], checksum: int) -> Place:
    return Place(path, path.name, value, sum(leaf.nbytes for leaf in _leaves(value)), info, checksum)


def _leaves(value: Any) -> list[Leaf]:
    found: list[Leaf] = []
    _build(value, found.append)
    return found


def _build(value: Any, view: Callable[[Leaf], Any]) -> Any:
    kind = type(value)
    if kind is Leaf:
        return view(value)
    if kind is dict:
        return {key: _build(item, view) for key, item in value.items()}
    if kind is list:
        return [_build(item, view) for item in value]
    return tuple(_build(item, view) for item in value) if kind is tuple else value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


def _checksum(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found
