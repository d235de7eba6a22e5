"""The embedded models' text side: a word-level tokenizer and a fixed embedding with a three-word window.

Both have the shape that `comfy.sd.CLIP` expects of a tokenizer and of a text-encoder class, so the result is an
ordinary CLIP: prompt weights, clip skip, hooks and LoraLoader all reach it.
"""

import re
import zlib

import torch
from comfy import sd1_clip
from torch import Tensor, nn

from ..training.tiny_data import CHARACTERS, HUES


TOKENS = 20
"""Every prompt becomes this many tokens, so that all conditionings have one shape."""
WORD_WIDTH = 64
CONTEXT_WIDTH = 2 * WORD_WIDTH
HASH_BUCKETS = 256
_SPECIAL = ("<pad>", "<begin>", "<end>")
_WORDS = ("a", "on", "letter", "digit", "background", "very", "dark", "bright", "handwritten", *HUES)
VOCABULARY = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS, *(f"glyph:{c}" for c in CHARACTERS)))}
_FIRST_GLYPH = VOCABULARY[f"glyph:{CHARACTERS[0]}"]
VOCABULARY_SIZE = len(VOCABULARY) + HASH_BUCKETS


def token_ids(text: str) -> list[int]:
    """Words to ids; a single character after "letter" or "digit" is that glyph, an unknown word has a hashed id."""
    ids, previous = [], ""
    for word in re.findall(r"[A-Za-z0-9']+", text):
        lower = word.lower()
        if len(word) == 1 and (previous in ("letter", "digit") or word.upper() == word):
            name = f"glyph:{word.upper()}"
        else:
            name = lower
        ids.append(VOCABULARY.get(name, len(VOCABULARY) + zlib.crc32(lower.encode()) % HASH_BUCKETS))
        previous = lower
    return ids


class TinyTokenizer:
    """Text to `{"words": [[(id, weight), ...]]}`, always `TOKENS` long; what does not fit is dropped."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        del embedding_directory, tokenizer_data

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict:
        del kwargs
        pairs = []
        for part, weight in sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0):
            pairs += [(index, weight) for index in token_ids(sd1_clip.unescape_important(part))]
        pairs = [(VOCABULARY["<begin>"], 1.0), *pairs[: TOKENS - 2], (VOCABULARY["<end>"], 1.0)]
        pairs += [(VOCABULARY["<pad>"], 1.0)] * (TOKENS - len(pairs))
        if return_word_ids:
            pairs = [(index, weight, place) for place, (index, weight) in enumerate(pairs)]
        return {"words": [pairs]}

    def untokenize(self, pairs):
        names = {index: word for word, index in VOCABULARY.items()}
        return [(pair, names.get(pair[0], "<hashed>")) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


class TinyTextModel(nn.Module):
    """Word vectors [V, 64] to a conditioning [B, 20, 128]: each token's own vector beside those of the two before it.

    The window binds "bright green" to "letter" and "dark blue" to "background" without learned positions.
    The pooled output [B, 128] is the conditioning of the last character that is named (as CLIP's is that of the end
    token); where none is named, the sum over the words divided by the root of their number; 0 for no words.
    """

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__()
        del dtype, model_options
        self.dtypes = {torch.float32}
        self.words = nn.Embedding(VOCABULARY_SIZE, WORD_WIDTH, device=device, dtype=torch.float32)
        self.register_buffer("window", torch.empty(2, WORD_WIDTH, WORD_WIDTH // 2, device=device))
        self.requires_grad_(False)

    def initialize(self, seed: int = 0) -> "TinyTextModel":
        """Draw the fixed vectors; they are shipped as a file, so this runs only when the models are made."""
        generator = torch.Generator().manual_seed(seed)
        self.words.weight.data = torch.randn(VOCABULARY_SIZE, WORD_WIDTH, generator=generator)
        self.words.weight.data[VOCABULARY["<pad>"]] = 0
        self.window = torch.randn(2, WORD_WIDTH, WORD_WIDTH // 2, generator=generator) / WORD_WIDTH**0.5
        return self

    def set_clip_options(self, options: dict) -> None:
        """Nothing to choose: one layer, one device."""

    def reset_clip_options(self) -> None:
        """Nothing was chosen."""

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, Tensor]:
        pairs = tokens["words"]
        device = self.words.weight.device
        ids = torch.tensor([[pair[0] for pair in row] for row in pairs], device=device)
        weights = torch.tensor([[float(pair[1]) for pair in row] for row in pairs], device=device)
        own = self.words(ids) * weights[..., None]
        before = [nn.functional.pad(own, (0, 0, k, 0))[:, :-k] @ self.window[k - 1] for k in (1, 2)]
        cond = torch.cat([own, *before], dim=-1)
        real = (ids > VOCABULARY["<end>"]).float()[..., None]
        pooled = (cond * real).sum(1) / real.sum(1).clamp_min(1).sqrt()
        glyph = (ids >= _FIRST_GLYPH) & (ids < len(VOCABULARY))
        last = (glyph * torch.arange(1, ids.shape[1] + 1, device=device)).argmax(1)
        pooled = torch.where(glyph.any(1, keepdim=True), cond[torch.arange(len(ids), device=device), last], pooled)
        return cond.flatten(0, 1)[None] if len(pairs) > 1 else cond, pooled[:1]

    def load_sd(self, sd: dict):
        return self.load_state_dict(sd, strict=False)
