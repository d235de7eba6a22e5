"""The rendered pictures follow from their seed, and show what their captions say."""

import numpy as np
import pytest
import torch

from tidetable.training.tiny_data import (
    BRIGHTNESS,
    CHARACTERS,
    HUES,
    TONES,
    Glyph,
    caption,
    digit_batch,
    glyph_batch,
    render_glyph,
)


def glyph(**changes):
    values = {
        "character": "K", "face": "regular", "ink": ("bright", "green"), "paper": ("dark", "blue"), "brightness": "",
        "angle": 0.0, "scale": 0.7, "offset": (0.0, 0.0),
    }  # fmt: skip
    return Glyph(**{**values, **changes})


def test_a_caption_says_it_all():
    assert caption(glyph()) == "a bright green letter K on a dark blue background"
    assert caption(glyph(character="7", ink=("", "red"), brightness="very dark"), "handwritten") == (
        "a handwritten red digit 7 on a dark blue background, very dark"
    )


def test_pictures_follow_from_the_seed():
    first, again, other = glyph_batch(8, 5), glyph_batch(8, 5), glyph_batch(8, 6)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (8, 3, 32, 32) and first[0].dtype == torch.float32
    assert first[0].min() >= 0 and first[0].max() <= 1


@pytest.mark.parametrize("hue", HUES)
@pytest.mark.parametrize("tone", TONES)
def test_ink_and_paper_have_the_colors_they_are_called(tone, hue):
    picture = render_glyph(glyph(character="I", face="bold", ink=(tone, hue), paper=("dark", "white"), scale=0.75))
    expected = np.asarray(HUES[hue]) * TONES[tone]
    assert np.allclose(picture[:, 16, 16], expected, atol=0.02)
    assert np.allclose(picture[:, 0, 0], np.full(3, TONES["dark"]), atol=1e-6)


def test_every_character_is_drawn_and_no_two_look_alike():
    pictures = np.stack([render_glyph(glyph(character=c)) for c in CHARACTERS]).reshape(len(CHARACTERS), -1)
    distance = np.abs(pictures[:, None] - pictures[None]).mean(-1) + np.eye(len(CHARACTERS))
    assert distance.min() > 0.005


def test_brightness_words_order_the_mean():
    means = [render_glyph(glyph(brightness=word)).mean() for word in BRIGHTNESS]
    assert means == sorted(means) and means[-1] - means[0] > 0.4


def test_handwritten_digits_are_split_without_overlap():
    pytest.importorskip("sklearn")
    train, captions, glyphs = digit_batch(30, 0, "train")
    assert train.shape == (30, 3, 32, 32) and all("handwritten" in text for text in captions)
    assert all(text.split("digit ")[1][0] == g.character for text, g in zip(captions, glyphs, strict=True))
    held_out = digit_batch(30, 0, "test")[0]
    assert not any(torch.equal(a, b) for a in train for b in held_out)
