"""Which pictures a folder holds, and what stands beside them. Nothing is opened here but captions.

A picture's caption is in a file of its name: `.caption` is a sentence, `.txt` tags, `.json` has "caption" and "tags".
A folder `10_name` counts its pictures ten times; without a caption file, `name` is their caption. A mask is
`x.mask.png`, `x-masklabel.png` (as in OneTrainer) or `masks/x.png`, white where training looks.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .captions import Caption, shorten
from .report import Report


IMAGE_ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
MASK_FOLDER = "masks"
MAX_REPEATS = 10_000
MAX_CAPTION_BYTES = 10_000_000
_MASK_NAME = re.compile(r"^(.*)(?:\.mask|-masklabel)$", re.IGNORECASE)
_REPEATS = re.compile(r"^(\d+)_(.*)$")


@dataclass(frozen=True)
class Entry:
    """One picture of a data set."""

    name: str
    """Where it is in its data set, with / between folders: what reports call it and what its captions follow from."""
    source: Any
    """A Path, or the picture itself as a tensor [H, W, 3] in 0 to 1."""
    caption: Caption = field(default_factory=Caption)
    mask: Any = None
    """A Path or a tensor [H, W]; None is none."""
    repeats: int = 1
    regularization: bool = False
    """Keeps what the model knew: no trigger word, and as often as all others together."""


@dataclass(frozen=True)
class Pictures:
    """What a data set node hands on."""

    entries: tuple[Entry, ...]
    report: Report


def scan_folder(folder: Path, regularization: bool = False) -> Pictures:
    """Every picture below `folder`, in the order of their names. ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the spelling")
    report = Report()
    entries = []
    for place, files in _walk(folder, folder, frozenset(), report):
        entries += _entries_of(folder, place, files, regularization, report)
    if not entries:
        endings = " ".join(sorted(IMAGE_ENDINGS))
        raise ValueError(f"there are no pictures in {folder} (files that end in {endings})\n{report.text()}".rstrip())
    return Pictures(tuple(sorted(entries, key=lambda entry: entry.name)), report)


def state_of_folder(folder: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, time of the last change) of every file below: what differs after any change."""
    found = []
    for place, files in _walk(folder, folder, frozenset(), Report()):
        for name in files:
            try:
                state = (place / name).stat()
            except OSError:
                continue
            found.append(((place / name).relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns))
    return sorted(found)


def read_text(path: Path, name: str, report: Report) -> str:
    """A caption file's text: UTF-8, UTF-16 with a mark, else Windows-1252, which is reported. "" where unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES)
    except OSError as error:
        report.note(name, f"could not be read ({error.strerror}): no caption")
        return ""
    for encoding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig",):
        try:
            return data.decode(encoding).strip()
        except UnicodeDecodeError:
            pass
    report.note(name, "is not UTF-8: read as Windows-1252. Save it as UTF-8 if words look wrong")
    return data.decode("cp1252", errors="replace").strip()


def _walk(
    root: Path, folder: Path, above: frozenset[str], report: Report
) -> Iterator[tuple[Path, dict[str, os.DirEntry]]]:
    """(folder, its files by name) from `folder` on; a link that leads back above itself is left out."""
    try:
        real = os.path.realpath(folder)
        if real in above:
            report.skip(folder.relative_to(root).as_posix(), "is a link to a folder that it is in")
            return
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        report.skip(folder.relative_to(root).as_posix(), f"the folder could not be read ({error.strerror})")
        return
    yield folder, {entry.name: entry for entry in entries if not _is_folder(entry)}
    for entry in entries:
        if _is_folder(entry):
            yield from _walk(root, folder / entry.name, above | {real}, report)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries_of(root: Path, place: Path, files: dict, regularization: bool, report: Report) -> list[Entry]:
    if place.name == MASK_FOLDER and place != root:
        return []
    repeats, label = _repeats_of(root, place, report)
    pictures, masks = {}, {}
    for name in files:
        stem, ending = os.path.splitext(name)
        if ending.lower() in IMAGE_ENDINGS:
            of = _MASK_NAME.match(stem)
            (masks if of else pictures)[of[1] if of else name] = place / name
    beside = place / MASK_FOLDER
    if beside.is_dir():
        masks |= {path.stem: path for path in beside.iterdir() if path.suffix.lower() in IMAGE_ENDINGS}
    _report_orphans(root, place, pictures, masks, report)
    return [
        Entry(
            path.relative_to(root).as_posix(),
            path,
            _caption_of(path, files, label, root, report),
            masks.get(path.stem),
            repeats,
            regularization,
        )
        for path in pictures.values()
        if repeats
    ]


def _repeats_of(root: Path, place: Path, report: Report) -> tuple[int, str]:
    """(how often, the caption) that the nearest folder named like 10_name gives; (1, "") without one."""
    for folder in (place, *place.parents):
        found = _REPEATS.match(folder.name)
        if found:
            count = int(found[1])
            if count > MAX_REPEATS:
                report.note(folder.name, f"the number before _ is above {MAX_REPEATS}: taken as 1 repeat")
                return 1, found[2]
            if count == 0:
                report.skip(folder.relative_to(root).as_posix(), "0 repeats")
            return count, found[2]
        if folder == root:
            break
    return 1, ""


def _caption_of(path: Path, files: dict, label: str, root: Path, report: Report) -> Caption:
    name = path.relative_to(root).as_posix()
    sentence, tags, found = "", "", False
    for ending in (".caption", ".txt", ".json"):
        beside = path.with_suffix(ending)
        if beside.name not in files:
            continue
        found = True
        text = read_text(beside, beside.relative_to(root).as_posix(), report)
        if ending == ".caption":
            sentence = text
        elif ending == ".txt":
            tags = text
        else:
            both = _from_json(text, beside.relative_to(root).as_posix(), report)
            sentence, tags = sentence or both.sentence, tags or both.tags
    caption, words = shorten(Caption(" ".join(sentence.split()), " ".join(tags.split())))
    if words > len(" ".join((caption.sentence, caption.tags)).split()):
        report.note(name, f"its caption has {words} words: cut")
    if not found and label:
        return Caption(tags=label.replace("_", " "))
    if not (caption.sentence or caption.tags):
        report.note(name, "has no caption")
    return caption


def _from_json(text: str, name: str, report: Report) -> Caption:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        report.note(name, f"is not JSON ({error}): no caption")
        return Caption()
    if not isinstance(value, dict):
        report.note(name, 'must be {"caption": "…", "tags": "…"}: no caption')
        return Caption()
    tags = value.get("tags", "")
    if isinstance(tags, list):
        tags = ", ".join(str(tag) for tag in tags)
    return Caption(str(value.get("caption") or ""), str(tags or ""))


def _report_orphans(root: Path, place: Path, pictures: dict, masks: dict, report: Report) -> None:
    stems = {path.stem for path in pictures.values()}
    for stem, path in masks.items():
        if stem not in stems:
            report.skip(path.relative_to(root).as_posix(), "is a mask without a picture")
    if len(stems) < len(pictures):
        for stem in sorted(stems):
            names = [path.name for path in pictures.values() if path.stem == stem]
            if len(names) > 1:
                report.note((place / names[0]).relative_to(root).as_posix(), f"shares its caption with {names[1:]}")
