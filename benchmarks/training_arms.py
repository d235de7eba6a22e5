"""The trainers that `bench training` compares: each trains one of its cases for some steps. All train the same tensors.

ComfyUI's own node trains a rank 16 pair for every linear layer and convolution, and a change of every norm and bias; it
cannot be told otherwise. So do `tidetable` and `loop` here. `tidetable-node` is our node as it is, at its widest
targets: low-rank pairs alone.
"""

import inspect
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_train import TrainLoraNode
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tidetable.runtime.gradients import memory_saving
from tidetable.runtime.progress import TrainingReporter
from tidetable.runtime.trainable import ComfyDenoiser, training_session
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.training.adapter_kinds import AdapterNetwork, LowRank
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.adapters import hooked, select_targets
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.engine import Trainer
from tidetable.training.memory import MemoryConfig
from tidetable.training.recipe import ObjectiveConfig

from .training_cases import RANK, Data
from .training_loop import PlainLoop


X0 = ObjectiveConfig(prediction="x0")
RATE = 1e-4
KNOWN = inspect.signature(TrainLoraNode.execute).parameters
LORA = LoRAConfig(rank=RANK, lora_alpha=1.0, targets="linear_conv")  # ComfyUI's node has alpha 1, always


@dataclass(frozen=True)
class How:
    """What the arms are asked besides a case."""

    dtype: str = "fp32"
    """In ComfyUI's words, of its node's arithmetic and adapters. Ours computes as the model does, adapters in fp32."""
    checkpointing: bool = False
    """Of each trainer by its blocks: ours, and what ComfyUI calls depth 2 (0.3.75 has the whole network only)."""

    def memory(self) -> MemoryConfig:
        return MemoryConfig(gradient_checkpointing="blocks" if self.checkpointing else "off")


PLAIN = How()


@dataclass
class Steps:
    """When each optimizer step was reached, and with which parameters and gradients where `keep` names the step."""

    started: float = 0.0
    times: list[tuple[float, float]] = field(default_factory=list)
    """By the clock, and of the processor."""
    keep: tuple[int, ...] = ()
    kept: list[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=list)
    """Address of a parameter -> (value, gradient) at each of the steps in `keep`."""

    @contextmanager
    def watched(self) -> Iterator["Steps"]:
        """Through torch's own hook before every optimizer's step: nothing of any trainer is replaced."""
        handle = register_optimizer_step_pre_hook(self._note)
        self.started = time.perf_counter()
        try:
            yield self
        finally:
            handle.remove()

    def median_step(self, warmup: int) -> tuple[float, float]:
        """(seconds, processor's seconds) from one update to the next, without the first `warmup` steps (at least 1)."""
        both = zip(*self.times[warmup - 1 :], strict=True)
        wall, cpu = ([after - before for before, after in pairwise(times)] for times in both)
        return statistics.median(wall), statistics.median(cpu)

    def _note(self, optimizer, args, kwargs) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))
        if len(self.times) - 1 in self.keep:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.kept.append({p.data_ptr(): (p.detach().clone(), p.grad.clone()) for p in parameters})


class WholeNetwork(AdapterNetwork):
    """Low-rank pairs on every linear layer and convolution, and every norm and bias beside them."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device):
        super().__init__(select_targets(modules, "linear_conv"), AdapterConfig(**asdict(LORA)), device)
        for adapter in self.adapters.values():
            self._to_full_rank(adapter)
        self.copies: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        """Trained in place of a norm's weight and bias or of a linear layer's bias."""
        self.changes: dict[str, tuple[nn.Module, nn.Parameter]] = {}
        """Added to a convolution's output: for its own bias torch computes the gradient of the whole kernel."""
        for name, module in modules.items():
            if not hasattr(module, "weight_function"):
                continue  # not one of ComfyUI's layers: its node goes by this
            weight, bias = module.weight, getattr(module, "bias", None)
            if name not in self.layers and weight is not None:
                self.copies[f"{name}.diff"] = module, "weight", nn.Parameter(weight.detach().clone())
            if isinstance(module, nn.Conv2d) and bias is not None:
                self.changes[f"{name}.diff_b"] = module, nn.Parameter(torch.zeros_like(bias))
            elif bias is not None:
                self.copies[f"{name}.diff_b"] = module, "bias", nn.Parameter(bias.detach().clone())

    def trainable(self) -> list[nn.Parameter]:
        return list(self.named().values())

    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, under the names of a LoRA file."""
        pairs = {
            f"{name}.{suffix}.weight": factor
            for name, adapter in self.adapters.items()
            for suffix, factor in (("lora_up", adapter.up), ("lora_down", adapter.down))
        }
        others = {name: entry[-1] for name, entry in {**self.copies, **self.changes}.items()}
        return {**pairs, **others}

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = [(module, name, getattr(module, name)) for module, name, _ in self.copies.values()]
        hooks = [(module, _shift(change)) for module, change in self.changes.values()]
        try:
            for module, name, copy in self.copies.values():
                setattr(module, name, copy)
            with super().installed(), hooked(hooks):
                yield
        finally:
            for module, name, old in before:
                setattr(module, name, old)

    @staticmethod
    def _to_full_rank(adapter: LowRank) -> None:
        """ComfyUI's node gives a layer with 3 outputs rank 16 too."""
        down, up = adapter.down.detach(), adapter.up.detach()
        missing = RANK - len(down)
        if missing:
            adapter.down = nn.Parameter(torch.cat([down, down.new_zeros(missing, *down.shape[1:])]))
            adapter.up = nn.Parameter(up.new_zeros(len(up), RANK, *up.shape[2:]))


