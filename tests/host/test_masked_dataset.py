"""Masks and prompts to keep with data sets from a cache: the same run as with latents from the graph."""

from dataclasses import replace

import nodes as host_nodes
import pytest
import torch

from tidetable.runtime import tiny
from tidetable.runtime.dataset import images_dataset
from tidetable.runtime.encoding import encode_dataset
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.training import train_lora
from tidetable.runtime.training_data import training_data
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_dataset_training import CONFIG, SMALL, from_graph
from tidetable.tests.host.training_runs import LORA
from tidetable.training.recipe import ObjectiveConfig


pytestmark = pytest.mark.usefixtures("output")

COUNT = 6
SETTINGS = {
    "masks": {"masked_loss": "normalized", "unmasked_weight": 0.1, "prior_weight": 0.5, "prior_on": "outside_mask"},
    "empty": {"prior_weight": 0.5},
    "prompt": {"prior_weight": 0.5, "masked_loss": "on"},
}


@pytest.fixture(scope="module")
def tools():
    return tiny.load_tiny_vae(), tiny.load_tiny_clip()


def halves(count: int = COUNT) -> torch.Tensor:
    """Every mask another share of the picture, on the latent's grid."""
    masks = torch.zeros(count, 256, 256)
    for number, mask in enumerate(masks):
        mask[:, : 64 + 16 * number] = 1
    return masks


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_and_prompts_from_the_cache_are_those_from_the_graph(name, tools):
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    with torch.inference_mode():
        data, _ = from_graph(*tools, COUNT)
        images, captions = tiny_dataset("glyphs", COUNT, 0)
        latents = host_nodes.SetLatentNoiseMask().set_mask(data.latents[0], halves())[0]
        encoded = encode_dataset(images_dataset([images], captions, [halves()])[0], *tools, f"masks-{name}", SMALL)
        prompt = {"prior_conditioning": data.positive[0]} if name == "prompt" else {}
        config = replace(CONFIG, objective=ObjectiveConfig(**SETTINGS[name], **prompt))
        before = fingerprint(model)
        expected = train_lora(model, replace(data, latents=[latents]), config, LORA)
        found = train_lora(model, training_data(None, None, None, 20, encoded), config, LORA)
    assert found.loss_map == expected.loss_map
    assert all(torch.equal(found.lora[key], expected.lora[key]) for key in expected.lora)
    assert fingerprint(model) == before


def test_what_a_dataset_lacks_is_refused_in_words(tools):
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    masks = halves()
    masks[3] = 0
    with torch.inference_mode():
        images, captions = tiny_dataset("glyphs", COUNT, 0)
        data, plain = from_graph(*tools, COUNT)
        for pictures, words, settings in (
            (plain, "none of the latents has a mask.*give the dataset's pictures masks", {"masked_loss": "on"}),
            (images_dataset([images], captions, [masks])[0], "mask of sample 4 is empty", {"masked_loss": "on"}),
            (plain, "connect a single one", {"prior_weight": 1.0, "prior_conditioning": tuple(data.positive)}),
        ):
            encoded = encode_dataset(pictures, *tools, "refused", SMALL)
            config = replace(CONFIG, objective=ObjectiveConfig(**settings))
            with pytest.raises(ValueError, match=words):
                train_lora(model, training_data(None, None, None, 20, encoded), config, LORA)
