"""What `bench training` trains, the same for every arm: networks of 1.1 M and 1.7 M parameters, and their data.

Weights and data are random (seeded): speed does not depend on them, and gradients of a random network are the harder
comparison. The U-Net is `reference/training.md` 7.2's two-level one with a vector conditioning, the MMDiT the embedded
one.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import ClassVar

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from tidetable.runtime.tiny import TINY_SPECS, TinyConfig, TinySpec, initialize
from tidetable.runtime.tiny_text import CONTEXT_WIDTH


RANK = 16
SIDE, CHANNELS, TOKENS, SAMPLES = 16, 3, 20, 32
TWO_LEVELS = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
}


def _two_levels(spec: TinySpec) -> TinySpec:
    return dataclasses.replace(spec, network={**spec.network, **TWO_LEVELS})


NETWORKS = {"unet": _two_levels(TINY_SPECS["unet-v"]), "mmdit": TINY_SPECS["mmdit-flow"]}
BATCHES = (1, 4, 16)
CASES = tuple(f"{network}-b{batch}" for network in NETWORKS for batch in BATCHES)


def parse_case(name: str) -> tuple[str, int]:
    """(network, batch size) of a case."""
    network, batch = name.rsplit("-b", 1)
    return network, int(batch)


class Passes:
    """Forward passes of the networks that `build` makes: (when, rows) of each."""

    seen: ClassVar[list[tuple[float, int]]] = []

    @classmethod
    def note(cls, module, args) -> None:
        cls.seen.append((time.perf_counter(), len(args[0])))


def build(name: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a network, always with the same weights. Also its own reload factory, as newer ComfyUI's node needs."""
    del disable_dynamic
    spec = NETWORKS[name]
    with torch.inference_mode(False), torch.no_grad():
        model = spec.base(TinyConfig(spec), spec.model_type, device=torch.device("cpu"))
        initialize(model.diffusion_model, seed=0)
        model.requires_grad_(False).eval()
    model.diffusion_model.register_forward_pre_hook(Passes.note)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu")
    )
    patcher.cached_patcher_init = (build, (name,))
    return patcher


@dataclasses.dataclass(frozen=True)
class Data:
    """Node-level inputs: one LATENT and one CONDITIONING a sample."""

    latents: Sequence[dict]
    positive: Sequence[list]

    def one(self) -> "Data":
        """The first sample twice: ComfyUI 0.3.75's node fails where there is a single latent."""
        return Data([self.latents[0]] * 2, [self.positive[0]] * 2)


def make_data(side: int = SIDE) -> Data:
    """Latents of `side` x `side`, as nodes hand them over: made in inference mode."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.inference_mode():
        latents = [{"samples": normal(1, CHANNELS, side, side)} for _ in range(SAMPLES)]
        positive = [
            [[normal(1, TOKENS, CONTEXT_WIDTH), {"pooled_output": normal(1, CONTEXT_WIDTH)}]] for _ in range(SAMPLES)
        ]
    return Data(latents, positive)
