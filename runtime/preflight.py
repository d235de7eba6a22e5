"""What is looked at before a training run begins, so that a night is not lost to something that could be seen."""

import logging
from collections.abc import Sequence

from torch import Tensor

from ..training.adapter_kinds import AdapterNetwork, widest
from ..training.engine import Trainer
from ..training.latent_statistics import judge, latent_statistics
from .progress import TrainingReporter


logger = logging.getLogger(__name__)
NAMED = 5
"""Narrow layers that are named one by one."""


def check_latents(samples: Sequence[Tensor], latents: Sequence[Tensor], reporter: TrainingReporter) -> None:
    """Log the statistics of latents as the model sees them; `samples` are the same as the VAE gave them.

    ValueError where they cannot be the model's; a notice where they are unusual.
    """
    seen = latent_statistics(latents)
    logger.info("latents as the model sees them: %s", seen)
    verdict = judge(seen, latent_statistics(samples))
    if verdict.level == "error":
        raise ValueError(verdict.text)
    if verdict.text:
        reporter.say(verdict.text)


def check_settings(trainer: Trainer, network: AdapterNetwork, reporter: TrainingReporter) -> None:
    """Say which settings cannot do what they were set to do."""
    if text := narrow_layers(network):
        reporter.say(text)
    config = trainer.config
    if config.optimizer is None and trainer.step < config.steps <= config.warmup_steps:
        reporter.say(
            f"the warm-up takes {config.warmup_steps} steps of a run of {config.steps}: learning_rate "
            f"{config.learning_rate} is never reached. Lower warmup_steps, or raise steps"
        )


def narrow_layers(network: AdapterNetwork) -> str:
    """A sentence on the layers whose weights have a smaller rank than was asked for; empty where there are none."""
    found = {}
    for name, layer in network.layers.items():
        rank = 0 if network.config.continue_from else network.config.rank_of(name)
        if rank > widest(layer):
            found[f"{name} ({widest(layer)})"] = rank
    if not found:
        return ""
    named = ", ".join(list(found)[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
    return (
        f"rank {max(found.values())} is more than {len(found)} of {len(network.layers)} layers have; each of them gets "
        f"its own: {named}. Lower rank to make the file smaller at the same capacity, or leave these layers out"
    )
