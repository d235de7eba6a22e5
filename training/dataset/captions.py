"""What a sample's caption says: a function of (seed, variant, name), so that it can be encoded ahead."""

import random
import re
from dataclasses import dataclass

from ..recipe import require


MAX_WORDS = 1000
"""Longer captions are cut here and reported; no text encoder that we know reads more."""
_WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Caption:
    """What stands beside a picture: a sentence, a list of tags, or both. Both empty is a picture without words."""

    sentence: str = ""
    tags: str = ""
    """Separated by commas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """The one home of the defaults of Caption Variations."""

    variants: int = 1
    """Different captions of a picture that are encoded; an epoch visits each of them once, at least 1."""
    trigger: str = ""
    """Goes before every caption that does not have it already; not on regularization pictures."""
    shuffle_tags: bool = False
    keep_tags: int = 0
    """The first so many tags are neither shuffled nor dropped."""
    tag_dropout: float = 0.0
    """Share of the other tags that is left out of a caption."""
    tag_share: float = 0.2
    """Where a picture has both a sentence and tags: how often the tags are used."""
    wildcards: bool = True
    """{a|b} in a caption becomes a or b."""
    literal: bool = True
    """Parentheses are text. Off: they are ComfyUI's weights, as in a prompt."""
    dropped_text: str = ""
    """What Train LoRA's caption_dropout puts in place of a caption."""
    max_chunks: int = 3
    """Chunks of 75 tokens that a caption has at most on CLIP text encoders, at least 1."""
    seed: int = 0

    def __post_init__(self):
        require(1 <= self.variants <= 100, "variants", self.variants, "in 1..100")
        require(self.keep_tags >= 0, "keep_tags", self.keep_tags, ">= 0")
        require(1 <= self.max_chunks <= 10, "max_chunks", self.max_chunks, "in 1..10")
        for name in ("tag_dropout", "tag_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")

    def distinct(self, caption: Caption) -> int:
        """How many variants are worth making for this caption: one where nothing about it is random."""
        mixed = bool(caption.sentence and caption.tags) and 0 < self.tag_share < 1
        tagged = bool(caption.tags) and (self.shuffle_tags or self.tag_dropout > 0)
        wild = self.wildcards and any(_WILDCARD.search(part) for part in (caption.sentence, caption.tags))
        return self.variants if mixed or tagged or wild else 1


def write_caption(
    caption: Caption, config: CaptionConfig, name: str, variant: int, regularization: bool = False
) -> str:
    """The text of one variant of the caption of the picture `name`; equal arguments give equal texts."""
    draw = random.Random(f"{config.seed}/{variant}/{name}")
    with_tags = draw.random() < config.tag_share if caption.sentence and caption.tags else bool(caption.tags)
    text = caption.tags if with_tags else caption.sentence
    if config.wildcards:
        text = expand(text, draw)
    if with_tags:
        text = _vary_tags(text, config, draw)
    if config.trigger and not regularization and config.trigger not in text:
        text = ", ".join(part for part in (config.trigger, text) if part)
    return escape(text) if config.literal else text


def expand(text: str, draw: random.Random) -> str:
    """Every {a|b|c} becomes one of its parts, the innermost first; braces without a bar stay."""
    while found := _WILDCARD.search(text):
        text = text[: found.start()] + draw.choice(found[1].split("|")) + text[found.end() :]
    return text


def escape(text: str) -> str:
    """Parentheses that ComfyUI's tokenizers read as such; those that are escaped already stay as they are."""
    return re.sub(r"\\?([()])", r"\\\1", text)


def shorten(caption: Caption) -> tuple[Caption, int]:
    """The caption within `MAX_WORDS`, and the words that its longer part had."""
    words = max(len(part.split()) for part in (caption.sentence, caption.tags))
    if words <= MAX_WORDS:
        return caption, words
    parts = (" ".join(part.split()[:MAX_WORDS]) for part in (caption.sentence, caption.tags))
    return Caption(*parts), words


def _vary_tags(text: str, config: CaptionConfig, draw: random.Random) -> str:
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    kept, loose = tags[: config.keep_tags], tags[config.keep_tags :]
    if config.shuffle_tags:
        draw.shuffle(loose)
    if config.tag_dropout:
        loose = [tag for tag in loose if draw.random() >= config.tag_dropout]
    return ", ".join([*kept, *loose])
