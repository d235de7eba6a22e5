"""The training node's work:

node-level inputs to a `Trainer`, its events to the user, its result to MODEL and LORA_MODEL.
"""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import comfy.model_management
import comfy.model_patcher
import comfy.sd
from comfy_execution.graph_utils import ExecutionBlocker

from ..training.adapter_kinds import AdapterNetwork
from ..training.adapter_settings import AdapterConfig, match_targets
from ..training.config import LoRAConfig, TrainConfig, with_optimizer
from ..training.engine import Trainer
from ..training.memory import MemoryConfig
from ..training.optimizers import OptimizerConfig
from .continuing import continued_network, without_text
from .diffusers_format import diffusers_names
from .gradients import memory_saving, require_right_gradients
from .lora_keys import LoRAModel, apply_lora, apply_text_lora, to_lora_model
from .objective import prepare, seen_in_flow
from .offload import step_factor
from .paths import rescue_folders, save_lora
from .preflight import check_settings
from .previews import PreviewConfig
from .progress import TrainingReporter
from .sharding import shared_base
from .text_encoder import LiveText, TextEncoder
from .trainable import ComfyDenoiser, training_session
from .training_data import TrainingData, datasets_of
from .training_run import RunConfig, RunKeeper, fingerprint, guard_of
from .watching import watched


logger = logging.getLogger(__name__)
RESCUE_PREFIX = "tidetable/unfinished"
NO_CLIP = (
    "Train LoRA has a CLIP only where its input text_encoder is connected (Text Encoder LoRA): otherwise the text "
    "encoder is as it was, so use the CLIP of the loader"
)


@dataclass(frozen=True)
class TrainingResult:
    model: comfy.model_patcher.ModelPatcher
    """The model it was trained on, with the LoRA applied: a clone."""
    lora: LoRAModel
    loss_map: dict
    ui: dict[str, list[dict[str, str]]] | None = None
    """What the page shows on the node: the previews."""
    clip: comfy.sd.CLIP | ExecutionBlocker = field(default_factory=lambda: ExecutionBlocker(NO_CLIP))
    """The text encoder with the LoRA applied: a clone. Without one, what stops the nodes behind it in words."""


def train_lora(
    model: comfy.model_patcher.ModelPatcher,
    data: TrainingData,
    config: TrainConfig,
    lora_config: LoRAConfig,
    node_id: str | None = None,
    adapter: AdapterConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    run: RunConfig | None = None,
    preview: PreviewConfig | None = None,
    text_encoder: TextEncoder | None = None,
    memory: MemoryConfig | None = None,
    shard_base: bool = False,
) -> TrainingResult:
    """Train a LoRA on the model as it is loaded and patched now. The model itself is left exactly as it was.

    When the run is cut short (cancel, out of memory, an error), what was learned is saved to the loras folder first.
    With `run`, a checkpoint is saved too, and the same call goes on from there. `shard_base`: of several processes each
    keeps its share of the model only, which is then good for nothing else.
    """
    config = with_optimizer(config, optimizer)
    samples = data.samples()
    objective = config.objective  # with its prompt, which is data
    model, config = prepare(model, config)
    reporter = TrainingReporter(config.steps, node_id)
    needed = model.model.memory_required([config.batch_size, *samples[0].shape]) * step_factor(memory)
    encoder = text_encoder.private() if text_encoder else None
    beside = [encoder.clip.patcher] if encoder else []
    needed += encoder.memory(config.batch_size) if encoder else 0
    base_weights = memory.base_weights if memory else "full"
    with training_session(model, needed, beside, base_weights) as denoiser:
        network = build_network(dict(denoiser.real.diffusion_model.named_modules()), denoiser, lora_config, adapter)
        if adapter is not None and adapter.continue_from and encoder is None:
            without_text(adapter.continue_from)
        text = LiveText(encoder, denoiser, lora_config.seed, adapter) if encoder else None
        dataset, held_out = datasets_of(denoiser, data, samples, reporter, text, objective)
        seen = seen_in_flow(denoiser, config.objective)
        groups = [text.group()] if text else []
        off = network.disabled if text is None else partial(text.without, network)
        trainer = Trainer(config, seen, network.trainable(), dataset, held_out, guard_of(run), groups, off)
        trainer.adapter = network
        others = {"adapter": asdict(adapter)} if adapter else {}
        others |= {"text_encoder": text.identity()} if text else {}
        identity = fingerprint(denoiser, trainer, lora_config, **others) if run else {}
        keeper = RunKeeper(run, trainer, reporter, identity) if run else None
        check_settings(trainer, network, reporter)
        logger.info("training %d adapters on %d samples", len(network.layers), len(dataset))

        def current() -> LoRAModel:
            settings = network.config if adapter else lora_config
            header = metadata(trainer, settings, denoiser, reporter)
            return to_lora_model(network, header) if text is None else text.add_to(to_lora_model(network, header))

        with (
            network.installed(),
            text.installed() if text else nullcontext(),
            shared_base(denoiser, trainer, memory, shard_base),
            memory_saving(denoiser.real.diffusion_model, memory),
            watched(trainer, reporter, denoiser, keeper, preview) as previewer,
        ):
            require_right_gradients(denoiser, trainer)
            run_or_rescue(trainer, reporter, current, keeper)
        lora = current()
    lora.diffusers = diffusers_names(model.model)
    ui = None if previewer is None else {"images": previewer.images()}
    result = TrainingResult(apply_lora(model, lora), lora, reporter.loss_map(), ui)
    return replace(result, clip=apply_text_lora(text_encoder.clip, lora)) if text_encoder else result


