"""Whatever a folder holds, through the nodes: named with its reason in the report at the end, and survived."""

import json
import os
import threading
import time
from collections import Counter
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from PIL import Image

from devtools.loading import ROOT
from tidetable.nodes import dataset as nodes
from tidetable.runtime import tiny
from tidetable.runtime.encoding import limit_chunks
from tidetable.runtime.paths import cache_folder
from tidetable.tests.host.bad_files import FINE, LEFT_OUT, NOTED, write_bad_files
from tidetable.tests.host.dataset_folders import write_glyphs
from tidetable.tests.host.test_dataset_encoding import content, equal
from tidetable.tests.host.text_models import small_clip
from tidetable.training.dataset import catalog, images
from tidetable.training.dataset.captions import Caption
from tidetable.training.dataset.encoded import samples_of
from tidetable.training.dataset.images import read_whole
from tidetable.training.dataset.store import Store
from tidetable.training.dataset.unused import DAY


pytestmark = pytest.mark.skipif(os.name != "posix", reason="links need no rights here")


@pytest.fixture
def folder(output, monkeypatch):
    """A folder below the input folder of this test."""
    monkeypatch.setattr(catalog, "RACY_NS", 0)
    monkeypatch.setattr(folder_paths, "input_directory", str(output / "input"))
    monkeypatch.setattr(nodes.EncodeDataset, "hidden", SimpleNamespace(unique_id=None), raising=False)
    (output / "input" / "data").mkdir(parents=True)
    return output / "input" / "data"


@pytest.fixture(scope="module")
def tools():
    return tiny.load_tiny_vae(), tiny.load_tiny_clip()


def run(tools, name="data", captions=None, **widgets):
    """(encoded data set, report) as a queued prompt gets them."""
    defaults = {e.id: e.default for e in nodes.EncodeDataset.GET_SCHEMA().inputs if hasattr(e, "default")}
    widgets = {**defaults, "resolution": 64, "bucket_step": 32, "captions": captions, **widgets}
    with torch.inference_mode():
        pictures = nodes.DatasetFolder.execute(name, "").args[0]
        return nodes.EncodeDataset.execute(pictures, *tools, **widgets).args


def lines(report, title):
    """name -> text of the lines below a title of the report."""
    found, inside = {}, False
    for line in report.splitlines():
        if not line.startswith("  "):
            inside = line.startswith(title)
        elif inside:
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return found


def test_every_bad_file_is_named_with_its_reason_and_the_others_are_as_ever(folder, tools):
    write_glyphs(folder / "good", 4, (64, 64))
    alone, _ = run(tools, "data/good", cache_name="alone")
    write_bad_files(folder)
    encoded, report = run(tools)
    skipped, noted = lines(report, "left out"), lines(report, "noticed")
    assert {name: reason in skipped.get(name, "") for name, reason in LEFT_OUT.items()} == dict.fromkeys(LEFT_OUT, True)
    assert {name: reason in noted.get(name, "") for name, reason in NOTED.items()} == dict.fromkeys(NOTED, True)
    assert skipped.keys() == LEFT_OUT.keys() and not {*FINE} & {*skipped, *noted}
    assert "0x" not in report and "object at" not in report, "nothing that means nothing to a person"
    used = {picture.name for picture in encoded.pictures}
    assert used.isdisjoint(LEFT_OUT) and used >= {*FINE}
    mine = content(encoded)
    assert equal(content(alone), {name.removeprefix("good/"): mine[name] for name in mine if name.startswith("good/")})
    turned, whole = (mine[name][0][0] for name in ("turned.jpg", "whole.png"))
    assert (turned - whole).abs().mean() < 0.1, "upright, it is the same picture"
    assert sum(latent.isfinite().all().item() for latents, _ in mine.values() for latent in latents) == len(used)
    again, second = run(tools)
    assert again.pictures == encoded.pictures
    assert lines(second, "left out") == skipped and lines(second, "noticed") == noted, "named again from memory"


