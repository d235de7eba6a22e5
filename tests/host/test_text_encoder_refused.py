"""What Text Encoder LoRA refuses and in which words, its node, and what stands at the CLIP output without it."""

import re
from dataclasses import replace
from types import SimpleNamespace

import comfy.hooks
import pytest
import torch
from torch import nn

from devtools.errors import DevError
from tidetable.nodes.training import TrainLoRA
from tidetable.nodes.training_text import TextEncoderLoRA
from tidetable.runtime import tiny
from tidetable.runtime.text_encoder import LiveText, TextEncoder, TextEncoderConfig, text_encoder
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import train_lora
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.test_text_encoder import CONFIG, TEXT
from tidetable.tests.host.text_models import CAPTIONS, encode, small_clip, small_model, training_data
from tidetable.tests.host.training_runs import LORA
from tidetable.training.optim import build_optimizer
from tidetable.training.optimizers import OptimizerConfig, ParameterGroup


pytestmark = pytest.mark.usefixtures("output")


@pytest.fixture(scope="module")
def model():
    return small_model("sd15")


def train(model, clip, captions=CAPTIONS, text=TEXT, config=CONFIG, **settings):
    with torch.inference_mode():
        return train_lora(
            model, training_data(clip), config, LORA, text_encoder=TextEncoder(clip, captions, text), **settings
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0.*not connected, the text encoder is frozen"),
        ({"learning_rate": 1e6}, "learning_rate is 1000000"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"lora_alpha": -1.0}, "lora_alpha is -1"),
        ({"encoders": "clip_g"}, "encoders has 'clip_g', but this CLIP has clip_l:"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        text_encoder(small_clip("sd15"), CAPTIONS, **settings)


def test_the_embedded_clip_has_nothing_to_train_and_says_so():
    with pytest.raises(ValueError, match=r"\(TinyTextModel\) has no linear layer to adapt.*fixed word vectors"):
        text_encoder(tiny.load_tiny_clip(), CAPTIONS)


def test_no_clip_and_no_caption_are_refused():
    with pytest.raises(ValueError, match="the checkpoint has no text encoder"):
        text_encoder(None, CAPTIONS)
    with pytest.raises(ValueError, match="there is no caption"):
        text_encoder(small_clip("sd15"), [])


def test_t5_and_language_models_are_left_out_unless_they_are_named():
    clip = small_clip("flux")
    default, both = (TextEncoder(clip, CAPTIONS, TextEncoderConfig(encoders=e)) for e in ("", "clip_l, t5xxl"))
    assert {name.split(".")[0] for name in default.layers()} == {"clip_l"}
    assert {name.split(".")[0] for name in both.layers()} == {"clip_l", "t5xxl"}
    attention = TextEncoder(clip, CAPTIONS, TextEncoderConfig(encoders="t5xxl", targets="attention")).layers()
    assert {name.rsplit(".", 1)[1] for name in attention} == {"q", "k", "v", "o"}
    del clip.cond_stage_model.clip_l
    with pytest.raises(ValueError, match="no CLIP text model but t5xxl: name it in encoders"):
        text_encoder(clip, CAPTIONS)


def test_layers_that_the_conditioning_does_not_depend_on_get_no_adapter():
    """SDXL takes clip_l's last layer but one, and the pooled output of clip_g alone; SD1.5 takes no projection."""
    everything = replace(TEXT, targets="linear")
    for family, unused in (("sd15", r"clip_l.*projection"), ("sdxl", r"clip_l.*(layers\.2\..*|projection)")):
        encoder = TextEncoder(small_clip(family), CAPTIONS, everything).private()
        with training_session(small_model(family), 0, [encoder.clip.patcher]) as denoiser:
            trained = set(LiveText(encoder, denoiser, 0).network.layers)
        there = set(encoder.layers())
        assert there - trained == {name for name in there if re.fullmatch(unused, name)}
        assert len(trained) > 10


def test_captions_and_latents_of_different_number_are_refused(model):
    clip = small_clip("sd15")
    before = fingerprint(model), fingerprint(clip.patcher)
    with pytest.raises(ValueError, match="4 latents but 3 captions"):
        train(model, clip, CAPTIONS[:3])
    assert (fingerprint(model), fingerprint(clip.patcher)) == before


@pytest.mark.parametrize("encoders", ["", "clip_l, t5xxl"])
def test_a_clip_that_lets_no_gradient_through_is_refused(encoders):
    """The layers' output without a graph, as a kernel without a backward pass gives it. One part is enough."""
    clip = small_clip("flux")
    for layer in clip.cond_stage_model.clip_l.transformer.modules():
        if type(layer).__name__ == "CLIPEncoder":
            layer.register_forward_hook(lambda _, args, output: (output[0].detach(), output[1]))
    before, model = fingerprint(clip.patcher), small_model("flux")
    with pytest.raises(ValueError, match="no gradient reaches the layers of clip_l: load it unquantized"):
        train(model, clip, text=replace(TEXT, encoders=encoders))
    assert fingerprint(clip.patcher) == before


def test_a_clip_with_hooks_is_refused(model):
    clip = small_clip("sd15")
    clip.patcher.forced_hooks = comfy.hooks.HookGroup()
    with pytest.raises(ValueError, match="Set CLIP Hooks"):
        train(model, clip)


def test_prodigy_has_one_rate_for_all_and_says_so():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    config = replace(CONFIG, optimizer=OptimizerConfig(name="prodigy", warmup=0))
    with pytest.raises(ValueError, match=r"prodigy finds one rate for all, but these are \[0\.01, 0\.5\]"):
        build_optimizer([first], config, [ParameterGroup([second], 0.5)])


# ── captions, sizes, dropout ────────────────────────────────────────────────────────────────────────────────────────


def test_sizes_of_the_conditioning_stay_and_the_text_is_the_captions():
    """SDXL's size conditioning comes from `positive`, the words from the captions, the empty prompt is encoded too."""
    model, clip = small_model("sdxl"), small_clip("sdxl")
    sizes = {"width": 640, "height": 384, "crop_w": 64, "crop_h": 0, "target_width": 512, "target_height": 512}
    ((cross_attn, options),) = encode(clip, "something else")
    positive = [[[cross_attn, {**options, **sizes}]]]
    encoder = TextEncoder(clip, CAPTIONS[:1], TEXT).private()
    with training_session(model, 0, [encoder.clip.patcher]) as denoiser, torch.no_grad():
        plain = denoiser.dataset(training_data(clip).samples(), positive)
        with torch.enable_grad():
            text = LiveText(encoder, denoiser, 0)
        dataset = text.dataset(plain, positive, None)
        rows = text.rows([*dataset.conditions, dataset.empty_condition])
        assert len(rows) == 5
        for row, caption in ((rows[3], CAPTIONS[0]), (rows[4], "")):
            ((cross_attn, options),) = encode(clip, caption)
            wanted = denoiser.condition([[cross_attn, {**options, **sizes}]], dataset.latents[0])
            assert row.keys() == wanted.keys()
            assert all(torch.equal(row[key], wanted[key]) for key in wanted)


def test_samples_with_one_caption_share_its_encoding(model):
    clip, calls = small_clip("sd15"), []
    encoder = TextEncoder(clip, CAPTIONS, TEXT).private()
    data = training_data(clip)
    with training_session(model, 0, [encoder.clip.patcher]) as denoiser:
        text = LiveText(encoder, denoiser, 0)
        dataset = text.dataset(denoiser.dataset(data.samples(), data.positive), data.positive, None)
        original, text.encode = text.encode, lambda caption: calls.append(caption) or original(caption)
        x, t = torch.stack(list(dataset.latents)), denoiser.snap(torch.full((4,), 0.5, dtype=torch.float64))
        with text.installed():
            together = denoiser.predict(x, t, dataset.conditions)
            assert calls == [CAPTIONS[0], CAPTIONS[1], CAPTIONS[3]]
            single = [denoiser.predict(x[i : i + 1], t[i : i + 1], dataset.conditions[i : i + 1]) for i in range(4)]
        assert denoiser.resolve is None
    assert torch.allclose(together, torch.cat(single), atol=1e-5)


# ── the nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def train_node(model, data, **connected):
    """Train LoRA as the executor calls it: every input a list."""
    settings = {"steps": 2, "batch_size": 2, "rank": 2, "lora_alpha": 2.0, "learning_rate": 1e-2, "seed": 1}
    values = {name: [value] for name, value in {**settings, "targets": "attention", **connected}.items()}
    TrainLoRA.hidden = SimpleNamespace(unique_id=None)
    with torch.inference_mode():
        inputs = {"latents": list(data.latents), "positive": list(data.positive), "validation_percent": [0]}
        return TrainLoRA.execute(model=[model], **inputs, **values)


def test_the_nodes_together_train_both(model):
    clip = small_clip("sd15")
    with torch.inference_mode():
        settings = {"rank": [2], "lora_alpha": [2.0], "learning_rate": [1e-3], "targets": ["linear"], "encoders": [""]}
        connected = TextEncoderLoRA.execute([clip], list(CAPTIONS), **settings)[0]
    trained_model, lora, loss_map, trained_clip = train_node(model, training_data(clip), text_encoder=connected)
    assert {name.split("_")[0] for name in lora} == {"lora", "diffusion"}
    assert len(loss_map["loss"]) == 2 and trained_model is not model
    changed = encode(trained_clip, CAPTIONS[0])[0][0] - encode(clip, CAPTIONS[0])[0][0]
    assert changed.abs().max() > 1e-5


def test_without_it_the_clip_output_stops_what_is_behind_it_in_words(client, object_info):
    """On a real server: the nodes behind MODEL, LORA_MODEL and LOSS_MAP run, the one behind CLIP says why not."""
    from tidetable.tests.host.test_training_hosted import training_prompt

    prompt = training_prompt(object_info, 31, 2, "blocked.jsonl")
    assert "7" in client.run(prompt).outputs
    prompt["8"] = {"class_type": "CLIPSave", "inputs": {"clip": ["6", 3], "filename_prefix": "tests/blocked"}}
    with pytest.raises(DevError, match="use the CLIP of the loader"):
        client.run(prompt)
    settings = {"rank": 4, "lora_alpha": 4.0, "learning_rate": 1e-4, "targets": "linear", "encoders": ""}
    inputs = {"clip": ["1", 1], "captions": ["2", 1], **settings}
    prompt["9"] = {"class_type": "Tidetable_TextEncoderLoRA", "inputs": inputs}
    prompt["6"]["inputs"]["text_encoder"] = ["9", 0]
    with pytest.raises(DevError, match="has no linear layer to adapt"):
        client.run(prompt)
