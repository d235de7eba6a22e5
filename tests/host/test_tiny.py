"""The embedded models behave like any checkpoint: ComfyUI's own nodes work on them."""

import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_model_advanced as advanced
import nodes as host_nodes
import pytest
import torch

from tidetable.runtime import tiny
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.tiny_text import TOKENS, VOCABULARY, TinyTokenizer, token_ids


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return {name: tiny.load_tiny(name) for name in tiny.TINY_MODELS}


def encode(clip, text):
    return host_nodes.CLIPTextEncode().encode(clip, text)[0]


def sample(model, clip, seed=0, steps=4, latent=None, denoise=1.0, sampler="euler", scheduler="simple"):
    with torch.inference_mode():
        latent = latent or host_nodes.EmptyLatentImage().generate(256, 256, 2)[0]
        positive, negative = encode(clip, "a bright green letter K on a dark blue background"), encode(clip, "")
        return host_nodes.KSampler().sample(
            model, seed, steps, 3.0, sampler, scheduler, positive, negative, latent, denoise
        )[0]["samples"]


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_prompt_to_picture_through_stock_nodes(loaded, name):
    model, clip, vae = loaded[name]
    samples = sample(model, clip)
    assert samples.shape == (2, 3, 32, 32) and torch.isfinite(samples).all()
    with torch.inference_mode():
        image = host_nodes.VAEDecode().decode(vae, {"samples": samples})[0]
    assert image.shape == (2, 256, 256, 3) and image.min() >= 0 and image.max() <= 1
    assert 0.05 < image.std() < 0.5


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_picture_to_picture_and_inpainting(loaded, name):
    model, clip, vae = loaded[name]
    with torch.inference_mode():
        images, _ = tiny_dataset("glyphs", 2, 0)
        latent = host_nodes.VAEEncode().encode(vae, images)[0]
        mask = torch.zeros(1, 256, 256)
        mask[:, :, 128:] = 1
        masked = host_nodes.SetLatentNoiseMask().set_mask(latent, mask)[0]
    out = sample(model, clip, latent=masked, denoise=0.7)
    kept = slice(None), slice(None), slice(None), slice(0, 14)
    assert torch.allclose(out[kept], latent["samples"][kept], atol=1e-4)
    assert not torch.allclose(out, latent["samples"], atol=0.05)


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_advanced_sampling(loaded, name):
    model, clip, _ = loaded[name]
    with torch.inference_mode():
        sigmas = custom_sampler.BasicScheduler.execute(model, "simple", 4, 1.0)[0]
        guider = custom_sampler.CFGGuider.execute(model, encode(clip, "a digit 5"), encode(clip, ""), 2.0)[0]
        latent = host_nodes.EmptyLatentImage().generate(256, 256, 1)[0]
        noise, sampler = custom_sampler.RandomNoise.execute(1)[0], custom_sampler.KSamplerSelect.execute("dpmpp_2m")[0]
        out = custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)
    assert out[0]["samples"].shape == (1, 3, 32, 32) and torch.isfinite(out[1]["samples"]).all()


def test_core_model_sampling_nodes(loaded):
    unet, clip, _ = loaded["unet-v"]
    patched = [
        advanced.ModelSamplingDiscrete().patch(unet, "v_prediction", True)[0],
        advanced.RescaleCFG().patch(unet, 0.7)[0] if hasattr(advanced.RescaleCFG, "patch") else unet,
        advanced.ModelSamplingSD3().patch(loaded["mmdit-flow"][0], 3.0)[0],
    ]
    for model in patched:
        assert torch.isfinite(sample(model, clip)).all()


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_the_reload_factory_gives_an_equal_second_model(loaded, name):
    model = loaded[name][0]
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not model.model
    ours, theirs = model.model.diffusion_model.state_dict(), again.model.diffusion_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_vae_is_an_exact_resampling(loaded):
    vae = loaded["unet-v"][2]
    with torch.inference_mode():
        images, _ = tiny_dataset("glyphs", 3, 0)
        latent = vae.encode(images)
        assert latent.shape == (3, 3, 32, 32) and latent.min() >= -1 and latent.max() <= 1
        assert torch.allclose(vae.decode(latent).float(), images, atol=1e-5)


def test_prompt_weights_change_the_conditioning_and_a_glyph_is_not_an_article(loaded):
    clip = loaded["unet-v"][1]
    plain, weighted = encode(clip, "a green letter K"), encode(clip, "a (green:1.5) letter K")
    assert plain[0][0].shape == weighted[0][0].shape == (1, TOKENS, 128)
    assert not torch.equal(plain[0][0], weighted[0][0])
    assert token_ids("a letter a") == [VOCABULARY["a"], VOCABULARY["letter"], VOCABULARY["glyph:A"]]
    assert token_ids("letter A") == token_ids("letter a")


def test_unknown_words_have_stable_vectors_of_their_own():
    first, second = token_ids("zebra xylophone")
    assert first != second and min(first, second) >= len(VOCABULARY)
    assert token_ids("zebra") == [first]


@pytest.mark.parametrize("text", ["", "x " * 5000, "((((", "😀" * 200, "(a:nan)"])
def test_any_text_becomes_one_shape(text):
    assert len(TinyTokenizer().tokenize_with_weights(text)["words"][0]) == TOKENS


@pytest.mark.parametrize(("which", "count"), [("glyphs", 0), ("glyphs", 10**9), ("nothing", 4)])
def test_a_data_set_that_does_not_exist_is_refused(which, count):
    with pytest.raises(ValueError, match=r"count is|there is no data set 'nothing'"):
        tiny_dataset(which, count, 0)


def test_an_unknown_model_is_refused_with_the_names_there_are():
    with pytest.raises(
        ValueError, match="no embedded model 'sdxl': choose one of unet-eps, unet-v, mmdit-flow, unet-graft"
    ):
        tiny.load_tiny("sdxl")


def test_time_reaches_every_block():
    """GroupNorm over as many groups as channels would cancel an additive time embedding."""
    model = tiny.build_patcher("unet-v").model.diffusion_model.requires_grad_(True)
    x, context = torch.randn(2, 3, 32, 32), torch.randn(2, TOKENS, 128)
    model(x, torch.tensor([10.0, 900.0]), context=context, y=torch.randn(2, 128)).square().mean().backward()
    norms = [p.grad.norm() for name, p in model.named_parameters() if "emb_layers.1.weight" in name]
    assert len(norms) > 5 and min(norms) > 1e-3 * max(norms)
