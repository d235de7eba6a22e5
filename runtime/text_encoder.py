"""A CLIP that is trained beside the model: adapters of its own, and captions that are encoded anew for every batch."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.clip_model import CLIPTextModel
from torch import Tensor, nn

from ..training.adapter_kinds import AdapterNetwork
from ..training.adapter_settings import AdapterConfig
from ..training.adapters import select_targets
from ..training.checkpoint import digest
from ..training.config import LoRAConfig, Targets, _require
from ..training.data import Dataset
from ..training.optimizers import ParameterGroup
from .continuing import continued_text
from .lora_keys import LoRAModel, text_tensors
from .trainable import ComfyDenoiser, Row, _own, plain_patcher
from .training_run import sample_values


logger = logging.getLogger(__name__)
TOKENS = 77
"""Of a CLIP text model's window: what the memory of the backward pass is estimated with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """The text encoder's adapter. The one home of the defaults of Text Encoder LoRA."""

    rank: int = 16
    """Inner width, 1 to 512; a layer narrower than this gets its own width."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by lora_alpha / rank; above 0."""
    learning_rate: float = 5e-5
    """Peak rate, above 0 and at most 100. It takes the course of the model's own rate: warm-up, schedule, guard."""
    targets: Targets = "attention_mlp"
    """Which layers get an adapter; see `training.adapters.select_targets`."""
    encoders: str = ""
    """Text models by name, separated by commas. Empty: the CLIP text models, not T5 or a language model."""

    def __post_init__(self):
        LoRAConfig(rank=self.rank, lora_alpha=self.lora_alpha)  # its checks
        rate = self.learning_rate
        fine = math.isfinite(rate) and 0 < rate <= 100
        _require(fine, "learning_rate", rate, "above 0 and at most 100 (not connected, the text encoder is frozen)")


@dataclass(frozen=True)
class TextEncoder:
    """What Train LoRA is given on `text_encoder`."""

    clip: comfy.sd.CLIP
    captions: Sequence[str]
    """One for each latent, or one for all."""
    config: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def private(self) -> "TextEncoder":
        """The same with a CLIP of its own, whose network is the one to be loaded and trained.

        The host loads a CLIP before each encoding; a training session has loaded this one already, with the model.
        """
        clip, patcher = self.clip.clone(), plain_patcher(self.clip.patcher)
        clip.patcher, clip.cond_stage_model = patcher, patcher.model
        clip.load_model = lambda *args, **kwargs: patcher
        return replace(self, clip=clip)

    def memory(self, batch_size: int) -> float:
        """Bytes that the backward pass keeps of the chosen text models, one caption for each sample."""
        linear = (m for m in self.layers().values() if hasattr(m, "in_features"))
        return 4.0 * TOKENS * batch_size * sum(int(m.in_features + m.out_features) for m in linear)

    def layers(self) -> dict[str, Any]:
        """The chosen layers of the chosen text models, by name. ValueError where there are none."""
        network = self.clip.cond_stage_model
        modules = dict(network.named_modules())
        parts = [name for name, part in network.named_children() if _has_linear(part)]
        if not parts:
            raise ValueError(
                f"this CLIP ({type(network).__name__}) has no linear layer to adapt, such as the embedded models' fixed"
                " word vectors: leave text_encoder unconnected, or connect the CLIP of a model with a text encoder"
            )
        chosen = _chosen(network, parts, self.config.encoders)
        # T5 names its layers its own way: SelfAttention, DenseReluDense.
        alias = {
            name.lower().replace("densereludense", "mlp"): name for name in modules if name.split(".")[0] in chosen
        }
        found = select_targets({short: modules[name] for short, name in alias.items()}, self.config.targets)
        return {alias[short]: module for short, module in found.items()}


