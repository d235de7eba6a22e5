"""The exact ground truth: a Gaussian mixture, whose denoiser, probability-flow trajectories and samples are known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidetable.samplers.steps import Guided, Space


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians of one standard deviation."""

    means: Tensor
    """[K, D] float64."""
    weights: Tensor
    """[K], summing to 1."""
    std: float

    def denoised(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """E[x0 | alpha·x0 + sigma·eps = x], the perfect denoiser; x [B, D], alpha and sigma () or [B]."""
        alpha, sigma = (torch.as_tensor(value, dtype=x.dtype).reshape(-1, 1) for value in (alpha, sigma))
        means = self.means.to(x.dtype)
        variance = alpha**2 * self.std**2 + sigma**2
        distance = ((x[:, None] - alpha[..., None] * means) ** 2).sum(-1)
        share = torch.softmax(self.weights.to(x.dtype).log() - distance / (2.0 * variance), dim=-1)
        gain = alpha * self.std**2 / variance
        return share @ means + gain * (x - alpha * (share @ means))

    def denoiser(self, space: Space, base: "GaussianMixture | None" = None):
        """What the samplers call; `base` is the mixture of the unconditional prediction, for CFG++."""

        def denoise(x: Tensor, sigma: float) -> Guided:
            denoised = self.denoised(x, space.alpha(sigma), sigma)
            return Guided(denoised, base.denoised(x, space.alpha(sigma), sigma) if base else denoised)

        return denoise

    def trajectory(self, x: Tensor, start: float, end: float, space: Space, steps: int = 600) -> Tensor:
        """x(end) on the probability-flow ODE through x(start), by Runge–Kutta 4 in ln sigma; `end` 0 is denoised from
        sigma 1e-4, where an exact denoiser is off by less than 1e-6."""
        low = max(end, 1e-4)
        h = torch.log(torch.tensor(low / start, dtype=torch.float64)).item() / steps
        x, sigma = x.double(), start

        def slope(x: Tensor, sigma: float) -> Tensor:
            return x - self.denoised(x, space.alpha(sigma), sigma)

        for i in range(steps):
            sigma, middle, after = (start * (low / start) ** ((i + k) / steps) for k in (0.0, 0.5, 1.0))
            k1 = slope(x, sigma)
            k2 = slope(x + h / 2.0 * k1, middle)
            k3 = slope(x + h / 2.0 * k2, middle)
            x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + slope(x + h * k3, after))
        return x if end > 0.0 else self.denoised(x, space.alpha(low), low)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, D] float64."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.std * noise

    def subset(self, chosen: list[int]) -> "GaussianMixture":
        """Some of the components, in the proportion that they have here."""
        weights = self.weights[chosen]
        return GaussianMixture(self.means[chosen], weights / weights.sum(), self.std)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centered = self.means - self.mean()
        return centered.T @ (self.weights[:, None] * centered) + self.std**2 * torch.eye(self.means.shape[1])

    def mode_weights(self, x: Tensor) -> Tensor:
        """[K]: the share of x [B, D] that lies nearest to each component."""
        nearest = torch.cdist(x.double(), self.means).argmin(dim=1)
        return torch.bincount(nearest, minlength=len(self.means)).double() / len(x)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64, seed: int = 0) -> float:
    """Mean over random directions of the 1-Wasserstein distance between projections; a, b [B, D].

    Not the 2-Wasserstein one, which grows with the root of misplaced mass and so drowns in chance.
    """
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    along = along / along.norm(dim=0)
    return float(((a.double() @ along).sort(0).values - (b.double() @ along).sort(0).values).abs().mean())


def toy_mixture() -> GaussianMixture:
    """Four unequal components in four dimensions, overall of about unit variance."""
    means = torch.tensor(
        [[1.0, 1.0, 0.5, -0.5], [-1.0, 0.8, -0.5, 1.0], [0.6, -1.2, 1.0, 0.8], [-0.9, -0.7, -1.2, -1.0]]
    )
    return GaussianMixture(means.double(), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), 0.3)
