"""Pictures on their way into a cache: read and cut in a thread, ahead of the VAE, which sees one or several at once."""

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import comfy.sd
import torch
from torch import Tensor, nn

from ..training.checkpoint import digest
from ..training.dataset.buckets import BucketConfig, Placement, cuts, place
from ..training.dataset.catalog import Catalog, Seen
from ..training.dataset.images import BadImageError, fit
from ..training.dataset.scan import Entry
from ..training.dataset.store import Store


AHEAD = 4
"""Pictures that are decoded before the VAE is done with the one before: they are in memory."""
WAITING = 4
"""Batches whose pictures may wait for others of their size."""
_TILED = ("encode_tiled_", "encode_tiled_1d", "encode_tiled_3d", "_encode_tiled_owned")
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class View:
    """A latent that the cache lacks."""

    name: str
    """Its picture's."""
    key: str
    pixels: Tensor
    """[H, W, C] in 0 to 1 at the bucket's size."""
    mask: Tensor | None
    """[H, W, 1], the same."""
    sizes: dict[str, int]

    def mask_for(self, latent: Tensor) -> Tensor | None:
        """[1, h, w] in 0 to 1 at the latent's size."""
        if self.mask is None:
            return None
        pixels = self.mask.movedim(-1, 0)[None]
        return nn.functional.interpolate(pixels, size=latent.shape[-2:], mode="area")[0].clamp(0, 1)


@dataclass
class Prepared:
    """What is known of a picture before the VAE sees it."""

    name: str
    error: str = ""
    """Why it cannot be used; empty where it can."""
    notes: list[str] = field(default_factory=list)
    keys: tuple[str, ...] = ()
    """Those of all its latents."""
    known: dict[str, Any] = field(default_factory=dict)
    """What the cache says about the latents that it has."""
    lacking: list[View] = field(default_factory=list)


class Preparation:
    """From an entry to what is to be encoded of it. Called in one thread, in the entries' order."""

    def __init__(self, store: Store, catalog: Catalog, buckets: BucketConfig, vae_name: str, verify: bool):
        self.store, self.catalog, self.buckets = store, catalog, buckets
        self.vae_name, self.verify = vae_name, verify
        self.names: set[str] = set()
        self.asked: set[str] = set()
        """Keys of latents that are on their way: the same picture under two names is encoded once."""

    def __call__(self, entry: Entry) -> Prepared:
        found = Prepared(entry.name)
        try:
            self._prepare(entry, found)
        except BadImageError as error:
            found.error = str(error)
        return found

    def _prepare(self, entry: Entry, found: Prepared) -> None:
        if entry.name in self.names:
            raise BadImageError("has the name of another picture")
        seen, mask = self.catalog.look(entry.source), self.catalog.look_at_mask(entry.mask)
        if mask is not None and mask.error:
            found.notes.append(f"its mask {mask.error}: used without")
            mask = None
        found.notes += seen.notes
        if seen.error:
            raise BadImageError(seen.error)
        views = self._views(seen, mask)
        for key in views:
            if key not in self.asked and has_record(self.store, key, self.verify, found.notes.append):
                found.known[key] = self.store.places[key].info
        wanted = {key: at for key, at in views.items() if key not in found.known and key not in self.asked}
        if wanted:
            picture, cover = seen.picture(), None if mask is None else mask.picture()
            found.lacking = [_view(entry.name, key, picture, cover, *at) for key, at in wanted.items()]
        self.names.add(entry.name)
        self.asked |= wanted.keys()
        found.keys = tuple(views)

    def _views(self, seen: Seen, mask: Seen | None) -> dict[str, tuple[Placement, bool]]:
        """(where it is cut, whether it is mirrored) of every latent of a picture, by key."""
        try:
            middle = place(*seen.size, self.buckets)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        found = {}
        for at in cuts(middle, self.buckets, seen.content):
            for flipped in (False, True) if self.buckets.flip else (False,):
                box = [at.original, at.resized, at.left, at.top, at.bucket, flipped]
                cover = mask.content if mask else ""
                found[digest(["latent", seen.content, cover, box, self.vae_name])] = at, flipped
        return found


