"""The classifiers that judge samples see shape only, and can read."""

import pytest
import torch

from tidetable.training.tiny_data import DIGITS, Glyph, glyph_batch, render_glyph


judges = pytest.importorskip("devtools.judges", reason="needs scikit-learn")


def picture(**changes):
    values = {
        "character": "R", "face": "regular", "ink": ("bright", "green"), "paper": ("dark", "blue"), "brightness": "",
        "angle": 0.0, "scale": 0.7, "offset": (0.0, 0.0),
    }  # fmt: skip
    return torch.from_numpy(render_glyph(Glyph(**{**values, **changes})))


@pytest.mark.parametrize(
    "change",
    [
        {"ink": ("dark", "red"), "paper": ("bright", "white")},
        {"brightness": "very dark"},
        {"brightness": "very bright"},
    ],
)
def test_color_and_brightness_do_not_matter(change):
    plain, changed = judges.ink_maps(torch.stack([picture(), picture(**change)]))
    assert abs(plain - changed).max() < 0.15
    other = judges.ink_maps(picture(character="K")[None])[0]
    assert abs(plain - other).max() > 0.5


def test_a_picture_of_nothing_is_read_without_an_error():
    assert judges.ink_maps(torch.full((1, 3, 32, 32), 0.5)).shape == (1, judges.SIDE**2)


def test_the_glyph_judge_reads_unseen_renderings():
    judge = judges.glyph_judge(1500)
    images, _, glyphs = glyph_batch(150, 123_456)
    assert judges.accuracy(judge, images, [glyph.character for glyph in glyphs]) > 0.97
    assert judges.accuracy(judge, images, ["A"] * 150) < 0.2


def test_the_handwriting_judge_tells_rendered_from_written():
    judge = judges.handwriting_judge(300)
    assert judge.accuracy > 0.95
    rendered = glyph_batch(60, 99, DIGITS)[0]
    assert judges.accuracy(judge, rendered, ["rendered"] * 60) > 0.95
