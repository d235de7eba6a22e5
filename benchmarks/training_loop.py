"""The plain loop: what a script with diffusers and peft does, written out in PyTorch.

Every linear layer and every convolution is replaced by a module that holds it and two small ones (peft's `lora_A` and
`lora_B`), biases and norms are set to be trained (peft's `bias="all"`), and the loop is draw, forward, backward, clip,
step. It calls the diffusion model itself: no ComfyUI node, patcher or `apply_model`.
"""

import torch
from torch import Tensor, nn

from .training_cases import RANK


class LoRALayer(nn.Module):
    """A layer with a low-rank branch beside it."""

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            shape = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
            self.lora_A: nn.Module = nn.Conv2d(base.in_channels, rank, bias=False, **shape)
            self.lora_B: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            assert isinstance(base, nn.Linear)
            self.lora_A = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling

    @property
    def weight(self) -> Tensor:  # ComfyUI's blocks ask layers for their dtype
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def wrap(network: nn.Module, alpha: float = 1.0) -> dict[str, nn.Parameter]:
    """Replace the layers in place. Returns what is trained, under the names that ComfyUI's LoRA files use."""
    trained: dict[str, nn.Parameter] = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            layer = LoRALayer(module, RANK, alpha).to(module.weight.device)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer)
            trained[f"{name}.lora_up.weight"] = layer.lora_B.weight
            trained[f"{name}.lora_down.weight"] = layer.lora_A.weight
        elif not hasattr(module, "weight_function"):  # not one of ComfyUI's layers: its own trainer passes over it too
            continue
        elif module.weight is not None:
            trained[f"{name}.diff"] = module.weight.requires_grad_(True)
        if getattr(module, "bias", None) is not None:
            trained[f"{name}.diff_b"] = module.bias.requires_grad_(True)
    return trained


class PlainLoop:
    """Adapters on a bare diffusion model, with the x0 objective that ComfyUI's own node has."""

    def __init__(self, network: nn.Module, alpha_bar: Tensor | None):
        """`alpha_bar` [N] is the table of a v model; None is a flow model, which is told 1000·t."""
        self.network, self.alpha_bar = network, alpha_bar
        self.trained = wrap(network)

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, what the network is told) [count] of noise levels drawn uniformly."""
        if self.alpha_bar is None:
            t = torch.rand(count, device=device)
            return 1 - t, t, 1000 * t
        rows = torch.randint(len(self.alpha_bar), (count,), device=device)
        return self.alpha_bar[rows].sqrt(), (1 - self.alpha_bar[rows]).sqrt(), rows

    def loss(self, x0: Tensor, eps: Tensor, level: tuple[Tensor, Tensor, Tensor], context: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of x0 at a noise level as `draw` gives it."""
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in level[:2])
        x_t = alpha * x0 + sigma * eps
        output = self.network(x_t, level[2], context=context, y=y)
        predicted = x_t - sigma * output if self.alpha_bar is None else alpha * x_t - sigma * output
        return nn.functional.mse_loss(predicted, x0)

    def run(self, latents: Tensor, contexts: Tensor, pooled: Tensor, batch: int, steps: int, **adamw) -> list[float]:
        """Train on rows drawn at random. Returns the losses."""
        parameters = list(self.trained.values())
        optimizer = torch.optim.AdamW(parameters, **adamw)
        losses = []
        for _ in range(steps):
            rows = torch.randint(len(latents), (batch,))
            x0 = latents[rows]
            loss = self.loss(x0, torch.randn_like(x0), self.draw(batch, x0.device), contexts[rows], pooled[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
