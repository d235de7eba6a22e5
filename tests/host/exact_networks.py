"""Networks that are exactly right for Gaussian data, whatever they predict: for a real MODEL instead of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tidetable.schedules.process import expand


MEAN, STD = 0.4, 0.6


def denoised(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean of x0 ~ N(MEAN, STD²) given x_t = alpha·x0 + sigma·eps."""
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


class ExactNetwork(nn.Module):
    """Sees what ComfyUI hands to a network and answers as a perfect one of its kind would.

    `level` gives sigma (t for flow, else noise/signal) of a timestep: the network knows nothing else about its model.
    """

    dtype = torch.float32

    def __init__(self, kind: str, flow: bool, level: Callable[[Tensor], Tensor], sigma_data: float = 1.0):
        super().__init__()
        self.kind, self.flow, self.level, self.sigma_data = kind, flow, level, sigma_data

    def forward(self, x: Tensor, timestep: Tensor, **conditions) -> Tensor:
        x, sigma = x.double(), self.level(timestep.double())
        if self.flow:
            alpha, noise, x_t = 1.0 - sigma, sigma, x
        else:  # the sample in x0 + sigma·eps: networks are given it divided by sqrt(sigma² + sigma_data²)
            x_t = x * expand(torch.sqrt(sigma**2 + self.sigma_data**2), x)
            alpha, noise = torch.ones_like(sigma), sigma
        x0 = denoised(x_t, alpha, noise)
        eps = (x_t - expand(alpha, x) * x0) / expand(noise, x)
        return self._answer(x0, eps, expand(sigma, x)).float()

    def _answer(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        if self.kind in ("x0", "eps", "velocity"):
            return {"x0": x0, "eps": eps, "velocity": eps - x0}[self.kind]
        if self.flow:
            return (1.0 - sigma) * eps - sigma * x0
        # Karras et al. 2022, Table 1; at sigma_data 1, edm is -v.
        data = self.sigma_data
        edm = (sigma * x0 - data**2 * eps) / (data * torch.sqrt(sigma**2 + data**2))
        return edm if self.kind == "edm" else -edm


def with_network(model, network: nn.Module):
    """The same MODEL, in place, with another network. For models that a test made for itself."""
    model.model.diffusion_model = network
    return model