class LiveText:
    """A CLIP inside a training session: what it says about a caption has a gradient to its adapters."""

    def __init__(self, encoder: TextEncoder, denoiser: ComfyDenoiser, seed: int, adapter: AdapterConfig | None = None):
        """`adapter` is the model's: its continue_from is a file whose text encoder part goes on too."""
        config, patcher = encoder.config, encoder.clip.patcher
        if patcher.forced_hooks is not None:
            raise ValueError("a CLIP with hooks on it (Set CLIP Hooks) cannot be trained: connect it without them")
        self.encoder, self.denoiser, self.clip = encoder, denoiser, encoder.clip
        lora = AdapterConfig(rank=config.rank, lora_alpha=config.lora_alpha, targets=config.targets, seed=seed)
        self.network = AdapterNetwork(encoder.layers(), lora, patcher.load_device)
        self.tokens: dict[str, Any] = {}
        with self.installed():
            reached = self._reached()
        self.network = AdapterNetwork(reached, lora, patcher.load_device)
        if adapter is not None and adapter.continue_from:
            found = continued_text(self.clip.cond_stage_model, replace(adapter, seed=seed), patcher.load_device)
            self.network = found or self.network
        logger.info("training %d adapters of the text encoder", len(self.network.layers))

    def group(self) -> ParameterGroup:
        return ParameterGroup(self.network.trainable(), self.encoder.config.learning_rate)

    @contextmanager
    def without(self, network: AdapterNetwork) -> Iterator[None]:
        """The model's adapters and these switched off, for a forward pass."""
        with network.disabled(), self.network.disabled():
            yield

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Captions in place of conditionings, and adapters on, until the end.

        The norms see copies: CLIP and T5 add in place to what the norms' backward pass needs.
        """
        norms = [m for m in self.clip.cond_stage_model.modules() if type(m).__name__.endswith("Norm")]
        with ExitStack() as stack:
            for norm in norms:
                stack.callback(norm.register_forward_pre_hook(_copy_input).remove)
            stack.enter_context(self.network.installed())
            stack.callback(setattr, self.denoiser, "resolve", None)
            self.denoiser.resolve = self.rows
            yield

    def dataset(self, dataset: Dataset, positive: Sequence[list], empty: list | None) -> Dataset:
        """The data set with captions in place of conditionings, whose options (sizes, guidance) stay.

        Caption dropout has the empty caption, with the options of `empty` or else of the first conditioning.
        """
        captions, count = list(self.encoder.captions), len(dataset)
        if len(captions) not in (1, count):
            raise ValueError(
                f"{count} latents but {len(captions)} captions: connect one for each latent, or a single one"
            )
        options = [self._options(conditioning) for conditioning in positive]
        captions, options = (items * count if len(items) == 1 else items for items in (captions, options))
        rows = zip(captions, options, dataset.latents, strict=True)
        without = {
            "caption": "",
            "options": options[0] if empty is None else self._options(empty),
            "latent": dataset.latents[0],
        }
        live = [{"caption": caption, "options": own, "latent": latent} for caption, own, latent in rows]
        return replace(dataset, conditions=live, empty_condition=without)

    def rows(self, conditions: Sequence[dict[str, Any]]) -> list[Row]:
        """What the model is asked with, encoded now; samples with the same caption share its encoding."""
        encoded = {caption: self.encode(caption) for caption in dict.fromkeys(row["caption"] for row in conditions)}
        rows = []
        for row in conditions:
            cross_attn, options = encoded[row["caption"]]
            rows.append(self.denoiser.conds(cross_attn, {**row["options"], **options}, row["latent"]))
        return rows

    def encode(self, caption: str) -> tuple[Tensor, dict[str, Any]]:
        """Conditioning [1, tokens, C] and its options, on the model's device."""
        if caption not in self.tokens:
            self.tokens[caption] = self.clip.tokenize(caption)
        ((cross_attn, options),) = self.clip.encode_from_tokens_scheduled(self.tokens[caption], show_pbar=False)
        device = self.denoiser.device
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
        return cross_attn.to(device), moved

    def identity(self) -> dict[str, Any]:
        """Settings and weights by which a run is known again; the captions are in the data set."""
        weights = [sample_values(p) for _, p in sorted(self.clip.cond_stage_model.named_parameters())]
        return {**asdict(self.encoder.config), "layer": self.clip.layer_idx, "weights": digest(weights)}

    def add_to(self, lora: LoRAModel) -> LoRAModel:
        """The model's LoRA with the text encoder's beside it, in tensors and header."""
        settings, network = asdict(self.encoder.config), self.clip.cond_stage_model
        header = {
            "ss_text_encoder_lr": str(settings["learning_rate"]),
            "tidetable_text_encoder": json.dumps(settings),
        }
        with torch.inference_mode(False):
            return LoRAModel({**lora, **dict(text_tensors(self.network, network))}, {**lora.metadata, **header})

    def _options(self, conditioning: list) -> dict[str, Any]:
        return {key: _own(value, self.denoiser.device) for key, value in conditioning[0][1].items()}

    def _reached(self) -> dict[str, nn.Module]:
        """The layers on which the conditioning depends; not those behind a clip skip, or an unused projection.

        ValueError where no gradient arrives at any layer of a text model: weights in a format without a backward pass,
        for example.
        """
        cross_attn, options = self.encode(self.encoder.captions[0])
        outputs = [x for x in (cross_attn, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
        ups, grads, reason = [getattr(a, a.last) for a in self.network.adapters.values()], (), ""
        # Weights that differ, because the plain sum of what a norm puts out is constant.
        weights = [torch.linspace(-1, 1, x.numel()).to(x).reshape(x.shape) for x in outputs]
        try:
            grads = torch.autograd.grad(outputs, ups, weights, allow_unused=True) if outputs else ()
        except RuntimeError as error:
            reason = f" ({error})"
        layers = list(zip(self.network.layers.items(), grads, strict=False))
        alive = {name.split(".")[0] for (name, _), grad in layers if grad is not None and bool(grad.any())}
        dead = sorted({name.split(".")[0] for name in self.network.layers} - alive)
        if dead:
            raise ValueError(
                f"no gradient reaches the layers of {', '.join(dead)}{reason}: load it unquantized, leave it out of "
                "encoders, or leave text_encoder unconnected"
            )
        return {name: layer for (name, layer), grad in layers if grad is not None}


def text_encoder(clip: comfy.sd.CLIP | None, captions: Sequence[str], **settings: Any) -> TextEncoder:
    """The widgets of Text Encoder LoRA as settings. ValueError for what can be seen to fail without the model."""
    if clip is None:
        raise ValueError("there is no CLIP: the checkpoint has no text encoder, load one with Load CLIP")
    if not captions:
        raise ValueError("there is no caption: connect the captions of the latents, or a single one for all")
    encoder = TextEncoder(clip, list(captions), TextEncoderConfig(**settings))
    encoder.layers()
    return encoder


def _chosen(network: nn.Module, parts: Sequence[str], encoders: str) -> list[str]:
    """The text models that are trained, of those there are."""
    there = ", ".join(parts)
    wanted = [name.strip() for name in encoders.split(",") if name.strip()]
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise ValueError(f"encoders has {missing[0]!r}, but this CLIP has {there}: use these names, or leave it empty")
    if wanted:
        return wanted
    found = [name for name in parts if any(isinstance(m, CLIPTextModel) for m in getattr(network, name).modules())]
    if not found:
        raise ValueError(
            f"this CLIP has no CLIP text model but {there}: name it in encoders to train it, or leave text_encoder "
            "unconnected"
        )
    return found


def _has_linear(part: nn.Module) -> bool:
    return any(type(m).__name__ == "Linear" and hasattr(m, "in_features") for m in part.modules())


def _copy_input(module: nn.Module, args: tuple) -> tuple:
    del module
    return (args[0].clone(), *args[1:])
