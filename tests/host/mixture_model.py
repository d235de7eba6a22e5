"""A MODEL whose network is perfect: the exact prediction for a Gaussian mixture, behind ComfyUI's own classes.

A latent [B, 4, 1, 1] is a point of the mixture. The text conditioning says which components exist: a row of weights.
"""

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy.model_base import ModelType
from torch import Tensor, nn

from tidetable.samplers.steps import SPACES
from tidetable.tests.gaussians import GaussianMixture, toy_mixture


KINDS = {
    "eps": (ModelType.EPS, {}),
    "v": (ModelType.V_PREDICTION, {}),
    "ztsnr": (ModelType.V_PREDICTION, {"zsnr": True}),
    "flow": (ModelType.FLOW, {"shift": 3.0, "multiplier": 1000}),
}
MIXTURE = toy_mixture()
CONDITIONAL = MIXTURE.subset([0, 1])
SIZE = MIXTURE.means.shape[1]


class PointLatent(comfy.latent_formats.LatentFormat):
    latent_channels = SIZE


class ExactNetwork(nn.Module):
    """eps, v or velocity at the sigma that the sampler asked for (timesteps of eps models are rounded)."""

    dtype = torch.float32

    def __init__(self, kind: str, consistency: bool = False):
        super().__init__()
        self.kind, self.consistency = kind, consistency

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict, **kwargs) -> Tensor:
        sigma = float(transformer_options["sigmas"][0])
        in_ve = self.kind != "flow"
        state = x.double().flatten(1) * ((1.0 + sigma**2) ** 0.5 if in_ve else 1.0)
        denoised = torch.empty_like(state)
        for rows in torch.arange(len(x)).chunk(len(transformer_options["cond_or_uncond"])):
            denoised[rows] = self.denoise(state[rows], sigma, context[rows[0], 0].double())
        if self.kind in ("v", "ztsnr"):
            value = (state / (1.0 + sigma**2) - denoised) * (1.0 + sigma**2) ** 0.5 / sigma
        else:
            value = (state - denoised) / sigma
        return value.reshape(x.shape).to(x.dtype)

    def denoise(self, x: Tensor, sigma: float, weights: Tensor) -> Tensor:
        mixture = GaussianMixture(MIXTURE.means, weights, MIXTURE.std)
        space = SPACES["flow" if self.kind == "flow" else "ve"]
        if self.consistency:  # where the trajectory through x ends: what a perfect consistency model says
            return mixture.trajectory(x, sigma, 0.0, space, steps=40)
        return mixture.denoised(x, space.alpha(sigma), sigma)


def exact_model(kind: str, consistency: bool = False, **settings) -> comfy.model_patcher.ModelPatcher:
    """`kind` is one of KINDS; `settings` go into ComfyUI's sampling settings."""
    model_type, sampling = KINDS[kind]
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.unet_config = {"disable_unet_model_creation": True}
    config.latent_format = PointLatent()
    config.sampling_settings = {**sampling, **settings}
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, model_type, device=torch.device("cpu"))
    model.diffusion_model = ExactNetwork(kind, consistency)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def prompt(mixture: GaussianMixture) -> list:
    """Conditioning that selects the components of `mixture`, a subset of MIXTURE."""
    weights = [float(mixture.weights[(mixture.means == mean).all(dim=1)].sum()) for mean in MIXTURE.means]
    return [[torch.tensor([[weights]], dtype=torch.float32), {}]]


def start_noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, SIZE, 1, 1, generator=torch.Generator().manual_seed(seed))


def draw(model, sampler, sigmas, noise, cfg=1.0, positive=MIXTURE, negative=MIXTURE, seed=0, **options) -> Tensor:
    """What SamplerCustom returns, as points [B, 4]."""
    latent = options.pop("latent", torch.zeros_like(noise))
    samples = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, prompt(positive), prompt(negative), latent, disable_pbar=True, seed=seed,
        **options,
    )  # fmt: skip
    return samples.flatten(1)
