"""From a folder to a trained LoRA, through the nodes' own functions, on the embedded models."""

from dataclasses import replace

import nodes as host_nodes
import pytest
import torch

from tidetable.runtime import tiny
from tidetable.runtime.dataset import images_dataset
from tidetable.runtime.encoded import EncodedSamples
from tidetable.runtime.encoding import encode_dataset
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import train_lora
from tidetable.runtime.training_data import TrainingData, training_data
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_tiny import encode
from tidetable.tests.host.test_training_run import cancelled, equal, run_folders, train
from tidetable.tests.host.training_runs import LORA
from tidetable.training.config import TrainConfig
from tidetable.training.dataset.buckets import BucketConfig
from tidetable.training.dataset.captions import CaptionConfig


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=5, batch_size=2, warmup_steps=1, seed=3, caption_dropout=0.3, validate_every=2)
SMALL = BucketConfig(resolution=256, step=64)


@pytest.fixture(params=["unet-v", "mmdit-flow"])
def model(request):
    return inference_copy(tiny.load_tiny_model(request.param))


@pytest.fixture(scope="module")
def tools():
    return tiny.load_tiny_vae(), tiny.load_tiny_clip()


def from_graph(vae, clip, count):
    """What VAE Encode and CLIP Text Encode give, and the same pictures as a data set."""
    images, captions = tiny_dataset("glyphs", count, 0)
    latents = host_nodes.VAEEncode().encode(vae, images)[0]
    data = TrainingData([latents], [encode(clip, text) for text in captions], encode(clip, ""), 20)
    return data, images_dataset([images], captions)[0]


def test_training_from_the_cache_is_training_from_the_graph(model, tools):
    """Same pictures and captions: the same losses and the same LoRA, bit for bit."""
    with torch.inference_mode():
        data, pictures = from_graph(*tools, 10)
        encoded = encode_dataset(pictures, *tools, "parity", SMALL)
        before = fingerprint(model)
        expected = train_lora(model, data, CONFIG, LORA)
        found = train_lora(model, training_data(None, None, None, 20, encoded), CONFIG, LORA)
    assert found.loss_map == expected.loss_map
    assert all(torch.equal(found.lora[key], expected.lora[key]) for key in expected.lora)
    assert fingerprint(model) == before


def test_samples_are_read_when_they_are_asked_for(model, tools):
    with torch.inference_mode():
        _, pictures = from_graph(*tools, 4)
        encoded = encode_dataset(pictures, *tools, "lazy", SMALL)
    with training_session(model) as denoiser:
        samples = EncodedSamples(denoiser, encoded)
        reads = []
        original = samples.opened.store.read
        samples.opened.store.read = lambda key: reads.append(key) or original(key)
        dataset, _ = samples.datasets(0)
        assert len(dataset) == 4 and dataset.groups() == [[0, 1, 2, 3]] and reads == []
        assert dataset.latents[2].shape == (3, 32, 32) and len(reads) == 1


def test_nothing_or_both_connected_is_refused(model, tools):
    with torch.inference_mode():
        data, pictures = from_graph(*tools, 2)
        encoded = encode_dataset(pictures, *tools, "both", SMALL)
        with pytest.raises(ValueError, match="nothing to train on"):
            train_lora(model, training_data(None, [None], None, 0), CONFIG, LORA)
        with pytest.raises(ValueError, match="belong together"):
            training_data(data.latents, None, None, 0)
        with pytest.raises(ValueError, match="both a dataset and"):
            training_data(data.latents, data.positive, None, 0, encoded)


def test_variants_and_flips_are_rows_of_an_epoch_and_held_out_pictures_are_not_trained_on(model, tools):
    with torch.inference_mode():
        _, pictures = from_graph(*tools, 10)
        pictures = replace(
            pictures, entries=tuple(replace(e, caption=replace(e.caption, tags="a, b, c, d")) for e in pictures.entries)
        )
        captions = CaptionConfig(variants=3, shuffle_tags=True, tag_dropout=0.5, trigger="sks")
        encoded = encode_dataset(pictures, *tools, "variants", replace(SMALL, flip=True), captions)
    assert {len(picture.texts) for picture in encoded.pictures} == {3}
    assert {len(picture.latents) for picture in encoded.pictures} == {2}
    with training_session(model) as denoiser:
        dataset, held = EncodedSamples(denoiser, encoded).datasets(20)
        assert len(dataset) == 8 * 3 * 2 and held is not None and len(held) == 2
        trained = [dataset.latents[i] for i in range(len(dataset))]
        for latent in held.latents:
            assert not any(torch.equal(latent, other) or torch.equal(latent.flip(-1), other) for other in trained)
        assert sum(torch.equal(trained[0], other.flip(-1)) for other in trained) >= 3


def test_a_cancelled_run_on_a_cache_goes_on_bit_for_bit_and_other_data_is_another_run(model, tools, monkeypatch):
    config = replace(CONFIG, steps=6, validate_every=0)
    with torch.inference_mode():
        _, pictures = from_graph(*tools, 6)
        encoded = encode_dataset(pictures, *tools, "resume", SMALL, CaptionConfig(trigger="sks"))
        other = encode_dataset(pictures, *tools, "resume", SMALL)
    data = training_data(None, None, None, 20, encoded)
    with torch.inference_mode():
        complete = train_lora(model, data, config, LORA)
    cancelled(model, data, 3, monkeypatch, config)
    assert equal(train(model, data, config), complete)
    assert len(run_folders()) == 1
    train(model, training_data(None, None, None, 20, other), config)
    assert len(run_folders()) == 2
