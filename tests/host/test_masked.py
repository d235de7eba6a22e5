"""Masks of LATENTs and prior preservation in a real run: what is read, what is refused, what stays as it was."""

import json
import logging
from dataclasses import replace

import nodes as host_nodes
import pytest
import torch
from comfy.model_management import InterruptProcessingException

from tidetable.nodes.training_objective import Objective
from tidetable.runtime import paths, tiny
from tidetable.runtime.masked import one_objective, prior_rows, sample_masks
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import train_lora
from tidetable.runtime.training_data import TrainingData
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.model_zoo import zoo
from tidetable.tests.host.test_tiny import encode
from tidetable.tests.host.test_training_run import cancel_at, equal
from tidetable.tests.host.training_runs import LORA, dataset, quick_run
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.config import TrainConfig
from tidetable.training.data import row_noise, step_generator
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.recipe import ObjectiveConfig
from tidetable.training.timesteps import sample_t


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=4, batch_size=2, warmup_steps=0, seed=3, validate_every=2)
COUNT = 10


@pytest.fixture(scope="module")
def data():
    return dataset(COUNT)


@pytest.fixture(params=tiny.TINY_MODELS)
def model(request):
    return inference_copy(tiny.load_tiny_model(request.param))


def masked(data: TrainingData, mask: torch.Tensor, **changed) -> TrainingData:
    """The data behind ComfyUI's own Set Latent Noise Mask; a mask is [H, W] or [B, H, W], in pixels."""
    with torch.inference_mode():
        latents = host_nodes.SetLatentNoiseMask().set_mask(data.latents[0], mask)[0]
    return replace(data, latents=[latents], **changed)


def left_half(count: int = 1) -> torch.Tensor:
    mask = torch.zeros(count, 256, 256)
    mask[..., :128] = 1
    return mask


def train(model, data, run=None, adapter=None, optimizer=None, config=CONFIG, **objective):
    with torch.inference_mode():
        config = replace(config, objective=ObjectiveConfig(**objective))
        return train_lora(model, data, config, LORA, run=run, adapter=adapter, optimizer=optimizer)


def losses(result):
    return [float(loss) for loss in result.loss_map["loss"]]


# ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_masks_count_when_they_are_told_to_and_the_model_stays(model, data, caplog):
    before, plain = fingerprint(model), train(model, data)
    with caplog.at_level(logging.WARNING):
        unused = train(model, masked(data, left_half()))
    assert equal(unused, plain)
    assert sum("masked_loss of Training Objective is off" in record.message for record in caplog.records) == 1
    on = train(model, masked(data, left_half()), masked_loss="on")
    normalized = train(model, masked(data, left_half(COUNT)), masked_loss="normalized")
    assert not equal(on, plain) and fingerprint(model) == before
    assert 0 < losses(on)[0] < losses(plain)[0]
    assert losses(normalized)[0] == pytest.approx(2 * losses(on)[0], rel=1e-5)
    assert normalized.lora.metadata["tidetable_validation"] != plain.lora.metadata["tidetable_validation"]