def has_record(store: Store, key: str, verify: bool, note: Callable[[str], object]) -> bool:
    """Whether the cache has a whole record; a damaged one is noted and forgotten."""
    if key not in store:
        return False
    if verify and not store.is_whole(key):
        note(f"was damaged in {store.places[key].shard.name}: encoded again")
        store.forget(key)
        return False
    return True


def ahead(make: Callable[[Item], Made], items: Iterable[Item], count: int = AHEAD) -> Generator[Made, None, None]:
    """`make` of each item, in order, made in a thread while what came before is used: `count` items ahead at most.

    Close it (contextlib.closing) to end the thread where not all are wanted.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1, "tidetable-pictures") as thread:
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Batches:
    """Gathers views of one size, and encodes `size` of them at once, or fewer where memory does not suffice.

    One by one, a latent is the same in every run. In batches kernels may round otherwise, by what other pictures there
    are: equal to that rounding only.
    """

    def __init__(self, vae: comfy.sd.VAE, size: int, note: Callable[[str, str], object]):
        video = getattr(vae, "latent_dim", 2) == 3 and not getattr(vae, "not_video", False)
        self.size = 1 if video else size  # to a video VAE a batch is one film
        self.vae, self.whole, self.note = vae, copy.copy(vae), note
        for name in _TILED:  # ComfyUI goes over to tiles by itself, which are other latents, and only logs it
            if hasattr(vae, name):
                setattr(self.whole, name, _refuse)
        self.waiting: dict[tuple[int, ...], list[View]] = {}

    def add(self, view: View) -> Iterator[tuple[View, Tensor]]:
        """Views with their latents [C, ...], of those that need not wait any longer."""
        group = self.waiting.setdefault(tuple(view.pixels.shape), [])
        group.append(view)
        if len(group) < self.size and sum(map(len, self.waiting.values())) <= WAITING * self.size:
            return
        fullest = max(self.waiting, key=lambda shape: len(self.waiting[shape]))
        yield from self._encode(self.waiting.pop(fullest))

    def rest(self) -> Iterator[tuple[View, Tensor]]:
        while self.waiting:
            yield from self._encode(self.waiting.pop(next(iter(self.waiting))))

    def _encode(self, views: Sequence[View]) -> Iterator[tuple[View, Tensor]]:
        done = 0
        while done < len(views):
            part = views[done : done + self.size]
            latents = self._try(part)
            if latents is None and len(part) > 1:
                self.size = len(part) // 2
                self.note(part[0].name, f"{len(part)} at once were too large for the memory: {self.size} from here on")
                continue
            if latents is None:
                self.note(part[0].name, "was too large for the memory: encoded in tiles, which differ a little")
                latents = self.vae.encode(part[0].pixels[None])
            yield from zip(part, latents.float().cpu(), strict=True)
            done += len(part)

    def _try(self, views: Sequence[View]) -> Tensor | None:
        """None where memory does not suffice."""
        try:
            return self.whole.encode(torch.stack([view.pixels for view in views]))
        except _TooLargeError:
            return None


class _TooLargeError(Exception):
    """Raised in place of tiles."""


def _refuse(*args: object, **kwargs: object) -> Tensor:
    raise _TooLargeError


def _view(name: str, key: str, picture: Any, cover: Tensor | None, at: Placement, flipped: bool) -> View:
    mask = None
    if cover is not None:  # the mask through the same resizing and cut, whatever its own size
        mask = fit(cover, replace(at, original=(cover.shape[1], cover.shape[0])), flipped)
    return View(name, key, fit(picture, at, flipped), mask, at.size_conditioning(flipped))
