"""The data set nodes' work: which folders may be read, and pictures from a folder or from the graph."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import folder_paths
from torch import Tensor

from ..training.checkpoint import digest
from ..training.dataset.captions import Caption, shorten
from ..training.dataset.report import Report
from ..training.dataset.scan import Entry, Pictures, scan_folder, state_of_folder


logger = logging.getLogger(__name__)
REGULARIZATION = "regularization"
"""Goes before the names of these pictures, which may be those of others."""
EXTRA_KEY = "datasets"
"""Folders that extra_model_paths.yaml lists under this name may be read too."""


def allowed_folders() -> list[Path]:
    """ComfyUI's input and output folders, and what the user has listed."""
    listed = folder_paths.folder_names_and_paths.get(EXTRA_KEY, ([], set()))[0]
    own = [folder_paths.get_input_directory(), folder_paths.get_output_directory()]
    return [Path(os.path.abspath(path)) for path in (*own, *listed)]


def resolve_folder(name: str) -> Path:
    """A folder under input/ by its name, or an allowed one by its path. ValueError for any other.

    Links are followed: whoever can place one can read what it points to.
    """
    name = name.strip().strip('"').strip("'")
    allowed = allowed_folders()
    if not name or "\0" in name:
        raise ValueError(f"the folder is empty: name one in {allowed[0]}, or give the path of one that may be read")
    path = Path(os.path.abspath(allowed[0] / os.path.expanduser(name)))
    if not any(path == base or base in path.parents for base in allowed):
        raise ValueError(
            f"{path} is outside the folders that may be read ({', '.join(map(str, allowed))}): move it there, link it "
            f"there, or list its folder as '{EXTRA_KEY}' in ComfyUI's extra_model_paths.yaml"
        )
    return path


def folder_dataset(folder: str, regularization_folder: str = "") -> tuple[Pictures, str]:
    """(pictures, report) of a folder and, where one is named, of its regularization folder."""
    found = scan_folder(resolve_folder(folder))
    if regularization_folder.strip():
        others = scan_folder(resolve_folder(regularization_folder), regularization=True)
        renamed = [replace(entry, name=f"{REGULARIZATION}/{entry.name}") for entry in others.entries]
        found = Pictures((*found.entries, *renamed), found.report)
        found.report.extend(others.report)
    repeated = sum(entry.repeats for entry in found.entries if not entry.regularization)
    masks = sum(entry.mask is not None for entry in found.entries)
    others = sum(entry.regularization for entry in found.entries)
    found.report.figures.append(
        f"{len(found.entries)} pictures, {others} of them for regularization; {repeated} with repeats; {masks} masks"
    )
    text = found.report.text()
    logger.info("data set %s:\n%s", folder, text)
    return found, text


def folder_state(folder: str, regularization_folder: str = "") -> str:
    """Changes whenever a file of the folders does: ComfyUI then runs the node again."""
    try:
        names = [name for name in (folder, regularization_folder) if name.strip()]
        return digest([state_of_folder(resolve_folder(name)) for name in names])
    except (ValueError, OSError) as error:
        return str(error)  # the node itself says it to the user


def images_dataset(
    images: Sequence[Tensor], captions: Sequence[str], masks: Sequence[Tensor] | None = None, repeats: int = 1
) -> tuple[Pictures, str]:
    """(pictures, report) of IMAGE batches with one caption a picture, or one for all; masks as captions."""
    rows = [row[..., :3] for batch in images for row in batch]
    if not rows:
        raise ValueError("there are no images: connect at least one")
    texts = list(captions) or [""]
    covers = [row for batch in masks or () for row in (batch if batch.ndim == 3 else batch[None])]
    for name, values in (("captions", texts), ("masks", covers)):
        if len(values) not in (0, 1, len(rows)):
            raise ValueError(f"{len(rows)} images but {len(values)} {name}: connect one for each image, or one for all")
    report, entries = Report(), []
    for place, row in enumerate(rows):
        name = f"image {place + 1}"
        text = texts[place % len(texts)]
        caption, words = shorten(Caption(tags=" ".join(text.split())))
        if words > len(caption.tags.split()):
            report.note(name, f"its caption has {words} words: cut")
        mask = covers[place % len(covers)] if covers else None
        entries.append(Entry(name, row.detach().clone(), caption, mask, repeats))
    report.figures.append(f"{len(entries)} pictures from the graph")
    return Pictures(tuple(entries), report), report.text()
