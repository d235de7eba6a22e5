"""What a folder is read as: captions, repeats, masks, links, encodings."""

import os

import pytest

from tidetable.training.dataset.captions import Caption
from tidetable.training.dataset.scan import scan_folder, state_of_folder


def make(folder, *names, content=b"x"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def by_name(folder, **kwargs):
    found = scan_folder(folder, **kwargs)
    return {entry.name: entry for entry in found.entries}, found.report


def test_pictures_are_found_in_subfolders_and_texts_are_not_pictures(tmp_path):
    make(tmp_path, "b.PNG", "a.jpg", "deep/er/c.webp", "notes.txt", "d.json", ".hidden.png", ".git/e.png")
    found, _ = by_name(tmp_path)
    assert list(found) == ["a.jpg", "b.PNG", "deep/er/c.webp"]


def test_captions_come_from_the_files_beside(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.caption").write_text("A cat.\n")
    (tmp_path / "a.txt").write_text("cat,\nanimal")
    (tmp_path / "b.json").write_text('{"caption": "B.", "tags": ["x", "y"]}')
    (tmp_path / "c.json").write_text('{"caption": ')
    found, report = by_name(tmp_path)
    assert found["a.png"].caption == Caption("A cat.", "cat, animal")
    assert found["b.png"].caption == Caption("B.", "x, y")
    assert found["c.png"].caption == found["d.png"].caption == Caption()
    assert any(name == "c.json" and "is not JSON" in text for name, text in report.notes)
    assert ("d.png", "has no caption") in report.notes


def test_a_folder_named_with_a_number_repeats_and_names_its_pictures(tmp_path):
    make(tmp_path, "10_red_cat/a.png", "10_red_cat/sub/b.png", "0_none/c.png", "x/d.png", "99999_y/e.png")
    (tmp_path / "10_red_cat" / "a.txt").write_text("own")
    found, report = by_name(tmp_path)
    assert found["10_red_cat/a.png"].repeats == found["10_red_cat/sub/b.png"].repeats == 10
    assert found["10_red_cat/a.png"].caption.tags == "own"
    assert found["10_red_cat/sub/b.png"].caption.tags == "red cat"
    assert found["x/d.png"].repeats == 1 and "0_none/c.png" not in found
    assert found["99999_y/e.png"].repeats == 1 and report.notes


def test_a_root_named_with_a_number_counts_too(tmp_path):
    make(tmp_path, "3_dog/a.png")
    found, _ = by_name(tmp_path / "3_dog")
    assert found["a.png"].repeats == 3 and found["a.png"].caption.tags == "dog"


def test_masks_belong_to_their_picture_and_are_no_pictures(tmp_path):
    make(tmp_path, "a.jpg", "b.png", "c.png", "a.mask.png", "b-masklabel.png", "masks/c.png", "lost.mask.png", "d.png")
    found, report = by_name(tmp_path)
    assert {name: entry.mask and entry.mask.name for name, entry in found.items()} == {
        "a.jpg": "a.mask.png", "b.png": "b-masklabel.png", "c.png": "c.png", "d.png": None,
    }  # fmt: skip
    assert ("lost.mask.png", "is a mask without a picture") in report.skipped


@pytest.mark.parametrize(
    ("data", "text", "reported"),
    [
        ("über".encode(), "über", False),
        ("über".encode("utf-8-sig"), "über", False),
        ("über".encode("utf-16"), "über", False),
        ("über".encode("cp1252"), "über", True),
        (bytes(range(128, 256)), None, True),
    ],
)
def test_captions_in_other_encodings_are_read_and_named(tmp_path, data, text, reported):
    make(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    found, report = by_name(tmp_path)
    assert text is None or found["a.png"].caption.tags == text
    assert any(name == "a.txt" and "not UTF-8" in note for name, note in report.notes) == reported


def test_a_long_caption_is_cut_and_named(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("word " * 10_000)
    found, report = by_name(tmp_path)
    assert len(found["a.png"].caption.tags.split()) == 1000
    assert ("a.png", "its caption has 10000 words: cut") in report.notes


@pytest.mark.skipif(os.name != "posix", reason="links need no rights here")
def test_links_are_followed_once_and_loops_end(tmp_path):
    make(tmp_path / "data", "a.png", "deep/b.png")
    make(tmp_path / "other", "c.png")
    os.symlink(tmp_path / "data", tmp_path / "data" / "deep" / "back")
    os.symlink(tmp_path / "other", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data" / "self", tmp_path / "data" / "self")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "data" / "dangling.png")
    found, report = by_name(tmp_path / "data")
    assert list(found) == ["a.png", "dangling.png", "deep/b.png", "link/c.png"], "the dangling one fails when opened"
    assert ("deep/back", "is a link to a folder that it is in") in report.skipped


def test_no_pictures_and_no_folder_say_so(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        scan_folder(tmp_path / "missing")
    make(tmp_path, "a.txt")
    with pytest.raises(ValueError, match="there are no pictures in"):
        scan_folder(tmp_path)


def test_the_state_of_a_folder_changes_with_every_file(tmp_path):
    make(tmp_path, "a.png", "b/c.png")
    states = [state_of_folder(tmp_path)]
    for name in ("b/c.txt", "b/c.png", "d.png"):
        make(tmp_path, name, content=b"other")
        states.append(state_of_folder(tmp_path))
    (tmp_path / "a.png").unlink()
    states.append(state_of_folder(tmp_path))
    assert len({str(state) for state in states}) == len(states)