def build_network(
    modules: dict, denoiser: ComfyDenoiser, lora_config: LoRAConfig, adapter: AdapterConfig | None
) -> AdapterNetwork:
    """Adapters on the network's layers: LoRA by the node's own inputs, or what a Tidetable_Adapter says."""
    adapter = AdapterConfig(**asdict(lora_config)) if adapter is None else replace(adapter, seed=lora_config.seed)
    if adapter.continue_from:
        network = continued_network(denoiser.real, adapter, denoiser.device)
    else:
        network = AdapterNetwork(match_targets(modules, adapter), adapter, denoiser.device)
    logger.info("%s on %d layers:\n%s", adapter.kind, len(network.layers), network.listing())
    return network


def run_or_rescue(
    trainer: Trainer,
    reporter: TrainingReporter,
    current: Callable[[], LoRAModel],
    keeper: RunKeeper | None = None,
) -> None:
    """Consume the run. Whatever ends it early, the state so far goes to files, and the reason goes on to ComfyUI."""
    try:
        for event in trainer.run():
            reporter(event)
    except BaseException:  # cancelling is a BaseException in newer ComfyUI
        if trainer.step:
            with undisturbed():
                _rescue(trainer, current, keeper)
        else:
            logger.warning("training stopped before its first step was done: there is nothing to save")
        raise
    finally:
        if keeper is not None:
            keeper.close()


@contextmanager
def undisturbed() -> Iterator[None]:
    """A request to end that comes now has been heard: torchrun sends SIGTERM when this process's rescue has begun."""
    if threading.current_thread() is not threading.main_thread():  # in ComfyUI, where SIGTERM is not ours
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rescue(trainer: Trainer, current: Callable[[], LoRAModel], keeper: RunKeeper | None) -> None:
    try:
        if keeper is not None:
            keeper.save()  # before the moving average takes the place of the weights
    except Exception as error:  # the LoRA is still to be saved, and the reason for the stop matters more
        logger.error("no checkpoint at step %d: %s", trainer.step, error)
    trainer.finish()
    if trainer.world.rank > 0:
        return
    lora = current()
    for folder in rescue_folders():
        try:
            path = save_lora(lora, f"{RESCUE_PREFIX}_step{trainer.step}", lora.metadata, folder)
        except ValueError as error:  # the reason for the stop matters more than this
            logger.error("training stopped at step %d of %d; %s", trainer.step, trainer.config.steps, error)
        else:
            logger.warning("training stopped at step %d of %d; saved %s", trainer.step, trainer.config.steps, path)
            return


def metadata(
    trainer: Trainer, lora_config: LoRAConfig | AdapterConfig, denoiser: ComfyDenoiser, reporter: TrainingReporter
) -> dict[str, str]:
    """The header of the file: kohya's `ss_*` and Stability's `modelspec.*` names, every value a string."""
    config, family, kind = trainer.config, type(denoiser.real).__name__, getattr(lora_config, "kind", "lora")
    latent, chosen = trainer.dataset.latents[0], config.optimizer
    values = {
        "ss_network_module": "networks.lora" if kind in ("lora", "dora", "dora_input") else f"lycoris.{kind}",
        "ss_network_dim": lora_config.rank,
        "ss_network_alpha": lora_config.lora_alpha,
        "ss_network_args": {"targets": lora_config.targets},
        "ss_base_model_version": family,
        "ss_optimizer": f"{type(trainer.optimizer).__module__}.{type(trainer.optimizer).__qualname__}",
        "ss_learning_rate": config.learning_rate,
        "ss_lr_scheduler": chosen.lr_schedule if chosen else config.lr_schedule,
        "ss_lr_warmup_steps": chosen.warmup_steps(config.batch_size) if chosen else config.warmup_steps,
        "ss_gradient_accumulation_steps": trainer.accumulate,
        "ss_steps": trainer.step,
        "ss_max_train_steps": config.steps,
        "ss_batch_size_per_device": config.batch_size,
        "ss_num_train_images": len(trainer.dataset),
        "ss_seed": config.seed,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_timestep_sampling": config.timestep_density.density if config.timestep_density else config.density,
        "ss_min_snr_gamma": config.objective.gamma if config.objective.weighting == "min_snr" else None,
        "ss_noise_offset": config.objective.offset_noise or None,
        "ss_ip_noise_gamma": config.objective.input_perturbation or None,
        "ss_multires_noise_discount": config.objective.pyramid_discount or None,
        "ss_loss_type": {"mse": "l2"}.get(config.objective.loss, config.objective.loss),
        "ss_discrete_flow_shift": denoiser.shift,
        "ss_training_finished_at": time.time(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": "ComfyUI",
        "modelspec.title": f"{family} LoRA, {trainer.step} steps",
        "modelspec.resolution": f"{latent.shape[-1] * 8}x{latent.shape[-2] * 8}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.prediction_type": denoiser.prediction,
        "tidetable_validation": [event.loss for event in reporter.validations],
        "tidetable_config": {"train": asdict(config), "lora": asdict(lora_config)},
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
        if value is not None
    }
