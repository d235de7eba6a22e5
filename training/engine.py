"""The training loop. It yields events and knows nothing of nodes, files or progress bars."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .adapter_kinds import AdapterNetwork
from .config import TrainConfig
from .data import BatchOrder, Dataset, step_generator
from .events import Event, StepDone
from .objective import loss_for_batch
from .optim import MovingAverage, build_optimizer, learning_rate
from .optimizers import set_training_mode
from .protocols import TrainableDenoiser
from .timesteps import sample_t
from .validation import validate


MAX_SKIPPED = 20
"""Consecutive steps without a finite gradient after which the run is given up."""


class Trainer:
    """Trains `parameters` of a denoiser on a data set, whatever they are: all weights, or an adapter's.

    The caller may stop consuming `run()` at any event; the parameters then hold what was learned so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        denoiser: TrainableDenoiser,
        parameters: Sequence[Tensor],
        dataset: Dataset,
        held_out: Dataset | None = None,
    ):
        if not parameters:
            raise ValueError("there is nothing to train: no parameter was given")
        if config.caption_dropout > 0 and dataset.empty_condition is None:
            raise ValueError(
                f"caption_dropout is {config.caption_dropout}, but no empty conditioning was given: connect one, or"
                " use 0"
            )
        self.config = config
        self.denoiser = denoiser
        self.parameters = list(parameters)
        self.dataset = dataset
        self.held_out = held_out
        self.accumulate = config.optimizer.accumulate if config.optimizer else 1
        self.order = BatchOrder(dataset, config.batch_size * self.accumulate, config.seed)
        self.optimizer = build_optimizer(self.parameters, config)
        ema_device = "cpu" if config.optimizer and config.optimizer.ema_device == "cpu" else None
        self.average = MovingAverage(self.parameters, config.ema_decay, ema_device) if config.ema_decay > 0 else None
        self.adapter: AdapterNetwork | None = None
        """Where the parameters are an adapter's with dropout or a limit on its norm."""
        self.step = 0
        self.skipped = 0

    def run(self) -> Iterator[Event]:
        """Yield a `StepDone` per step and a `Validated` before the first, every so often, and after the last."""
        if self.held_out is not None:
            yield self._validate()
        every = self.config.validate_every
        while self.step < self.config.steps:
            yield self.train_step()
            if self.held_out is not None and every and self.step % every == 0 and self.step < self.config.steps:
                yield self._validate()
        self.finish()
        if self.held_out is not None:
            yield self._validate()

    def finish(self) -> None:
        """Put the moving average in place of the last weights, where there is one. Safe to call twice."""
        set_training_mode(self.optimizer, False)
        if self.average is not None and self.average.updates:
            self.average.copy_to_parameters()

    def train_step(self) -> StepDone:
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        set_training_mode(self.optimizer, True)
        loss = self._forward_backward(step_generator(self.config.seed, self.step))
        norm = self._clip_gradients()
        healthy = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
        if healthy:
            self.optimizer.step()
            if self.adapter is not None:
                self.adapter.limit_norms()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if healthy else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:
            raise ValueError(
                f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row (step {self.step + 1}): "
                f"lower learning_rate (now {self.config.learning_rate}) or check the latents for nan"
            )
        self.step += 1
        return StepDone(self.step, self.config.steps, loss.item(), rate, norm.item(), not healthy)

    def _forward_backward(self, generator: torch.Generator) -> Tensor:
        rows = self.order.indices(self.step)
        x0 = torch.stack([self.dataset.latents[i] for i in rows])
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        flow = self.denoiser.process.name == "flow"
        t = self.denoiser.snap(sample_t(self.config, len(rows), flow, self.denoiser.shift, generator))
        keep = torch.rand(len(rows), generator=generator) >= self.config.caption_dropout
        conditions = [
            self.dataset.conditions[i] if kept else self.dataset.empty_condition
            for i, kept in zip(rows, keep.tolist(), strict=True)
        ]
        dropout = nullcontext() if self.adapter is None else self.adapter.dropout(self.step)
        with dropout, self.denoiser.gradient_context():
            return self._accumulate(x0, conditions, eps, t)

    def _accumulate(self, x0: Tensor, conditions: list, eps: Tensor, t: Tensor) -> Tensor:
        """Mean loss of the rows and its gradient, batch_size rows at a time."""
        total, size = torch.zeros((), device=x0.device), self.config.batch_size
        for rows in (slice(first, first + size) for first in range(0, len(x0), size)):
            loss = loss_for_batch(self.denoiser, x0[rows], conditions[rows], eps[rows], t[rows]).mean()
            loss = loss * (len(x0[rows]) / len(x0))
            loss.backward()
            total = total + loss.detach()
        return total

    def _clip_gradients(self) -> Tensor:
        limit = self.config.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], limit)

    def _validate(self):
        assert self.held_out is not None
        set_training_mode(self.optimizer, False)
        return validate(self.denoiser, self.held_out, self.config.batch_size, self.config.seed, self.step)
