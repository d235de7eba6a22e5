"""Captions follow from (seed, variant, name), and each way of varying does what it says."""

import random

import pytest

from tidetable.training.dataset.captions import (
    MAX_WORDS,
    Caption,
    CaptionConfig,
    escape,
    expand,
    shorten,
    write_caption,
)


TAGS = [f"tag {letter}" for letter in "abcdefghij"]


def variants(config, caption=None, count=300):
    caption = caption or Caption(tags=", ".join(TAGS))
    return [write_caption(caption, config, "x.png", variant) for variant in range(count)]


def test_equal_arguments_give_equal_captions_and_other_arguments_others():
    config = CaptionConfig(shuffle_tags=True)
    assert variants(config) == variants(config)
    assert len(set(variants(config))) > 290
    caption = Caption(tags=", ".join(TAGS))
    assert write_caption(caption, config, "y.png", 0) != write_caption(caption, config, "x.png", 0)
    assert variants(CaptionConfig(shuffle_tags=True, seed=1)) != variants(config)


def test_shuffling_keeps_every_tag_and_the_first_ones_in_front():
    for text in variants(CaptionConfig(shuffle_tags=True, keep_tags=2)):
        tags = text.split(", ")
        assert sorted(tags) == TAGS and tags[:2] == TAGS[:2]
    places = [text.split(", ").index("tag j") for text in variants(CaptionConfig(shuffle_tags=True), count=2000)]
    assert all(120 < places.count(place) < 280 for place in range(10)), "every place is as likely"


def test_dropout_leaves_out_its_share_of_the_tags_that_are_not_kept():
    texts = [text.split(", ") for text in variants(CaptionConfig(tag_dropout=0.3, keep_tags=1), count=1000)]
    assert all(tags[0] == TAGS[0] for tags in texts)
    left = sum(len(tags) - 1 for tags in texts) / (9 * 1000)
    assert abs(left - 0.7) < 0.02
    assert all(tags == sorted(tags) for tags in texts), "without shuffling the order stays"


def test_sentences_and_tags_are_mixed_in_their_shares_and_sentences_stay_whole():
    caption = Caption("One sentence, with a comma.", "a, b, c")
    texts = variants(CaptionConfig(tag_share=0.2, shuffle_tags=True), caption, 2000)
    sentences = [text for text in texts if text == caption.sentence]
    assert abs(len(sentences) / 2000 - 0.8) < 0.03
    assert all(sorted(text.split(", ")) == ["a", "b", "c"] for text in texts if text != caption.sentence)
    assert set(variants(CaptionConfig(tag_share=0.0), caption)) == {caption.sentence}
    assert set(variants(CaptionConfig(tag_share=0.0), Caption(tags="a"))) == {"a"}, "what there is, is used"


def test_the_trigger_word_comes_once_and_not_on_regularization_pictures():
    config = CaptionConfig(trigger="sks")
    assert write_caption(Caption(tags="cat"), config, "x", 0) == "sks, cat"
    assert write_caption(Caption(tags="a sks cat"), config, "x", 0) == "a sks cat"
    assert write_caption(Caption(), config, "x", 0) == "sks"
    assert write_caption(Caption(tags="cat"), config, "x", 0, regularization=True) == "cat"


def test_wildcards_become_each_of_their_parts_and_other_braces_stay():
    found = {expand("a {big {red|blue}|small} {cat}", random.Random(k)) for k in range(100)}
    assert found == {"a big red {cat}", "a big blue {cat}", "a small {cat}"}
    assert variants(CaptionConfig(wildcards=False), Caption("{a|b}"), 3) == ["{a|b}"] * 3


@pytest.mark.parametrize(
    ("text", "escaped"), [("saber (fate)", r"saber \(fate\)"), (r"saber \(fate\)", r"saber \(fate\)"), (":)", r":\)")]
)
def test_parentheses_are_text_also_where_they_were_escaped_already(text, escaped):
    assert escape(text) == escaped and escape(escaped) == escaped


def test_only_captions_with_something_random_have_variants():
    config = CaptionConfig(variants=5, shuffle_tags=True)
    assert config.distinct(Caption(tags="a, b")) == 5 and config.distinct(Caption("A sentence.")) == 1
    assert config.distinct(Caption("A {b|c}.")) == 5 and config.distinct(Caption("A.", "b")) == 5
    assert CaptionConfig(variants=5).distinct(Caption(tags="a, b")) == 1


def test_ten_thousand_words_are_cut_and_counted():
    caption, words = shorten(Caption(tags="word " * 10_000))
    assert words == 10_000 and len(caption.tags.split()) == MAX_WORDS
    assert shorten(Caption("short")) == (Caption("short"), 1)