def test_the_help_page_s_example_is_what_it_says(folder, tools):
    """Every file of the tree in the help page of Dataset Folder, and the numbers below it."""
    page = (ROOT / "web/docs/Tidetable_DatasetFolder.md").read_text(encoding="utf-8")
    tree = next(block for block in page.split("```") if block.startswith("\ninput/"))
    above, names = {}, []
    for line in tree.strip().splitlines()[1:]:
        depth, (name, _, says) = (len(line) - len(line.lstrip())) // 2, line.strip().partition("  ")
        above[depth] = name.rstrip("/")
        path = folder.parent.joinpath(*(above[k] for k in range(1, depth + 1)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            Image.new("RGB", (64, 64), (8 * len(names), 90, 90)).save(path)
        elif path.suffix:
            path.write_text(says.strip())
        names += [path.name] if path.suffix else []
    assert len(names) == 10
    with torch.inference_mode():
        pictures, report = nodes.DatasetFolder.execute("sks", "dogs").args
    found = {entry.name: entry for entry in pictures.entries}
    assert "6 pictures, 2 of them for regularization; 33 with repeats; 2 masks" in report and "left out" not in report
    assert {name: bool(entry.mask) for name, entry in found.items() if entry.repeats == 10} == {
        "10_a dog/garden.jpg": True, "10_a dog/beach.jpg": True, "10_a dog/sofa.jpg": False,
    }  # fmt: skip
    assert found["10_a dog/sofa.jpg"].caption == Caption(tags="a dog")
    assert found["3_close up/nose.png"].caption == Caption("A close photo of the nose of sks dog.")
    widgets = {e.id: e.default for e in nodes.EncodeDataset.GET_SCHEMA().inputs if hasattr(e, "default")}
    with torch.inference_mode():
        encoded = nodes.EncodeDataset.execute(
            pictures, *tools, **{**widgets, "resolution": 64, "bucket_step": 32}, captions=None
        ).args[0]
    counts = Counter(encoded.pictures[row.picture].name for row in samples_of(encoded.pictures))
    others = [count for name, count in counts.items() if name.startswith("regularization/")]
    assert sum(counts.values()) == 66 and sorted(others) == [16, 17]


def test_more_bad_files_than_a_report_has_lines_are_counted_by_reason(folder, tools):
    write_glyphs(folder, 1)
    for number in range(130):
        (folder / f"no_{number:03}.png").write_bytes(b"no" if number % 2 else b"")
        (folder / f"no_{number:03}.txt").write_text("a")
    _, report = run(tools)
    assert "left out: 130" in report and "and 30 more. In all:\n  130 times: is not a whole picture" in report
    assert len(report.splitlines()) < 120


def test_a_file_that_changes_while_it_is_read_is_named(folder, tools, monkeypatch):
    write_glyphs(folder, 3)
    busy, original = folder / "picture_001.png", type(folder).read_bytes

    def read_and_grow(self):
        data = original(self)
        if self == busy:
            self.write_bytes(data + b"x")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "read_bytes", read_and_grow)
        encoded, report = run(tools)
    assert "changes while it is read" in lines(report, "left out")["picture_001.png"]
    assert [picture.name for picture in encoded.pictures] == ["picture_000.png", "picture_002.png"]
    assert len(run(tools)[0].pictures) == 3, "queued again when it is done"


def test_a_file_that_changes_between_looking_and_encoding_is_named(folder, tools, monkeypatch):
    paths = write_glyphs(folder, 3)
    run(tools)
    reads = []

    def change(path):
        reads.append(path)
        data, state = read_whole(path)
        return (data + b"x" if path == paths[1] else data), state

    monkeypatch.setattr(catalog, "read_whole", change)
    _, report = run(tools, resolution=32)
    assert "has changed while the data set was encoded" in lines(report, "left out")["picture_001.png"]
    assert len(reads) == 3 and images.read_whole is read_whole


@pytest.mark.parametrize("name", ["../..", "/etc", "data/../../../x"])
def test_a_path_outside_is_refused(folder, tools, name):
    with pytest.raises(ValueError, match="is outside the folders that may be read"):
        run(tools, name)


def test_a_folder_without_pictures_is_refused_and_says_what_it_has_seen(folder, tools):
    (folder / "a.txt").write_text("a")
    os.symlink(folder, folder / "loop")
    with pytest.raises(ValueError, match=r"there are no pictures in .*\.png(.|\n)*loop: is a link to a folder"):
        run(tools)
    with pytest.raises(ValueError, match="there is no folder"):
        run(tools, "missing")


def test_a_cache_from_another_vae_is_not_used_and_says_how_much_was(folder, tools):
    write_glyphs(folder, 4)
    _, first = run(tools)
    other = tiny.load_tiny_vae()
    with torch.inference_mode(False), torch.no_grad():
        other.first_stage_model.anchor.data += 1
    _, report = run((other, tools[1]))
    assert "encoded now: 4 latents and 0 captions" in report and "0 latents were in the cache" in report
    assert "encoded now: 4 latents" in first and "4 latents were in the cache" in run(tools)[1]


def test_two_encodes_into_one_cache_at_once_through_the_node(folder):
    write_bad_files(folder)
    write_glyphs(folder / "good", 12, (64, 64))
    found, failures = [], []

    def work():
        try:
            found.append(run((tiny.load_tiny_vae(), tiny.load_tiny_clip()), remove_unused=30))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and found[0][0].pictures == found[1][0].pictures
    assert lines(found[0][1], "left out") == lines(found[1][1], "left out")
    store = Store(cache_folder("dataset"))
    assert all(store.is_whole(key) for key in store.places) and not list(store.folder.glob("*.tmp"))


def test_unused_files_are_reported_and_deleted_on_request_only(folder, tools):
    """Data set b is not used for 40 days, a is: with another setting, what a had before goes when it is that old."""
    write_glyphs(folder / "a", 3)
    write_glyphs(folder / "b", 3, seed=1)
    kept, _ = run(tools, "data/a")
    old, _ = run(tools, "data/b")
    cache = cache_folder("dataset")
    for path in cache.iterdir():
        os.utime(path, (time.time() - 40 * DAY,) * 2)
    before = {path.name for path in cache.iterdir()}
    again, report = run(tools, "data/a")
    assert "of it 3 files of" in report and "that no data set used for 30 days: remove_unused deletes" in report
    assert before <= {path.name for path in cache.iterdir()} and again.pictures == kept.pictures
    _, report = run(tools, "data/a", remove_unused=60)
    assert "removed from the cache: 0 files" in report and equal(content(old), content(run(tools, "data/b")[0]))
    (own,) = [path for path in cache.glob("used-*") if old.pictures[0].latents[0] in json.loads(path.read_text())]
    os.utime(own, (time.time() - 40 * DAY,) * 2)
    _, report = run(tools, "data/a", remove_unused=30)
    assert "removed from the cache: 3 files" in report
    assert equal(content(kept), content(run(tools, "data/a")[0])) and "encoded now: 0" in run(tools, "data/a")[1]
    assert not {key for picture in old.pictures for key in picture.latents} & {*Store(cache).places}
    assert "encoded now: 3 latents" in run(tools, "data/b")[1], "and comes again when it is asked for"


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_only_clip_has_chunks(folder, tools, family):
    """400 words: CLIP's rows are cut to two chunks and named, T5's one row stays as it is."""
    clip = small_clip(family)
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    long = " ".join(f"cat {k}" for k in range(200))
    (folder / "a.txt").write_text(long)
    captions = nodes.CaptionVariations.execute(max_chunks=2).args[0]
    encoded, report = run((tools[0], clip), captions=captions)
    tokens = clip.tokenize(long)
    chunks = len(tokens["l"])
    assert chunks > 4 and f"its caption has {chunks} chunks of 75 tokens: 2 kept" in lines(report, "noticed")["a.png"]
    cut, _ = limit_chunks(tokens, 2)
    assert cut["l"] == tokens["l"][:2] and cut.get("t5xxl") == tokens.get("t5xxl")
    cross = Store(encoded.folder).read(encoded.pictures[0].texts[0])[0][0]
    with torch.inference_mode():
        whole = clip.encode_from_tokens_scheduled(tokens)[0][0]
    if family == "flux":  # the sequence is T5's: nothing of it is lost
        assert len(tokens["t5xxl"]) == 1 and len(tokens["t5xxl"][0]) > 400 and torch.equal(cross, whole)
    else:
        assert cross.shape[1] == 2 * 77 and torch.equal(cross, whole[:, : 2 * 77])
