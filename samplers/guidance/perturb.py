"""What "worse" means: how attention goes in the rows of a batch that are to be weakened.

A perturbation takes the model's own `attention(q, k, v)` and its arguments. It returns the weakened result for the
chosen rows and tokens and the model's own for all others. The result is [B, N, C]; `v` is [B, N, C] too or, with its
heads apart, [B, N, H, C / H].
"""

from collections.abc import Callable, Sequence

from torch import Tensor


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flagged_rows(num_rows: int, flags: Sequence[bool]) -> list[slice]:
    """The rows of the flagged chunks in a batch of `num_rows` = len(flags) · b rows that lie chunk after chunk.

    ValueError when the batch cannot consist of that many equal chunks.
    """
    size, rest = divmod(num_rows, len(flags))
    if rest:
        raise ValueError(f"a batch of {num_rows} rows cannot be {len(flags)} chunks of equal size")
    return [slice(i * size, (i + 1) * size) for i, flag in enumerate(flags) if flag]


def identity_attention(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[slice], tokens: slice = slice(None)
) -> Tensor:
    """Attention in which the chosen tokens of the chosen rows see only themselves, so that each gets its own value.

    The perturbation of Ahn et al. 2024, arXiv:2403.17377: the identity matrix in place of softmax(q·kᵀ/√d), hence
    output = v. In joint attention `tokens` are the picture's; text tokens go on attending to everything. `attention`
    is not called where nothing of its result would be left, and its result is not written into.
    """
    values = v.flatten(2)
    if tokens == slice(None) and sum(row.stop - row.start for row in rows) == len(values):
        return values
    output = attention(q, k, v).clone()
    for row in rows:
        output[row, tokens] = values[row, tokens]
    return output
