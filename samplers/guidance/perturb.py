"""What "worse" means: how a prediction is weakened in the rows of a batch that are to be weakened.

Three methods act inside one attention. They take the model's own `attention(q)`, whose keys and values are the model's,
and return its result, [B, N, C], weakened for the chosen rows and for the picture's tokens; all else stays the model's
own. `q` and `v` are [B, N, C] or, with their heads apart, [B, N, H, C / H]. The fourth leaves out a whole block.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


Method = Literal["pag", "seg", "shuffle", "skip"]
METHODS: tuple[Method, ...] = get_args(Method)

Attention = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Picture:
    """Where in a sequence the picture's tokens are, and their (frames, height, width) in that order."""

    tokens: slice
    grid: tuple[int, int, int]


def flagged_rows(num_rows: int, flags: Sequence[bool]) -> list[slice]:
    """The rows of the flagged chunks in a batch of `num_rows` = len(flags) · b rows that lie chunk after chunk.

    ValueError when the batch cannot consist of that many equal chunks.
    """
    size, rest = divmod(num_rows, len(flags))
    if rest:
        raise ValueError(f"a batch of {num_rows} rows cannot be {len(flags)} chunks of equal size")
    return [slice(i * size, (i + 1) * size) for i, flag in enumerate(flags) if flag]


def identity_attention(
    attention: Attention, q: Tensor, v: Tensor, rows: Sequence[slice], tokens: slice = slice(None)
) -> Tensor:
    """Attention in which the chosen tokens of the chosen rows see only themselves, so that each gets its own value.

    The perturbation of Ahn et al. 2024, arXiv:2403.17377: the identity matrix in place of softmax(q·kᵀ/√d), hence
    output = v. In joint attention `tokens` are the picture's; text tokens go on attending to everything. `attention`
    is not called where nothing of its result would be left, and its result is not written into.
    """
    values = v.flatten(2)
    every_token = tokens.indices(values.shape[1]) == (0, values.shape[1], 1)
    if every_token and sum(row.stop - row.start for row in rows) == len(values):
        return values
    output = attention(q).clone()
    for row in rows:
        output[row, tokens] = values[row, tokens]
    return output


def blurred_query_attention(
    attention: Attention, q: Tensor, rows: Sequence[slice], picture: Picture, sigma: float
) -> Tensor:
    """Attention in which the picture's queries of the chosen rows are blurred on their grid, frame by frame.

    Smoothed-energy guidance, Hong 2024, arXiv:2408.00760; `sigma` in tokens, math.inf = every query is the mean
    of its frame's. As keys and values stay, text tokens get exactly what they got before.
    """
    blurred = q.clone()
    for row in rows:
        blurred[row, picture.tokens] = blur(q[row, picture.tokens], picture.grid, sigma)
    return attention(blurred)


def shuffled_attention(
    attention: Attention, q: Tensor, rows: Sequence[slice], tokens: slice, permutation: Tensor
) -> Tensor:
    """Attention whose results for the chosen tokens of the chosen rows go to each other's places.

    Token perturbation guidance (Rajabi et al. 2025, arXiv:2506.10036) shuffles the tokens that enter a layer. What is
    done here is that for the attention alone: a permutation of the queries, keys and values of a self-attention
    permutes its result, and nothing else. Positions that were rotated into queries and keys travel with the tokens.
    """
    output = attention(q).clone()
    for row in rows:
        output[row, tokens] = output[row, tokens][:, permutation.to(output.device)]
    return output


def skipped_block(output: Tensor, kept: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """A block's `output` with the chosen rows as they came in, `kept`: the block is left out for them.

    Skip-layer guidance; for diffusion transformers from Hyung et al. 2024, arXiv:2411.18664 (residual skipping).
    """
    output = output.clone()
    for row, before in zip(rows, kept, strict=True):
        output[row] = before
    return output


def blur(x: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """`x` [B, F·H·W, ...] blurred over height and width of its (frames, height, width) grid. Its mean is preserved."""
    frames, height, width = grid
    cells = x.float().reshape(len(x), frames, height, width, -1)
    for size, equation in ((height, "ij,bfjwc->bfiwc"), (width, "ij,bfhjc->bfhic")):
        weights = blur_matrix(size, sigma).to(x.device, cells.dtype)
        cells = torch.einsum(equation, weights, cells)
    return cells.reshape(x.shape).to(x.dtype)


def blur_matrix(size: int, sigma: float) -> Tensor:
    """Gaussian blur of a line of `size` cells, mirrored at its ends, as a symmetric [size, size] matrix in float64.

    Rows and columns sum to 1. `sigma` 0 is the identity; from ten times `size` on, math.inf included, the plain mean.
    """
    if sigma >= 10.0 * size:
        return torch.full((size, size), 1.0 / size, dtype=torch.float64)
    if sigma <= 0.0:
        return torch.eye(size, dtype=torch.float64)
    places = torch.arange(size, dtype=torch.float64)
    reach = math.ceil(10.0 * sigma / (2 * size)) + 1
    mirrors = 2 * size * torch.arange(-reach, reach + 1, dtype=torch.float64)
    offsets = torch.stack((places[:, None] - places, places[:, None] + places + 1))[..., None] - mirrors
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2).sum((0, -1))
    return weights / weights.sum(1, keepdim=True)


def permutations_at(noise_level: float) -> torch.Generator:
    """A generator that draws the same permutations whenever the noise level is the same, on every machine."""
    (bits,) = struct.unpack("<q", struct.pack("<d", noise_level))
    return torch.Generator().manual_seed(bits & 0x7FFF_FFFF_FFFF_FFFF)
