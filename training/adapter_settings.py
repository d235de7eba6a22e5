"""What an adapter is told beyond rank and alpha: kind, targets by pattern, ranks by pattern, regularization."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from .adapters import select_targets
from .config import Targets, _require


Kind = Literal["lora", "dora", "dora_input", "loha", "lokr"]
Initialization = Literal["zero", "pissa"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The adapter of one run. Checked when the object is made."""

    kind: Kind = "lora"
    """lora (with convolutions: LoCon), dora (norm of each output), dora_input (of each input), loha or lokr."""
    rank: int = 16
    """Inner width, 1 to 512; a layer narrower than this gets its own width."""
    lora_alpha: float = 16.0
    """The weight's change is multiplied by lora_alpha / rank; above 0."""
    rank_stabilized: bool = False
    """lora_alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    ranks: str = ""
    """Other ranks for some layers: `pattern = rank`, separated by commas or lines; the first match wins."""
    targets: Targets = "attention_mlp"
    """Layers with an adapter; see `training.adapters.select_targets`. Not used where `include` is given."""
    include: str = ""
    """Patterns (fnmatch, on whole layer names), separated by commas or lines. Empty is the preset."""
    exclude: str = ""
    """Patterns of layers to leave out. Empty is none."""
    initialization: Initialization = "zero"
    """zero, or pissa: the largest singular directions of the weight (Meng et al. 2024, arXiv:2404.02948)."""
    lokr_factor: int = 8
    """LoKr: largest size of the first Kronecker factor's sides, at least 1."""
    rank_dropout: float = 0.0
    """Probability in [0, 1) that one of the rank's directions is left out of a step. 0 is off."""
    module_dropout: float = 0.0
    """Probability in [0, 1) that a whole adapter is left out of a step. 0 is off."""
    max_norm: float = 0.0
    """After each step the norm of a weight's change is brought down to this. 0 is off."""
    continue_from: str = ""
    """A LoRA of the loras folder to go on from; kind, rank, lora_alpha and layers are then the file's. Empty: anew."""
    seed: int = 0
    """Of the random half of the initialization and of the dropouts."""

    def __post_init__(self):
        _require(1 <= self.rank <= 512, "rank", self.rank, "in 1..512")
        _require(math.isfinite(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "above 0")
        _require(self.lokr_factor >= 1, "lokr_factor", self.lokr_factor, "at least 1")
        for name in ("rank_dropout", "module_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(math.isfinite(self.max_norm) and self.max_norm >= 0, "max_norm", self.max_norm, ">= 0")
        if self.initialization == "pissa" and self.kind != "lora":
            raise ValueError(f"initialization 'pissa' exists for kind 'lora' only, not for {self.kind!r}: use 'zero'")
        if self.initialization == "pissa" and self.max_norm:
            raise ValueError(f"max_norm is {self.max_norm}, but with initialization 'pissa' it must be 0 (off)")
        parse_ranks(self.ranks)

    def rank_of(self, name: str) -> int:
        """The rank that was asked for on a layer."""
        return next((rank for pattern, rank in parse_ranks(self.ranks) if fnmatchcase(name, pattern)), self.rank)

    def scale_of(self, rank: int) -> float:
        """What the product of the factors is multiplied by."""
        return self.lora_alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def parse_ranks(text: str) -> list[tuple[str, int]]:
    """`pattern = rank` entries, in order. ValueError names the entry that is not one."""
    entries = []
    for entry in patterns(text):
        pattern, equals, rank = (part.strip() for part in entry.partition("="))
        if not (pattern and equals and rank.isascii() and rank.isdigit() and 1 <= int(rank) <= 512):
            raise ValueError(
                f"ranks has {entry!r}, but an entry is 'pattern = rank' with a rank in 1..512: '*attn* = 8'"
            )
        entries.append((pattern, int(rank)))
    return entries


def patterns(text: str) -> list[str]:
    """Entries separated by commas or line breaks, without the empty ones."""
    return [entry.strip() for entry in re.split(r"[,\n]", text) if entry.strip()]


def match_targets(modules: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers of the settings, by name. ValueError for a pattern that matches nothing, with near names."""
    candidates = select_targets(modules, "linear_conv")
    included, excluded = patterns(config.include), patterns(config.exclude)
    named = [("include", pattern) for pattern in included] + [("exclude", pattern) for pattern in excluded]
    for field, pattern in named + [("ranks", pattern) for pattern, _ in parse_ranks(config.ranks)]:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(f"{field} {pattern!r} matches no layer of this network: {_near(pattern, candidates)}")
    chosen = candidates if included else select_targets(modules, config.targets)
    chosen = {
        name: module
        for name, module in chosen.items()
        if (not included or any(fnmatchcase(name, p) for p in included))
        and not any(fnmatchcase(name, p) for p in excluded)
    }
    if not chosen:
        raise ValueError(f"no layer is left to train: exclude {config.exclude!r} takes away all that was chosen")
    return chosen


def _near(pattern: str, names: Mapping[str, object]) -> str:
    plain = pattern.strip("*.")
    by_part = {part: name for name in names for part in (name, *name.split("."))}
    close = [by_part[part] for part in difflib.get_close_matches(plain, by_part, n=3, cutoff=0.4)]
    return f"did you mean {', '.join(close or list(names)[:3])}? * stands for any characters"
