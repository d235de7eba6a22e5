"""Pictures of a run while it trains, drawn by ComfyUI's own sampler on the model that is being trained.

No second copy: the adapters act as in training, and ComfyUI's model management is kept from moving the model. A picture
is the one that SamplerCustom draws with the LoRA as it would be saved at that step.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from PIL import Image, ImageOps
from torch import Tensor

from ..schedules.validate import require_sigmas
from ..training.config import _require
from ..training.engine import Trainer
from ..training.events import Event, StepDone
from .paths import as_output, previews_folder
from .progress import SHOWN_SIZE, TrainingReporter
from .trainable import ComfyDenoiser, training_flag


logger = logging.getLogger(__name__)
KEY = "tidetable_preview"
MOVES_MODELS = ("control", "gligen", "hooks", "additional_models")
"""Conditioning options that make ComfyUI load or patch models, which it must not do beside one in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """What is drawn, and when. The one home of the defaults of Training Preview."""

    sampler: Any
    sigmas: Tensor
    positive: Sequence[list]
    """One CONDITIONING for each picture."""
    negative: list
    every: int = 100
    """Steps between two previews; 0 is only at the end. There is always one at the end."""
    cfg: float = 4.0
    seed: int = 0
    """Of every picture, at every step."""
    width: int = 512
    height: int = 512
    latent: dict | None = None
    """To start from, one sample; None is an empty one of width by height."""
    vae: Any = None
    """None shows the latents with the rough colors of ComfyUI's own previews."""

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Name -> default of the fields that have one."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    def __post_init__(self):
        _require(self.every >= 0, "every", self.every, ">= 0")
        _require(math.isfinite(self.cfg), "cfg", self.cfg, "finite")
        _require(self.width >= 16 and self.height >= 16, "size", (self.width, self.height), "at least 16 by 16")
        require_sigmas(self.sigmas, strict=False)
        if not self.positive:
            raise ValueError("there is no prompt to preview: connect CLIP Text Encode to positive")
        count = 1 if self.latent is None else len(self.latent["samples"])
        if count != 1:
            raise ValueError(f"the latent of a preview has {count} samples: connect one (Latent From Batch)")
        found = {
            name for one in (*self.positive, self.negative) for _, options in one for name in MOVES_MODELS
            if options.get(name) is not None
        }  # fmt: skip
        if found:
            raise ValueError(
                f"the prompt of a preview cannot carry {', '.join(sorted(found))}: connect CLIP Text Encode directly"
            )


def preview_config(positive: Sequence[list], **given: Any) -> PreviewConfig:
    """The inputs of Training Preview, each a list, as settings."""
    single = {name: value[0] for name, value in given.items() if value and value[0] is not None}
    return PreviewConfig(positive=tuple(positive), **single)


class Previewer:
    """Listens to the reporter and draws what is due."""

    def __init__(
        self,
        config: PreviewConfig,
        denoiser: ComfyDenoiser,
        trainer: Trainer,
        reporter: TrainingReporter,
        run: str | None = None,
    ):
        """`run` names the folder; None takes a new one."""
        self.config, self.trainer, self.reporter = config, trainer, reporter
        self.trained, self.in_place = denoiser.patcher, denoiser.loaded
        self.patcher = sampling_clone(denoiser.patcher)
        if config.vae is None and self.patcher.model.latent_format.latent_rgb_factors is None:
            raise ValueError("ComfyUI knows no colors for the latents of this model: connect a VAE to the preview")
        # What nodes hand over are inference tensors; a sampler may write to what it is given.
        self.positive, self.negative = own(list(config.positive)), own(config.negative)
        self.sigmas, self.latent = own(config.sigmas), start_latent(self.patcher, config)
        self.folder = previews_folder(run)
        reporter.listeners.append(self)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            every = self.config.every
            if event.step >= event.steps or (every and event.step % every == 0):
                self.draw(event.step)

    def draw(self, step: int) -> None:
        """One picture for each prompt, to files and to the page. One that fails costs a notice."""
        pictures = []
        with self.trainer.shown(averaged=True), undisturbed(self.trained.load_device):
            for number, positive in enumerate(self.positive, 1):
                try:
                    picture = self.picture(self.sample(positive))
                    picture.save(self.folder / f"step{step:06}_prompt{number:02}.png")
                except comfy.model_management.InterruptProcessingException:
                    raise
                except Exception as error:  # out of memory, a full disk, a sampler's own: none is worth the run
                    logger.warning("a preview failed", exc_info=True)
                    self.reporter.say(f"no preview of prompt {number} at step {step}: {error}; the run goes on")
                else:
                    pictures.append(picture)
        comfy.model_management.soft_empty_cache()
        if step >= self.trainer.config.steps:
            pictures = [Image.open(path) for path in self.files()]
        if pictures:
            self.reporter.show(sheet(pictures, len(self.positive)))

    def sample(self, positive: list) -> Tensor:
        """What SamplerCustom does with the same inputs: a latent. A cancel is noticed by the model's next call."""
        config, latent = self.config, self.latent
        noise = comfy.sample.prepare_noise(latent["samples"], config.seed, latent.get("batch_index"))
        return comfy.sample.sample_custom(
            self.patcher,
            noise,
            config.cfg,
            config.sampler,
            self.sigmas.clone(),
            own(positive),
            own(self.negative),
            latent["samples"].clone(),
            noise_mask=latent.get("noise_mask"),
            disable_pbar=True,
            seed=config.seed,
        )

    def picture(self, samples: Tensor) -> Image.Image:
        """The first image of a latent: by the VAE, or in rough colors."""
        if self.config.vae is None:
            real = self.patcher.model
            form = real.latent_format
            more = [getattr(form, name, None) for name in ("latent_rgb_factors_bias", "latent_rgb_factors_reshape")]
            rough = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, *more)
            return rough.decode_latent_to_preview(real.process_latent_in(samples))
        with left_in_place(self.in_place, self.config.vae.patcher.load_device), torch.inference_mode():
            image = self.config.vae.decode(samples)
        image = image.reshape(-1, *image.shape[-3:])[0]
        return Image.fromarray((image.float().cpu().numpy() * 255.0).clip(0, 255).astype(np.uint8))

    def files(self) -> list[Path]:
        """Every picture of the run, by step and prompt."""
        return sorted(self.folder.glob("step*_prompt*.png"))

    def images(self) -> list[dict[str, str]]:
        """The same as the page names images."""
        return [as_output(path) for path in self.files()]