def _shift(change: Tensor):
    return lambda layer, args, output: output + change[:, None, None]


def train_tidetable(model: ModelPatcher, data: Data, batch: int, steps: int, how: How = PLAIN) -> None:
    config = TrainConfig(
        steps=steps, batch_size=batch, learning_rate=RATE, warmup_steps=0, lr_schedule="constant", objective=X0
    )
    samples = TrainingData(data.latents, data.positive).samples()
    reporter = TrainingReporter(steps, None)
    with training_session(model) as denoiser:
        diffusion_model = denoiser.real.diffusion_model
        network = WholeNetwork(dict(diffusion_model.named_modules()), denoiser.device)
        trainer = Trainer(config, denoiser, network.trainable(), denoiser.dataset(samples, data.positive))
        with network.installed(), memory_saving(diffusion_model, how.memory()):
            for event in trainer.run():
                reporter(event)


def train_node(model: ModelPatcher, data: Data, batch: int, steps: int, how: How = PLAIN) -> None:
    config = TrainConfig(
        steps=steps, batch_size=batch, learning_rate=RATE, warmup_steps=0, lr_schedule="constant", objective=X0
    )
    train_lora(model, TrainingData(data.latents, data.positive), config, LORA, memory=how.memory())


def train_core(
    model: ModelPatcher, data: Data, batch: int, steps: int, how: How = PLAIN, bypass: bool = False
) -> tuple[dict, list[float]]:
    """(trained tensors by name, losses)."""
    settings = {
        "batch_size": batch, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": RATE, "rank": RANK,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": how.dtype, "lora_dtype": how.dtype,
        "algorithm": "LoRA", "gradient_checkpointing": how.checkpointing, "checkpoint_depth": 2,
        "existing_lora": "[None]", "quantized_backward": False, "offloading": False, "bucket_mode": False,
        "bypass_mode": bypass,
    }  # fmt: skip
    chosen = {name: [value] for name, value in settings.items() if name in KNOWN}
    outputs = TrainLoraNode.execute(model=[model], latents=data.latents, positive=data.positive, **chosen).args
    trained, losses = outputs[-3:-1]  # newer ComfyUI has no MODEL before them
    return trained, losses["loss"]


def train_core_bypass(
    model: ModelPatcher, data: Data, batch: int, steps: int, how: How = PLAIN
) -> tuple[dict, list[float]]:
    return train_core(model, data, batch, steps, how, bypass=True)


def train_loop(model: ModelPatcher, data: Data, batch: int, steps: int, how: How = PLAIN) -> None:
    if how != PLAIN:
        raise ValueError("the plain loop trains in fp32 and without checkpointing only")
    with torch.inference_mode(False), torch.enable_grad():
        latents = torch.cat([latent["samples"] for latent in data.latents])
        contexts = torch.cat([conditioning[0][0] for conditioning in data.positive])
        pooled = torch.cat([conditioning[0][1]["pooled_output"] for conditioning in data.positive])
        tensors = (tensor.clone().to(model.load_device) for tensor in (latents, contexts, pooled))
        plain_loop(model).run(*tensors, batch, steps, lr=RATE, weight_decay=0.0, fused=True)


def plain_loop(model: ModelPatcher) -> PlainLoop:
    table = getattr(model.model.model_sampling, "sigmas", None)
    flow = ComfyDenoiser(model).process.name == "flow"
    alpha_bar = None if flow else (1 / (1 + table.double() ** 2)).float().to(model.load_device)
    return PlainLoop(model.model.diffusion_model.to(model.load_device), alpha_bar)


ARMS = {"tidetable": train_tidetable, "core": train_core, "loop": train_loop, "tidetable-node": train_node}
if "bypass_mode" in KNOWN:
    ARMS["core-bypass"] = train_core_bypass


def run_arm(
    arm: str, model: ModelPatcher, data: Data, batch: int, steps: int, keep: tuple[int, ...] = (), how: How = PLAIN
):
    """(what the arm returned, its Steps), in inference mode as ComfyUI runs nodes."""
    with torch.inference_mode(), Steps(keep=keep).watched() as watch:
        returned = ARMS[arm](model, data, batch, steps, how)
    comfy.model_management.unload_all_models()
    return returned, watch
