"""Sigmas as text and back. Text is parsed, never evaluated."""

import re

import numpy
import torch
from torch import Tensor

from .validate import MAX_STEPS, require_choice, require_sigmas


LAYOUTS = ("line", "lines")
_COMMENT = re.compile(r"#[^\n]*")
_TOKEN = re.compile(r"[^\s,;\[\]()]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def parse_sigmas(text: str) -> Tensor:
    """Numbers between commas, semicolons, spaces, new lines or brackets, as float64 [steps + 1]; # starts a comment.

    Raises ValueError naming the first token that is not a plain decimal number and its place, and for a list that is
    no legal schedule.
    """
    plain = _COMMENT.sub(lambda comment: " " * len(comment[0]), text)
    values: list[float] = []
    for token in _TOKEN.finditer(plain):
        if not _NUMBER.fullmatch(token[0]):
            line = plain.count("\n", 0, token.start()) + 1
            column = token.start() - plain.rfind("\n", 0, token.start())
            raise ValueError(
                f"{token[0][:40]!r} is not a number (number {len(values) + 1}, line {line}, character {column}); write "
                "numbers such as 14.6, 0.5 or 1e-3, separated by commas, spaces or new lines"
            )
        values.append(float(token[0]))
        if len(values) > MAX_STEPS + 1:
            raise ValueError(f"the text has more than {MAX_STEPS + 1} numbers, the most that a schedule can have")
    if not values:
        raise ValueError("the text has no numbers; write at least two noise levels, such as 1, 0.5, 0")
    return require_sigmas(torch.tensor(values, dtype=torch.float64), "the text's sigmas")


def format_sigmas(sigmas: Tensor, layout: str = "line") -> str:
    """Each level with the fewest digits that give the same float32 again, separated by ", " or by new lines."""
    require_choice("layout", layout, LAYOUTS)
    return (", " if layout == "line" else "\n").join(map(_shortest, sigmas.float().tolist()))


def _shortest(value: float) -> str:
    text = str(numpy.float32(value))
    # Read back by way of float64 it may be rounded twice; 9 digits always do.
    return text if numpy.float32(float(text)) == numpy.float32(value) else f"{value:.9g}"