def sampling_clone(patcher: ModelPatcher) -> ModelPatcher:
    """A clone to sample with: its model is loaded and stays as it is.

    Without torch.compile: it would keep code with the adapters in it, and use it after the run.
    """
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")

    def loaded(executor, model, noise_shape, conds, model_options=None, **others):
        return model.model, conds, []

    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, loaded)
    return clone


def start_latent(patcher: ModelPatcher, config: PreviewConfig) -> dict:
    """The latent to start from, as Empty Latent Image and SamplerCustom make it."""
    latent = config.latent
    if latent is None:
        latent = {"samples": torch.zeros(1, 4, config.height // 8, config.width // 8), "downscale_ratio_spacial": 8}
    latent = own(latent)
    known = signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent.pop(name, None) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    ratios = {name: value for name, value in ratios.items() if name in known}
    latent["samples"] = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)
    wanted, found = patcher.model.latent_format.latent_channels, latent["samples"].shape[1]
    if found != wanted:
        raise ValueError(
            f"the latent of a preview has {found} channels but this model's have {wanted}: encode it with the model's "
            "VAE, or disconnect it and set width and height"
        )
    return latent


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Sampling as outside of training: no gradients, and torch's own random numbers go on afterwards as before."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.no_grad(), training_flag(False):
        yield


@contextmanager
def left_in_place(patchers: Sequence[ModelPatcher], device: torch.device) -> Iterator[None]:
    """Models can be loaded on `device` while these stay where they are; the new ones are moved away after.

    Moved, their weights would not be those that training holds. ComfyUI has no other way to say so than its list of
    what it may move.
    """
    movable = comfy.model_management.current_loaded_models
    models = {id(patcher.model) for patcher in patchers}
    kept = [entry for entry in movable if entry.model is not None and id(entry.model.model) in models]
    for entry in kept:
        movable.remove(entry)
    try:
        yield
    finally:
        if device.type != "cpu":
            comfy.model_management.free_memory(1e30, device)
        movable.extend(kept)


def own(value: Any) -> Any:
    """A copy whose tensors are ordinary ones; lists and dicts are copied, anything else is shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(own(item) for item in value)
    return value


def sheet(pictures: Sequence[Image.Image], prompts: int) -> Image.Image:
    """Pictures by step and prompt as one for the page: nearly square, with the prompts of a step side by side."""
    columns = prompts * max(1, round(math.sqrt(len(pictures)) / prompts))
    side = math.ceil(SHOWN_SIZE / columns)
    cells = [ImageOps.contain(picture.convert("RGB"), (side, side)) for picture in pictures]
    width, height = (max(cell.size[axis] for cell in cells) for axis in (0, 1))
    whole = Image.new("RGB", (min(columns, len(cells)) * width, math.ceil(len(cells) / columns) * height))
    for place, cell in enumerate(cells):
        whole.paste(cell, (place % columns * width, place // columns * height))
    return whole
