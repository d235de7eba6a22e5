"""The data set nodes as ComfyUI calls them, and what a model is told of each picture."""

import os
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from PIL import Image

from tidetable.nodes import dataset as nodes
from tidetable.runtime import tiny
from tidetable.runtime.dataset import folder_dataset, folder_state, images_dataset, resolve_folder
from tidetable.runtime.encoded import SIZES, EncodedSamples
from tidetable.runtime.encoding import encode_dataset
from tidetable.runtime.trainable import training_session
from tidetable.tests.host.dataset_folders import write_glyphs
from tidetable.tests.host.model_zoo import zoo
from tidetable.training.dataset.buckets import BucketConfig
from tidetable.training.dataset.captions import CaptionConfig
from tidetable.training.dataset.encoded import samples_of
from tidetable.training.dataset.store import Store


SMALL = BucketConfig(resolution=64, step=32, max_upscale=1.5)


@pytest.fixture(scope="module")
def tools():
    return tiny.load_tiny_vae(), tiny.load_tiny_clip()


@pytest.fixture
def folders(output, monkeypatch):
    """Input and output folders of this test."""
    monkeypatch.setattr(folder_paths, "input_directory", str(output / "input"))
    (output / "input").mkdir()
    return output


def encode(pictures, tools, buckets=SMALL, captions=None):
    with torch.inference_mode():
        return encode_dataset(pictures, *tools, "cache", buckets, captions)


def test_folder_to_samples_through_the_nodes(folders, tools, monkeypatch):
    write_glyphs(folders / "input" / "3_cats", 4)
    with torch.inference_mode():
        pictures, report = nodes.DatasetFolder.execute("3_cats", "").args
        captions = nodes.CaptionVariations.execute(variants=2, trigger="sks").args[0]
        widgets = {e.id: e.default for e in nodes.EncodeDataset.GET_SCHEMA().inputs if hasattr(e, "default")}
        chosen = {**widgets, "resolution": 64, "bucket_step": 32, "captions": captions}
        monkeypatch.setattr(nodes.EncodeDataset, "hidden", SimpleNamespace(unique_id=None), raising=False)
        encoded, text = nodes.EncodeDataset.execute(pictures, *tools, **chosen).args
    assert "4 pictures" in report and "64x64 (4)" in text
    assert len(encoded.pictures) == 4 and len(samples_of(encoded.pictures)) == 12


def test_a_change_in_the_folder_runs_the_node_again(folders):
    paths = write_glyphs(folders / "input" / "data", 2)
    before = nodes.DatasetFolder.fingerprint_inputs("data", "")
    assert nodes.DatasetFolder.fingerprint_inputs("data", "") == before
    paths[0].with_suffix(".txt").write_text("something else")
    assert nodes.DatasetFolder.fingerprint_inputs("data", "") != before
    assert "outside the folders" in folder_state("/etc"), "an error is left to the node itself"


@pytest.mark.parametrize("name", ["../../secret", "/etc", "data/../../../secret", "~", "/"])
def test_folders_outside_are_refused_with_the_way_out(folders, name):
    with pytest.raises(ValueError, match="is outside the folders that may be read.*extra_model_paths.yaml"):
        resolve_folder(name)


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_no_folder_is_refused(folders, name):
    with pytest.raises(ValueError, match="the folder is empty"):
        resolve_folder(name)


