"""Models without a network: all that a model is told about noise, and nothing else. What live previews are made with.

A shell holds ComfyUI's own model class, built or copied without weights, and makes a real MODEL of it, so the very
functions that nodes run accept it. It answers questions about noise; it cannot be sampled.
"""

import copy
import logging
import uuid
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import BASE
from comfy_execution.utils import get_executing_context

from ..schedules.families import FAMILIES
from .model_sampling import current_sampling, detect_family
from .server import prompt_server
from .tiny import TinyConfig, tiny_spec


logger = logging.getLogger(__name__)

EVENT = "tidetable.model"
MAX_REMEMBERED = 64
_NO_NETWORK = {"disable_unet_model_creation": True}
# Some configurations compute with widths that are only known from a checkpoint; none of that touches noise.
_WIDTHS = {"in_channels": 4, "hidden_size": 64}
_FACTS = ("model_config", "latent_format", "model_type", "manual_cast_dtype")

# Kept as models and wrapped when they are asked for: a patcher that lives until the process ends complains there.
_remembered: "OrderedDict[str, tuple[Shell, dict[str, str]]]" = OrderedDict()


@dataclass(frozen=True)
class Shell:
    """A model without its network."""

    model: torch.nn.Module
    patch: Any = None
    """The model_sampling that was patched over the model's own, or None."""

    def patcher(self) -> ModelPatcher:
        cpu = torch.device("cpu")
        patcher = ModelPatcher(self.model, load_device=cpu, offload_device=cpu)
        if self.patch is not None:
            patcher.add_object_patch("model_sampling", self.patch)
        return patcher


def remember(model: ModelPatcher) -> ModelPatcher:
    """Keep a shell of the MODEL that the running node was given, tell the page, and return the MODEL as it is.

    Whatever goes wrong here concerns the preview only, never the run.
    """
    context, server = get_executing_context(), prompt_server()
    if context is None or server is None:
        return model
    try:
        seen = {"node": context.node_id, "token": uuid.uuid4().hex, "title": _title(model)}
        _remembered[seen["token"]] = shell_of(model), seen
        if len(_remembered) > MAX_REMEMBERED:
            _remembered.popitem(last=False)
        server.send_sync(EVENT, {**seen, "prompt_id": context.prompt_id})
    except Exception:
        logger.debug("no live preview of this model", exc_info=True)
    return model


def remembered(token: str) -> Shell | None:
    """The shell of a model that a node has run with, or None where it is forgotten."""
    return _remembered[token][0] if token in _remembered else None


def all_remembered() -> list[dict[str, str]]:
    """{"node", "token", "title"} of what is remembered, oldest first: for a page that was not there."""
    return [seen for _, seen in list(_remembered.values())]


def shell_of(model: ModelPatcher) -> Shell:
    """A shell of a loaded MODEL, with its patched noise process."""
    current = current_sampling(model)
    original: Any = model.model
    shell = _bare(type(original))
    shell.diffusion_model = _bare(type(original.diffusion_model))
    for name in _FACTS:
        setattr(shell, name, getattr(original, name, None))
    shell.model_sampling = copy.deepcopy(original.model_sampling).cpu()
    return Shell(shell, None if current is original.model_sampling else copy.deepcopy(current).cpu())


def shell_families() -> list[str]:
    """Keys of the families that the running ComfyUI can make a shell of."""
    return [key for key in FAMILIES if _config_class(key) is not None]


@cache
def family_shell(key: str) -> Shell:
    """A shell as ComfyUI would load this family. ValueError for one that it does not have."""
    config_class = _config_class(key)
    if config_class is None:
        raise ValueError(f"this ComfyUI has no model of family {key[:40]!r}; known here: {', '.join(shell_families())}")
    config = config_class({**_WIDTHS, **config_class.unet_config, **_NO_NETWORK})
    try:
        model = config.get_model({}, "", device=torch.device("cpu"))
    except Exception as error:  # a few also take other parts of their checkpoint, e.g. Stable Audio
        raise ValueError(f"no preview for {FAMILIES[key].title}: ComfyUI makes it from a checkpoint only") from error
    return _with_bare_network(model, config_class.unet_config)


@cache
def tiny_shell(name: str) -> Shell:
    """A shell of an embedded model."""
    network = tiny_spec(name).network
    spec = replace(tiny_spec(name), network=_NO_NETWORK)
    return _with_bare_network(spec.base(TinyConfig(spec), spec.model_type, device=torch.device("cpu")), network)


@cache
def unknown_flow_shell() -> Shell:
    """A shell of a flow model of no family, for what depends on the shift alone."""
    return _with_bare_network(comfy.model_base.BaseModel(BASE(_NO_NETWORK), comfy.model_base.ModelType.FLOW), {})


def _bare(cls: type) -> Any:
    """An instance of a module class of ComfyUI that was never built: some nodes ask what class a network has."""
    module = torch.nn.Module.__new__(cls)
    torch.nn.Module.__init__(module)
    return module


def _with_bare_network(model: Any, unet_config: dict) -> Shell:
    model.diffusion_model = _bare(UNetModel if "model_channels" in unet_config else torch.nn.Module)
    return Shell(model)


def _config_class(key: str) -> type | None:
    """The first of the family's classes that is a model configuration of the running ComfyUI."""
    family = FAMILIES.get(key)
    names = family.model_classes if family else ()
    found = (getattr(comfy.supported_models, name, None) for name in names)
    return next((cls for cls in found if cls in comfy.supported_models.models), None)


def _title(model: ModelPatcher) -> str:
    family = detect_family(model)
    return family.title if family else type(model.model.model_config).__name__
