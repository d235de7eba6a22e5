"""The training loop. It yields events and knows nothing of nodes, files or progress bars."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adapter_kinds import AdapterNetwork
from .checkpoint import clone, map_tensors
from .config import TrainConfig
from .data import BatchOrder, Dataset, row_noise, step_generator
from .distributed import World, parts
from .events import Event, Notice, StepDone
from .guard import Guard
from .noise import shape_noise, shapes_noise
from .optim import MovingAverage, build_optimizer, learning_rate, rate_factors, total_norm
from .optimizers import ParameterGroup, set_training_mode
from .prior import LossTerms
from .protocols import TrainableDenoiser
from .sharding import gathered, is_share, like, share_state, whole
from .timesteps import draw_t, sample_t
from .validation import validate


MAX_SKIPPED = 20
"""Consecutive steps without a finite gradient after which the run is given up."""
OUT_OF_MEMORY = (
    "out of memory with one sample at once; what was learned is saved. What helps, most first: Training Memory with "
    "gradient_checkpointing 'blocks' (a third of the memory for activations; less with offload_activations) and "
    "base_weights 'auto' or 'offload' (up to all of the MODEL's weights), pictures of half the area (half of it), "
    "targets 'attention' and a lower rank (the optimizer's part), and closing what else uses the graphics card"
)


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
        guard: Guard | None = None,
        others: Sequence[ParameterGroup] = (),
        without_adapter: Callable[[], AbstractContextManager] | None = None,
    ):
        """`others` are trained with `parameters`, each at a rate of its own. `without_adapter` switches all of them off
        for the length of a forward pass, where they are adapters.
        """
        if not parameters:
            raise ValueError("there is nothing to train: no parameter was given")
        if config.caption_dropout > 0 and dataset.empty_condition is None and dataset.empties is None:
            raise ValueError(
                f"caption_dropout is {config.caption_dropout}, but no empty conditioning was given: connect one, or"
                " use 0"
            )
        self.config = config
        self.denoiser = denoiser
        self.parameters = [*parameters, *(p for other in others for p in other.parameters)]
        self.dataset = dataset
        self.held_out = held_out
        self.shared = any(is_share(parameter) for parameter in self.parameters)
        """Whether several processes hold the parameters in parts."""
        self.world = replace(World.current(), together=self.shared)
        self.world.share(config.batch_size)
        if self.world.size > 1 and config.objective.ot_pairing:
            raise ValueError(
                f"ot_pairing needs the whole batch in one process, and there are {self.world.size}: switch it off, or "
                "use one process"
            )
        self.accumulate = config.optimizer.accumulate if config.optimizer else 1
        self.order = BatchOrder(dataset, config.batch_size * self.accumulate, config.seed)
        self.terms = LossTerms(denoiser, dataset, config.objective, without_adapter)
        self.loss = self.world.averaged(self.terms, [] if self.shared else self.parameters)  # FSDP2 averages its own
        self.optimizer = build_optimizer(parameters, config, others)
        self.rate_factors = rate_factors(self.optimizer, config, others)
        ema_device = "cpu" if config.optimizer and config.optimizer.ema_device == "cpu" else None
        self.average = MovingAverage(self.parameters, config.ema_decay, ema_device) if config.ema_decay > 0 else None
        self.adapter: AdapterNetwork | None = None
        """Where the parameters are an adapter's with dropout or a limit on its norm."""
        self.guard = guard
        self.rows_at_once = config.batch_size // self.world.size
        """Samples of a forward pass; fewer once memory ran out, with the same batch in each step."""
        self.notices: list[Notice] = []
        self.step = 0
        self.skipped = 0
        self.rate_scale = 1.0
        self.finished = False
        self.whole = True
        """False for the moment in which an update is half made: `state` is then worth nothing."""

    def run(self) -> Iterator[Event]:
        """Yield a `StepDone` per step and a `Validated` before the first, every so often, and after the last.

        After `load_state` it goes on where that run was, bit for bit on the same machine.
        """
        if self._validation_is_due():
            yield self._validate()
        while self.step < self.config.steps:
            yield self.train_step()
            yield from self._noticed()
            if self._validation_is_due():
                yield self._validate()
        self.finish()
        if self.held_out is not None:
            yield self._validate()

    def _noticed(self) -> Iterator[Notice]:
        for notices in (self.notices, self.guard.notices if self.guard is not None else []):
            while notices:
                yield notices.pop(0)

    def finish(self) -> None:
        """Put the moving average in place of the last weights, where there is one. Safe to call twice."""
        set_training_mode(self.optimizer, False)
        self.finished = True
        if self.average is not None and self.average.updates:
            self.average.copy_to_parameters()

    @contextmanager
    def shown(self, averaged: bool = False) -> Iterator[None]:
        """The weights as they are to be used, for a look between two steps; those of training come back bit for bit.

        `averaged`: the moving average where there is one, as `finish` would leave them. Schedule-free optimizers keep
        other weights while training, and their way there and back rounds.
        """
        if self.finished:
            yield
            return
        kept = clone(self.parameters)
        set_training_mode(self.optimizer, False)
        try:
            if averaged and self.average is not None and self.average.updates:
                self.average.copy_to_parameters()
            yield
        finally:
            set_training_mode(self.optimizer, True)
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    def weights(self) -> dict[str, Any]:
        """What an update changes: references to parameters, optimizer state and moving average."""
        set_training_mode(self.optimizer, True)
        average = self.average and {"average": self.average.average, "updates": self.average.updates}
        return {"parameters": self.parameters, "optimizer": self.optimizer.state_dict(), "average": average}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Any]) -> None:
        """Take over the tensors of `weights`. ValueError where they do not fit."""
        if [p.shape for p in weights["parameters"]] != [p.shape for p in self.parameters]:
            raise ValueError("the saved weights have other shapes than those of this run: use the same rank and layers")
        if (weights["average"] is None) != (self.average is None):
            raise ValueError("only one of the saved run and this one has a moving average: use the same ema_decay")
        for parameter, saved in zip(self.parameters, weights["parameters"], strict=True):
            parameter.copy_(like(saved, parameter))
        self.optimizer.load_state_dict(weights["optimizer"])
        if self.shared:
            share_state(self.optimizer)
        if self.average is not None:
            for average, saved in zip(self.average.average, weights["average"]["average"], strict=True):
                average.copy_(like(saved, average))
            self.average.updates = weights["average"]["updates"]

    def state(self) -> dict[str, Any]:
        """Everything that a run needs to go on, as nested dicts and lists of tensors and plain values.

        Weights that several processes share are put together: all of them must ask for it.
        """
        weights = self.weights()
        return {
            "step": self.step,
            "skipped": self.skipped,
            "rate_scale": self.rate_scale,
            "weights": map_tensors(weights, gathered) if self.shared else weights,
            "guard": self.guard and self.guard.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. ValueError where its weights do not fit."""
        self.load_weights(state["weights"])
        self.step, self.skipped, self.rate_scale = state["step"], state["skipped"], state["rate_scale"]
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state(state["guard"])

    def train_step(self) -> StepDone:
        rate = learning_rate(self.step, self.config) * self.rate_scale
        for group, factor in zip(self.optimizer.param_groups, self.rate_factors, strict=True):
            group["lr"] = rate * factor
        set_training_mode(self.optimizer, True)
        loss = self._gradients().item()
        norm = self._clip_gradients()
        healthy = math.isfinite(norm) and math.isfinite(loss)
        if self.guard is not None:
            healthy = self.guard.accepts(self, loss, norm)
        if healthy:
            self.whole = False
            self.optimizer.step()
            if self.adapter is not None:
                self.adapter.limit_norms()
            if self.average is not None:
                self.average.update()
            self.whole = True
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if healthy else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:
            raise ValueError(
                f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row (step {self.step + 1}): "
                f"lower learning_rate (now {self.config.learning_rate}) or check the latents for nan"
            )
        self.step += 1
        if self.guard is not None:
            self.guard.after_step(self, healthy)
        return StepDone(self.step, self.config.steps, loss, rate, norm, not healthy)

    def _gradients(self) -> Tensor:
        """`_forward_backward`, again with half as many samples at once where memory runs out."""
        while True:
            try:
                return self._forward_backward(step_generator(self.config.seed, self.step))
            except torch.OutOfMemoryError as error:
                if self.rows_at_once == 1 or self.world.size > 1:  # the others would wait for this one
                    raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY} ({error})") from error
            # Here the error is gone, and with it what it kept alive.
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            before, self.rows_at_once = self.rows_at_once, -(-self.rows_at_once // 2)
            text = f"out of memory with {before} samples at once: going on with {self.rows_at_once}, and the same batch"
            self.notices.append(Notice(self.step, f"{text} of {self.config.batch_size} in each step"))

    def _forward_backward(self, generator: torch.Generator) -> Tensor:
        """Gradients of a whole batch, and its mean loss; this process goes through its own share of the rows."""
        rows = self.order.indices(self.step)
        share = self.world.share(len(rows))
        x0 = torch.stack([self.dataset.latents[i] for i in rows[share]])
        objective = self.config.objective
        # Each row's noise is a function of (seed, step, row), so that a process draws its own rows only.
        drawn = range(len(rows)) if shapes_noise(objective) else range(len(rows))[share]
        eps = torch.stack([row_noise(x0[0], self.config.seed, self.step, row) for row in drawn])
        t = self.denoiser.snap(self._draw_t(len(rows), x0.shape[1:], generator))[share]
        keep = torch.rand(len(rows), generator=generator) >= self.config.caption_dropout
        conditions = [
            self.dataset.condition(i, not kept) for i, kept in zip(rows[share], keep[share].tolist(), strict=True)
        ]
        eps, seen = shape_noise(eps, x0, objective, generator)
        if len(eps) > len(x0):
            eps, seen = eps[share], seen[share]
        dropout = nullcontext() if self.adapter is None else self.adapter.dropout(self.step)
        total = torch.zeros((), device=x0.device)
        with dropout, self.denoiser.gradient_context():
            for part in parts(len(x0), self.rows_at_once):
                batch = rows[share][part], x0[part], conditions[part], eps[part], t[part], seen[part]
                for term in self.terms.names:
                    loss = self.loss(term, *batch).sum() / len(x0)
                    if loss.requires_grad:
                        loss.backward()
                    total = total + loss.detach()
        return self.world.mean(total)

    def _draw_t(self, count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        process, shift = self.denoiser.process, self.denoiser.shift
        if self.config.timestep_density is None:
            return sample_t(self.config, count, process.name == "flow", shift, generator)
        return draw_t(self.config.timestep_density, count, shape, process, shift, generator)

    def _clip_gradients(self) -> float:
        """The norm before clipping. One pass over all tensors; none to scale them where that would change nothing."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(total_norm(gradients)).item() if gradients else 0.0
        limit = self.config.max_grad_norm
        if 0 < limit < norm:
            torch._foreach_mul_(gradients, limit / norm)
        return norm

    def _validation_is_due(self) -> bool:
        if self.held_out is None or self.step == 0:
            return self.held_out is not None
        every = self.config.validate_every
        return bool(every) and self.step % every == 0 and self.step < self.config.steps

    def _validate(self):
        assert self.held_out is not None
        config = self.config
        with self.shown():
            run = config.batch_size, config.seed, self.step, self.world, config.objective
            return validate(self.denoiser, self.held_out, *run)
