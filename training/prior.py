"""Prior preservation without extra pictures: the network's own answer without its adapter is the target.

Two ways. "class_prompt": the same noised samples with another conditioning, on which nothing shall change ("a photo of
a person"; ai-toolkit calls it differential output preservation), as a loss beside that of the data. "outside_mask":
with the sample's own conditioning, where its mask is 0 (OneTrainer's masked prior preservation).

The difference to the answer without the adapter costs what the same difference to the data would: it is measured in
`prediction`'s space with the same element-wise loss and the same weight at t, and then counts `prior_weight`. Only
`unmasked_weight` and the area of a mask concern the data alone: class_prompt is a mean over the whole sample,
outside_mask one of 1 - mask times the loss over all of it. Nothing here draws random numbers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .data import Dataset
from .objective import cost, loss_for_batch
from .protocols import Condition, TrainableDenoiser
from .recipe import ObjectiveConfig


class LossTerms:
    """The losses of a batch, by name. `without_adapter` switches what is trained off for the length of a forward pass.

    ValueError where the settings ask for masks, a prompt or an adapter that is not there.
    """

    def __init__(
        self,
        denoiser: TrainableDenoiser,
        dataset: Dataset,
        config: ObjectiveConfig,
        without_adapter: Callable[[], AbstractContextManager] | None,
    ):
        self.denoiser, self.dataset, self.config, self.without_adapter = denoiser, dataset, config, without_adapter
        self.kept = config.prior_on if config.prior_weight else "nothing"
        self.names = ("data", "prior") if self.kept == "class_prompt" else ("data",)
        """One forward and backward pass each."""
        if config.masked_loss != "off" and dataset.masks is None:
            raise ValueError(
                f"masked_loss is {config.masked_loss!r}, but none of the latents has a mask: put Set Latent Noise Mask"
                " behind VAE Encode, give the dataset's pictures masks, or use 'off'"
            )
        if self.kept != "nothing" and without_adapter is None:
            raise ValueError(
                f"prior_weight is {config.prior_weight}, but this run trains the model itself, and only an adapter can"
                " be switched off for the model's own answer: use 0"
            )
        if self.kept == "class_prompt" and dataset.prior_conditions is None:
            raise ValueError(
                f"prior_weight is {config.prior_weight}, but there is no prompt on which nothing shall change: connect"
                " prior_conditioning of Training Objective (a class, like 'a photo of a person') or empty of Train"
                " LoRA, or use 0"
            )

    def __call__(
        self,
        name: str,
        rows: Sequence[int],
        x0: Tensor,
        conditions: Sequence[Condition],
        eps: Tensor,
        t: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Per-sample losses [B] of the samples `rows` of the data set."""
        x_t = self.denoiser.process.mix(x0, seen, t)
        if name == "data":
            base = self._own_answer(x_t, t, conditions) if self.kept == "outside_mask" else None
            masks = self.dataset.masks_of(rows)
            return loss_for_batch(self.denoiser, x0, conditions, eps, t, self.config, seen, masks, base)
        assert self.dataset.prior_conditions is not None
        classes = [self.dataset.prior_conditions[row] for row in rows]
        base = self._own_answer(x_t, t, classes)
        return self.config.prior_weight * cost(
            self.denoiser, self.denoiser.predict(x_t, t, classes), base, t, self.config
        )

    @torch.no_grad()
    def _own_answer(self, x_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> Tensor:
        assert self.without_adapter is not None
        with self.without_adapter():
            return self.denoiser.predict(x_t, t, conditions)