def test_the_first_loss_is_that_of_the_masked_part_of_the_networks_error(data):
    """From the pieces: the step's noise and t, the network's own answer, and the mean over the left half."""
    model = inference_copy(tiny.load_tiny_model("mmdit-flow"))
    data = replace(masked(data, left_half()), validation_percent=0)
    config = replace(CONFIG, steps=1, batch_size=COUNT)
    result = train(model, data, config=config, masked_loss="normalized")
    with training_session(model) as denoiser, torch.no_grad():
        whole = denoiser.dataset(data.samples(), data.positive)
        order = torch.randperm(COUNT, generator=step_generator(3, 0, stream=1)).tolist()
        x0, generator = torch.stack([whole.latents[row] for row in order]), step_generator(3, 0)
        eps = torch.stack([row_noise(x0[0], 3, 0, row) for row in range(COUNT)])
        t = sample_t(config, COUNT, True, denoiser.shift, generator)
        found = denoiser.predict(denoiser.process.mix(x0, eps, t), t, [whole.conditions[row] for row in order])
    error = (found - (eps - x0))[..., : x0.shape[-1] // 2].square().mean().item()
    assert losses(result)[0] == pytest.approx(error, rel=1e-4)


def test_every_shape_of_a_mask_is_read_in_the_order_of_the_samples():
    latents = {"samples": torch.zeros(3, 4, 8, 8)}
    one, three = torch.rand(5, 6), torch.rand(3, 5, 6)
    for mask, rows in (
        (one, [one] * 3),
        (one[None], [one] * 3),
        (one[None, None], [one] * 3),
        (three, list(three)),
        (three[:, None], list(three)),
    ):
        found = sample_masks([latents, {**latents, "noise_mask": mask}])
        assert found[:3] == [None] * 3
        assert all(torch.equal(one, other) for one, other in zip(found[3:], rows, strict=True))
    for wrong in (three[:2], torch.zeros(3, 4, 8, 8), torch.zeros(1, 1, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"noise mask of shape .* does not fit latents of 3 samples"):
            sample_masks([{**latents, "noise_mask": wrong}])


def test_a_sample_without_a_mask_counts_fully(data):
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    samples = data.latents[0]["samples"]
    half = masked(data, left_half()).latents[0]
    mixed = [{"samples": samples[:5]}, {"samples": samples[5:], "noise_mask": half["noise_mask"]}]
    whole = torch.cat([torch.ones(5, 256, 256), left_half(5)])
    settings = {"masked_loss": "on", "unmasked_weight": 0.1}
    assert equal(train(model, replace(data, latents=mixed), **settings), train(model, masked(data, whole), **settings))


def test_an_empty_mask_is_refused_by_number_unless_the_outside_counts(data):
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    masks = left_half(COUNT)
    masks[6] = 0
    with pytest.raises(ValueError, match="mask of sample 7 is empty and unmasked_weight is 0"):
        train(model, masked(data, masks), masked_loss="on")
    train(model, masked(data, masks), masked_loss="normalized", unmasked_weight=0.1)
    masks[2] = -1
    with pytest.raises(ValueError, match=r"sample 3: its mask has values from -1 to -1, but they must be in 0\.\.1"):
        train(model, masked(data, masks), masked_loss="on", unmasked_weight=0.1)
    with pytest.raises(ValueError, match="none of the latents has a mask"):
        train(model, data, masked_loss="on")


def test_masks_of_a_video_hold_for_all_its_frames():
    model = inference_copy(zoo("wan"))
    generator = torch.Generator().manual_seed(0)
    channels = model.model.latent_format.latent_channels
    samples = torch.randn(2, channels, 3, 8, 8, generator=generator)
    positive = [[[torch.randn(1, 6, 32, generator=generator), {}]] for _ in range(2)]
    data = masked(TrainingData([{"samples": samples}], positive), left_half())
    half = replace(data, latents=[{"samples": samples}])
    found = [train(model, data, masked_loss=kind) for kind in ("normalized", "on")] + [train(model, half)]
    assert losses(found[0])[0] == pytest.approx(2 * losses(found[1])[0], rel=1e-5)
    assert losses(found[1])[0] < losses(found[2])[0]


# ── prior preservation ──────────────────────────────────────────────────────────────────────────────────────────────


def drift(model, result, data, prompt) -> float:
    """How far the LoRA moves the network's answers on a prompt, as a share of their size."""
    answers = []
    for patcher in (model, result.model):
        with training_session(patcher) as denoiser, torch.no_grad():
            x0 = torch.stack([denoiser.latent(sample) for sample in data.samples()[:4]])
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
            t = denoiser.snap(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
            row = denoiser.condition(prompt, x0[0])
            answers.append(denoiser.predict(denoiser.process.mix(x0, eps, t), t, [row] * 4).clone())
    return float((answers[1] - answers[0]).norm() / answers[0].norm())


def test_on_the_class_prompt_the_lora_stays_closer_to_the_model(model, data):
    """The lesson is another look: every picture as its negative."""
    before, data = fingerprint(model), replace(data, latents=[{"samples": -data.latents[0]["samples"]}])
    prompt = encode(tiny.load_tiny_clip(), "a red circle")
    config = replace(CONFIG, steps=30, learning_rate=2e-3, warmup_steps=5, validate_every=0)
    results = [
        train(model, data, config=config, prior_weight=weight, prior_conditioning=prompt) for weight in (0.0, 100.0)
    ]
    assert fingerprint(model) == before
    assert drift(model, results[1], data, prompt) < 0.7 * drift(model, results[0], data, prompt)
    courses = [json.loads(result.lora.metadata["tidetable_validation"]) for result in results]
    assert courses[1][0] - courses[1][-1] > 0.5 * (courses[0][0] - courses[0][-1]) > 0, "and it learns all the same"
    assert losses(results[0])[0] == losses(results[1])[0], "at the start the LoRA changes nothing yet"
    assert results[1].lora.metadata["tidetable_config"].count('"prior_weight": 100.0') == 1


def test_outside_the_masks_the_lora_stays_closer_to_the_model(data):
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    config = replace(CONFIG, steps=20, learning_rate=5e-3, validate_every=0)
    # The samples' own first prompt, and nothing but the prior: the masks leave one column to learn.
    mask = torch.zeros(256, 256)
    mask[:, :8] = 1
    settings = {"config": config, "masked_loss": "on", "prior_on": "outside_mask"}
    free, held = (train(model, masked(data, mask), prior_weight=weight, **settings) for weight in (0.0, 100.0))
    prompt = data.positive[0]
    assert drift(model, held, data, prompt) < 0.5 * drift(model, free, data, prompt)


def test_empty_stands_in_for_the_prompt_and_one_of_both_is_needed(data):
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    given = train(model, replace(data, negative=None), prior_weight=1.0, prior_conditioning=data.negative)
    assert equal(train(model, data, prior_weight=1.0), given)
    assert not equal(train(model, data), given)
    with pytest.raises(ValueError, match="prior_conditioning of Training Objective .* or empty of Train LoRA"):
        train(model, replace(data, negative=None), prior_weight=1.0)


def test_with_the_principal_start_the_prior_is_the_original_model(data):
    """A PiSSA adapter at its start changes nothing, so its prior costs nothing."""
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    adapter = AdapterConfig(rank=4, initialization="pissa")
    found = [losses(train(model, data, adapter=adapter, prior_weight=weight)) for weight in (0.0, 1000.0)]
    assert found[0][0] == found[1][0]
    assert found[0][1:] != found[1][1:]


def test_the_node_hands_the_prompt_over(data):
    given = {
        entry.id: entry.default for entry in Objective.GET_SCHEMA().inputs if not getattr(entry, "optional", False)
    }
    objective = Objective.execute(**{**given, "prior_weight": 0.5}, prior_conditioning=data.negative).args[0]
    assert objective.prior_conditioning is data.negative
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    with torch.inference_mode():
        result = train_lora(model, replace(data, negative=None), replace(CONFIG, objective=objective), LORA)
    assert '"prior_conditioning": null' in result.lora.metadata["tidetable_config"]
    assert equal(result, train(model, data, prior_weight=0.5))


def test_a_list_of_prompts_has_one_for_each_latent(data):
    """As ComfyUI runs the nodes: Training Objective once for each conditioning, Train LoRA with all that came out."""
    made = [ObjectiveConfig(prior_weight=0.5, prior_conditioning=prompt) for prompt in data.positive]
    (listed,) = one_objective(made)
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    own = train(model, data, prior_weight=0.5, prior_conditioning=listed.prior_conditioning)
    same = train(model, data, prior_weight=0.5, prior_conditioning=(data.negative,) * COUNT)
    assert equal(same, train(model, data, prior_weight=0.5)) and not equal(own, same)
    with pytest.raises(ValueError, match="10 latents but 3 conditionings at prior_conditioning"):
        train(model, data, prior_weight=0.5, prior_conditioning=listed.prior_conditioning[:3])
    with pytest.raises(ValueError, match="objective got 2 different settings"):
        one_objective([made[0], ObjectiveConfig(prior_weight=0.4)])
    assert one_objective(None) == one_objective([None]) == []
    assert one_objective(made[:1])[0] is made[0]


def test_one_prompt_is_told_the_size_of_every_latent():
    model = inference_copy(zoo("sdxl"))
    generator = torch.Generator().manual_seed(0)
    prompt = [[torch.randn(1, 6, 32, generator=generator), {"pooled_output": torch.randn(1, 32, generator=generator)}]]
    with training_session(model) as denoiser, torch.no_grad():
        sizes = [(8, 8), (8, 12), (8, 8)]
        latents = [torch.zeros(model.model.latent_format.latent_channels, *size) for size in sizes]
        rows = prior_rows(denoiser, latents, prompt)
        for row, latent in zip(rows, latents, strict=True):
            for name, value in denoiser.condition(prompt, latent).items():
                assert torch.equal(row[name], value)
    assert any(not torch.equal(rows[0][name], rows[1][name]) for name in rows[0])


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prior_on", ["class_prompt", "outside_mask"])
def test_a_cancelled_run_with_masks_and_prior_goes_on_bit_for_bit(prior_on, data, monkeypatch):
    model = inference_copy(tiny.load_tiny_model("unet-eps" if prior_on == "class_prompt" else "mmdit-flow"))
    before, data = fingerprint(model), masked(data, left_half())
    settings = {
        "config": replace(CONFIG, steps=6, objective=ObjectiveConfig()),
        "adapter": AdapterConfig(rank=4, rank_dropout=0.2),
        "optimizer": OptimizerConfig(accumulate=2, warmup=0),
        "masked_loss": "normalized",
        "unmasked_weight": 0.05,
        "prior_weight": 0.7,
        "prior_on": prior_on,
        "weighting": "min_snr",
        "flow": "bridge" if prior_on == "class_prompt" else "off",
    }
    complete = train(model, data, **settings)
    with monkeypatch.context() as patch:
        cancel_at(3, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, data, quick_run(), **settings)
    assert equal(train(model, data, quick_run(), **settings), complete)
    assert len(list(paths.runs_folder().iterdir())) == 1
    settings["config"] = replace(settings["config"], steps=1)  # which is free to change
    other = left_half()
    other[..., 0, 0] = 0.0
    train(model, masked(data, other), quick_run(), **settings)
    assert len(list(paths.runs_folder().iterdir())) == 2, "other masks are another run"
    if prior_on == "class_prompt":
        train(model, data, quick_run(), **settings, prior_conditioning=data.positive[0])
        assert len(list(paths.runs_folder().iterdir())) == 3, "another prompt is another run"
    assert fingerprint(model) == before
