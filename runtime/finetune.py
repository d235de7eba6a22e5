"""All weights of a model trained, in place of an adapter: on the command line only, where the process is the run's own.

Of several processes each holds its share of weights, gradients and the optimizer's state (FSDP2).
"""

import logging
from pathlib import Path

import comfy.model_patcher
import folder_paths
from comfy_extras.nodes_model_merging import save_checkpoint
from torch import Tensor

from ..training.config import LoRAConfig, TrainConfig
from ..training.engine import Trainer
from ..training.memory import MemoryConfig
from ..training.sharding import gathered
from .gradients import memory_saving, require_right_gradients
from .objective import prepare, seen_in_flow
from .offload import MEMORY_FACTOR, require_full
from .progress import TrainingReporter
from .sharding import shared_weights
from .trainable import training_session
from .training import undisturbed
from .training_data import TrainingData, datasets_of
from .training_run import RunConfig, RunKeeper, fingerprint, guard_of
from .watching import watched


logger = logging.getLogger(__name__)
FOLDER = "diffusion_models"
"""Below the output folder, where ComfyUI's Save Model writes and Load Diffusion Model looks."""
SHAREABLE = ("adamw", "sgd")
"""Optimizers that treat every number by itself, and so a share of the weights as the whole."""
PREFIX = "diffusion_model."


def finetune(
    model: comfy.model_patcher.ModelPatcher,
    data: TrainingData,
    config: TrainConfig,
    run: RunConfig,
    memory: MemoryConfig | None = None,
) -> dict[str, Tensor]:
    """Train all weights; they are returned by ComfyUI's names, whole and in main memory, in every process.

    The model itself is left as it was by one process; where several share its weights, it is good for nothing else.
    """
    samples, objective = data.samples(), config.objective
    model, config = prepare(model, config)
    reporter = TrainingReporter(config.steps, None)
    needed = model.model.memory_required([config.batch_size, *samples[0].shape]) * MEMORY_FACTOR
    with training_session(model, needed, base_weights=memory.base_weights if memory else "full") as denoiser:
        require_full(denoiser.real, "training all weights")
        dataset, held_out = datasets_of(denoiser, data, samples, reporter, None, objective)
        network = denoiser.real.diffusion_model
        with shared_weights(denoiser, memory) as parameters:
            seen = seen_in_flow(denoiser, config.objective)
            trainer = Trainer(config, seen, parameters, dataset, held_out, guard_of(run))
            refuse_optimizer(trainer)
            identity = fingerprint(denoiser, trainer, LoRAConfig(), train_weights={"all": True})
            keeper = RunKeeper(run, trainer, reporter, identity)
            logger.info("training %d weights on %d samples", sum(p.numel() for p in parameters), len(dataset))
            with memory_saving(network, memory), watched(trainer, reporter, denoiser, keeper, None):
                require_right_gradients(denoiser, trainer)
                consume(trainer, reporter, keeper)
            return {PREFIX + name: gathered(p.detach()).clone() for name, p in network.named_parameters()}


def refuse_optimizer(trainer: Trainer) -> None:
    """ValueError for what sees a whole weight where a process has a share of it."""
    chosen = trainer.config.optimizer
    if not trainer.shared or chosen is None:
        return
    if chosen.name not in SHAREABLE:
        raise ValueError(
            f"optimizer {chosen.name!r} needs whole weights, and several processes share them: use 'adamw'"
        )
    if chosen.ema_device == "cpu":
        raise ValueError("ema_device 'cpu' needs whole weights, and several processes share them: use 'same'")


def consume(trainer: Trainer, reporter: TrainingReporter, keeper: RunKeeper) -> None:
    """The run. Where it ends early, one process saves a checkpoint; of several none has all that one needs."""
    try:
        for event in trainer.run():
            reporter(event)
    except BaseException:
        if trainer.shared:
            text = (
                "training stopped at step %d of %d; the weights were in several processes, the same run goes on from %s"
            )
            last = f"the checkpoint of step {keeper.last_step}" if keeper.last_step else "the start"
            logger.warning(text, trainer.step, trainer.config.steps, last)
        elif trainer.step:
            with undisturbed():
                keeper.save()
            logger.warning("training stopped at step %d of %d; saved", trainer.step, trainer.config.steps)
        raise
    finally:
        keeper.close()


def with_weights(
    patcher: comfy.model_patcher.ModelPatcher, weights: dict[str, Tensor]
) -> comfy.model_patcher.ModelPatcher:
    """A clone that has these weights in place of its own, by ComfyUI's patches. ValueError where one has no place."""
    clone = patcher.clone()
    added = clone.add_patches({name: ("set", (weight,)) for name, weight in weights.items()})
    if len(added) != len(weights):
        raise ValueError(f"{len(weights) - len(added)} of {len(weights)} weights have no place: it is another model")
    return clone


def save_model(patcher: comfy.model_patcher.ModelPatcher, prefix: str) -> str:
    """Save a MODEL as ComfyUI's Save Model does; its name as Load Diffusion Model lists it."""
    base = Path(folder_paths.get_output_directory(), FOLDER)
    base.mkdir(parents=True, exist_ok=True)
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(base))
    save_checkpoint(patcher, filename_prefix=prefix, output_dir=str(base))
    return Path(folder, f"{name}_{number:05}_.safetensors").relative_to(base).as_posix()
