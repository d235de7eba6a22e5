"""Sigmas as text: every float32 list survives, and what is no list of numbers is named with its place."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidetable.schedules.text import LAYOUTS, format_sigmas, parse_sigmas


positive = st.floats(0.0, 2.0**100, width=32, allow_subnormal=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None)
@given(levels=st.lists(positive, min_size=2, max_size=30, unique=True))
def test_there_and_back_is_exact(layout, levels):
    sigmas = torch.tensor(sorted(levels, reverse=True), dtype=torch.float32)
    assert torch.equal(parse_sigmas(format_sigmas(sigmas, layout)).float(), sigmas)


@settings(deadline=None)
@given(bits=st.lists(st.integers(0x00800000, 0x7F7FFFFF), min_size=2, max_size=200, unique=True))
def test_every_normal_float32_there_and_back(bits):
    sigmas = torch.from_numpy(numpy.array(sorted(bits, reverse=True), dtype=numpy.uint32).view(numpy.float32).copy())
    assert torch.equal(parse_sigmas(format_sigmas(sigmas)).float(), sigmas)


def test_it_reads_as_people_write():
    assert format_sigmas(torch.tensor([14.6146, 1.0, 0.1, 0.0])) == "14.6146, 1.0, 0.1, 0.0"
    assert format_sigmas(torch.tensor([1.0, 0.5]), "lines") == "1.0\n0.5"


@pytest.mark.parametrize(
    "text",
    [
        "1, .75, 5e-1, 0",
        "1 .75 .5 0",
        "1\n0.75\n0.5\n0.\n",
        "[1.0, 0.75, 0.5, 0.0]",
        "(1;0.75;+0.5;0)",
        "# mine\n1, 0.75 # upper\n0.5,,0,",
        "\t1.000 0.750\r\n0.500 0e9 ",
    ],
)
def test_separators(text):
    assert parse_sigmas(text).tolist() == [1.0, 0.75, 0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text has no numbers"),
        (" ,;\n# only a comment", "the text has no numbers"),
        ("1.0", "the text's sigmas has 1 value"),
        ("1.0, 0.5x, 0", r"'0.5x' is not a number \(number 2, line 1, character 6\)"),
        ("1.0,\n  0.5\n\n  half", r"'half' is not a number \(number 3, line 4, character 3\)"),
        ("1, nan, 0", "'nan' is not a number"),
        ("inf, 0", "'inf' is not a number"),
        ("1_0, 0", "'1_0' is not a number"),
        ("٣, 0", "'٣' is not a number"),
        ("0x10, 0", "'0x10' is not a number"),
        ("1/2, 0", "'1/2' is not a number"),
        ("__import__('os').system('x')", "'__import__' is not a number"),
        ("1e999, 0", r"sigmas\[0\] is inf"),
        ("1, 0, -1", r"sigmas\[2\] is -1"),
        ("0, 0.5, 1", r"sigmas\[0\] = 0 is followed by 0.5"),
        ("1, 0.5, 0.5, 0", r"sigmas\[1\] = 0.5 is followed by 0.5"),
        ("0,5 0,25", r"sigmas\[0\] = 0 is followed by 5"),
        ("x" * 10_000, "'xxxx"),
        (" ".join(str(n) for n in range(20_000, 0, -1)), "more than 10001 numbers"),
    ],
)
def test_what_is_no_schedule_is_named(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_sigmas(text)
    assert len(str(caught.value)) < 300


def test_an_unknown_layout_is_named():
    with pytest.raises(ValueError, match="unknown layout 'table'; use one of line, lines"):
        format_sigmas(torch.tensor([1.0, 0.0]), "table")