def test_folders_inside_and_listed_ones_are_read(folders, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert resolve_folder("data") == resolve_folder('"data"') == folders / "input" / "data"
    assert resolve_folder(str(folders / "out")) == folders / "out"
    with pytest.raises(ValueError, match="is outside"):
        resolve_folder(str(elsewhere / "x"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", ([str(elsewhere)], set()))
    assert resolve_folder(str(elsewhere / "x")) == elsewhere / "x"


@pytest.mark.skipif(os.name != "posix", reason="links need no rights here")
def test_a_linked_folder_under_input_is_read(folders, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_glyphs(elsewhere, 2)
    os.symlink(elsewhere, folders / "input" / "link")
    assert len(folder_dataset("link")[0].entries) == 2


def test_regularization_pictures_fill_up_to_the_others_and_have_no_trigger(folders, tools):
    write_glyphs(folders / "input" / "own" / "5_a", 3)
    write_glyphs(folders / "input" / "reg", 2, seed=9)
    pictures, report = folder_dataset("own", "reg")
    assert "5 pictures, 2 of them for regularization; 15 with repeats" in report
    encoded = encode(pictures, tools, captions=CaptionConfig(trigger="sks"))
    rows = samples_of(encoded.pictures)
    others = [row for row in rows if encoded.pictures[row.picture].regularization]
    assert len(others) == 15 == len(rows) - len(others)
    assert {row.picture for row in others} == {3, 4}
    same_text = encode(folder_dataset("reg")[0], tools)
    assert [p.texts for p in encoded.pictures[3:]] == [p.texts for p in same_text.pictures]


def test_sdxl_is_told_the_size_and_cut_of_each_picture(folders, tools):
    """The conditions of a sample are those of ComfyUI's own text node for SDXL with the picture's numbers."""
    write_glyphs(folders / "input" / "data", 1, size=(200, 96))
    encoded = encode(folder_dataset("data")[0], tools, BucketConfig(resolution=64, step=32, flip=True, max_aspect=1.0))
    store = Store(encoded.folder)
    infos = [store.places[key].info for key in encoded.pictures[0].latents]
    assert [(info["width"], info["height"]) for info in infos] == [(200, 96)] * 2
    assert [(info["target_width"], info["target_height"]) for info in infos] == [(64, 64)] * 2
    assert infos[0]["crop_w"] + infos[1]["crop_w"] == round(200 * 64 / 96) - 64 and infos[0]["crop_w"] > 30
    model = zoo("sdxl")
    real = model.model
    with training_session(model) as denoiser:
        samples = EncodedSamples(denoiser, encoded)
        told = []
        denoiser.condition = lambda conditioning, latent: told.append(conditioning[0][1])
        denoiser.latent = lambda sample: sample
        dataset, _ = samples.datasets(0)
        dataset.conditions[0], dataset.empties[1]
    for options, info in zip(told, infos, strict=True):
        sizes = {name: options[name] for name in SIZES}
        assert sizes == {name: info[name] for name in SIZES}
        adm = real.encode_adm(pooled_output=torch.zeros(1, 8), device=torch.device("cpu"), **sizes)
        order = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        expected = torch.cat([real.embedder(torch.tensor([float(info[name])])) for name in order]).flatten()
        assert torch.equal(adm[0, -6 * 256 :], expected)


def test_masks_go_through_the_same_cut_and_mirror_as_their_picture(folders, tools):
    """A mask that is the picture's own brightness comes out as the latent's: both are averages of the same pixels."""
    folder = folders / "input" / "data"
    (path,) = write_glyphs(folder, 1, size=(160, 64))
    gray = Image.open(path).convert("L")
    gray.convert("RGB").save(path)
    gray.save(folder / "picture_000.mask.png")
    encoded = encode(folder_dataset("data")[0], tools, BucketConfig(resolution=64, step=32, max_aspect=1.0, flip=True))
    store = Store(encoded.folder)
    for key in encoded.pictures[0].latents:
        record = store.read(key)
        assert record["mask"].shape == (1, 8, 8)
        assert torch.allclose(record["mask"][0], (record["latent"][0] + 1) / 2, atol=1e-5)
    Image.new("L", (160, 64), 255).save(folder / "picture_000.mask.png")
    again = encode(folder_dataset("data")[0], tools, BucketConfig(resolution=64, step=32, max_aspect=1.0, flip=True))
    assert again.pictures[0].latents != encoded.pictures[0].latents, "another mask is another sample"


def test_a_damaged_mask_is_named_and_the_picture_used(folders, tools):
    folder = folders / "input" / "data"
    write_glyphs(folder, 2)
    (folder / "picture_001.mask.png").write_bytes(b"no")
    encoded = encode(folder_dataset("data")[0], tools)
    assert len(encoded.pictures) == 2 and "picture_001.png: its mask is not a whole picture" in encoded.report


def test_images_of_the_graph_pair_with_captions_and_masks():
    batch, single = torch.rand(2, 64, 64, 3), torch.rand(1, 32, 96, 4)
    pictures, _ = images_dataset([batch, single], ["a", "b", "c"], [torch.rand(3, 64, 64)], repeats=2)
    assert [entry.caption.tags for entry in pictures.entries] == ["a", "b", "c"]
    assert [entry.repeats for entry in pictures.entries] == [2] * 3
    assert pictures.entries[2].source.shape == (32, 96, 3) and pictures.entries[2].mask.shape == (64, 64)
    assert {entry.caption.tags for entry in images_dataset([batch], ["one"])[0].entries} == {"one"}
    with pytest.raises(ValueError, match="3 images but 2 captions"):
        images_dataset([batch, single], ["a", "b"])
    with pytest.raises(ValueError, match="2 images but 3 masks"):
        images_dataset([batch], ["a"], [torch.rand(3, 8, 8)])
    with pytest.raises(ValueError, match="there are no images"):
        images_dataset([torch.rand(0, 8, 8, 3)], [])


def test_a_folder_is_trained_on_from_a_queued_prompt(client, comfy_server, object_info):
    """Folder → cache → LoRA file on a real server; the same again encodes nothing, a new file is noticed."""
    folder = next(comfy_server.base_directory.rglob("input")) / "queued_pictures"
    write_glyphs(folder, 6, size=(256, 256))

    def node(kind, /, **inputs):
        specs = {**object_info[kind]["input"].get("required", {}), **object_info[kind]["input"].get("optional", {})}
        defaults = {key: spec[1]["default"] for key, spec in specs.items() if len(spec) > 1 and "default" in spec[1]}
        combos = {key: spec[0][0] for key, spec in specs.items() if isinstance(spec[0], list) and spec[0]}
        return {"class_type": kind, "inputs": {**combos, **defaults, **inputs}}

    prompt = {
        "1": node("Tidetable_LoadTinyModel", name="unet-v"),
        "2": node("Tidetable_DatasetFolder", folder="queued_pictures"),
        "3": node("Tidetable_CaptionVariations", trigger="sks"),
        "4": node(
            "Tidetable_EncodeDataset", dataset=["2", 0], vae=["1", 2], clip=["1", 1], captions=["3", 0],
            cache_name="queued", resolution=256,
        ),
        "5": node("Tidetable_TrainLoRA", model=["1", 0], dataset=["4", 0], steps=4, batch_size=2, rank=2),
        "6": node("Tidetable_SaveLoRA", lora=["5", 1], filename_prefix="tests/dataset"),
        "7": node("PreviewAny", source=["4", 1]),
    }  # fmt: skip
    done = client.run(prompt)
    assert done.outputs["6"]["text"][0].startswith("tests/dataset")
    assert "encoded now: 6 latents" in done.outputs["7"]["text"][0]
    write_glyphs(folder / "more", 2, seed=4, size=(256, 256))
    again = client.run(prompt)
    assert "encoded now: 2 latents" in again.outputs["7"]["text"][0]
    assert "6 latents were in the cache" in again.outputs["7"]["text"][0]
