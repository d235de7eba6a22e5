"""Runs in which several processes share the base: `sharded_child.py RANK SIZE RENDEZVOUS FOLDER CASE…`, each to files.

The process that tests makes the same runs alone, with `run_case`.
"""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from devtools import loading

    sys.argv, ARGUMENTS = sys.argv[:1], sys.argv[1:]
    loading.tolerate_torchvision()
    loading.prepare_host(Path(ARGUMENTS[3]) / f"base{ARGUMENTS[0]}")
    loading.load_checkout()

import folder_paths
import torch
import torch.distributed as dist
from comfy.samplers import sampler_object
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from tidetable.runtime import tiny
from tidetable.runtime.finetune import finetune
from tidetable.runtime.previews import PreviewConfig
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.runtime.training_run import RunConfig
from tidetable.tests.host.comparing import inference_copy
from tidetable.tests.host.gradient_cases import network_of, prompts_of, samples_of
from tidetable.tests.host.guidance_models import build, normal, prompt
from tidetable.tests.host.test_gradient_proof import Wrong, between_blocks
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.config import LoRAConfig, TrainConfig, with_optimizer
from tidetable.training.distributed import PATIENCE, World, leave
from tidetable.training.memory import MemoryConfig
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.sharding import local_bytes


LORA = LoRAConfig(rank=4, lora_alpha=4.0)
PLAIN = OptimizerConfig(name="sgd", lr_schedule="constant", warmup=0, max_grad_norm=0.0, accumulate=2)
"""Adam would make a difference of its own out of a gradient that is nearly 0."""
ONCE = replace(PLAIN, accumulate=1)
ADAMW = replace(PLAIN, name="adamw", max_grad_norm=1.0)
BLOCKS = MemoryConfig(gradient_checkpointing="blocks")
TEXTS = TrainingData([{"samples": normal(8, 3, 8, 8)}], [prompt(i, 6 + 3 * (i % 3 == 0)) for i in range(8)])
"""Texts of two lengths: a process may need one forward pass where another needs two."""


def unheard_of(**methods):
    """An MMDiT as a class of its own, whose gradients are to be proven."""
    model = build("mmdit")
    network = model.model.diffusion_model
    network.__class__ = type("UnheardOf", (type(network),), methods)
    return model


def case(name: str) -> tuple:
    """(model, data, other settings)."""
    if name == "mmdit":
        data = replace(TEXTS, validation_percent=25)
        return build("mmdit"), data, {"adapter": AdapterConfig(rank=4, kind="dora_input"), "shard_base": True}
    if name == "unet":
        return build("unet"), TEXTS, {"adapter": AdapterConfig(rank=4, targets="linear_conv"), "shard_base": True,
                                      "memory": BLOCKS}  # fmt: skip
    if name == "unknown":
        return unheard_of(), TEXTS, {"shard_base": True, "memory": BLOCKS, "optimizer": ONCE}
    if name == "wrong":
        return unheard_of(forward=between_blocks(Wrong.apply)), TEXTS, {"optimizer": ONCE}
    if name == "preview":
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        preview = PreviewConfig(
            sampler=sampler_object("euler"), sigmas=sigmas, positive=[prompt(1)], negative=prompt(2)
        )
        return build("mmdit"), TEXTS, {"preview": preview}
    data = TrainingData([{"samples": samples_of("flux")}], prompts_of("flux"))
    memory = BLOCKS if name == "flux" else None
    return network_of("flux"), data, {"memory": memory, "shard_base": True}


def run_case(name: str) -> tuple[dict, dict]:
    """(LoRA, what else is to be compared)."""
    model, data, settings = case(name)
    network = inference_copy(model).model.diffusion_model
    originals = [StorageWeakRef(parameter.untyped_storage()) for parameter in network.parameters()]
    facts: dict = {"alive": [], "whole": local_bytes(network), "error": ""}
    count = lambda module, args: facts["alive"].append(sum(not ref.expired() for ref in originals))  # noqa: E731
    handle = network.register_forward_pre_hook(count)
    config = TrainConfig(steps=2, batch_size=2 if name.startswith("flux") else 4, learning_rate=0.1, warmup_steps=0)
    lora = {}
    try:
        result = train_lora(model, data, config, LORA, **{"optimizer": PLAIN, **settings})
        lora = dict(result.lora)
        facts |= {key: result.loss_map.get(key, []) for key in ("loss", "validation_loss")}
    except ValueError as error:
        facts["error"] = str(error)
    handle.remove()
    facts["part"] = local_bytes(network)
    return lora, facts


def run_all(name: str, steps: int, output: Path) -> tuple[dict, dict]:
    """(all weights, what else is to be compared) after `steps` steps, from the checkpoint in `output` on."""
    folder_paths.set_output_directory(str(output))
    network = "unet-v" if name.startswith("unet") else "mmdit-flow"
    model = inference_copy(tiny.load_tiny_model(network))
    optimizer = ADAMW if name.endswith("adamw") else replace(PLAIN, ema_decay=0.5)
    rate = 1e-4 if name.endswith("adamw") else 1e-2
    config = with_optimizer(TrainConfig(steps=steps, batch_size=4, learning_rate=rate), optimizer)
    memory = BLOCKS if network == "unet-v" else None
    weights = finetune(model, TEXTS, config, RunConfig(checkpoint_every_minutes=0.0), memory)
    return weights, {"whole": sum(w.nbytes for w in weights.values()), "part": local_bytes(model.model.diffusion_model)}


def main() -> None:
    rank, size, rendezvous, folder, *names = ARGUMENTS
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(size), timeout=PATIENCE
    )
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("tidetable.runtime.gradients").addHandler(handler)
    logging.getLogger("tidetable").setLevel(logging.INFO)
    for name in names:
        steps, _, full = name.partition("@")
        found, facts = run_all(full, int(steps), Path(folder, full)) if full else run_case(name)
        if found:
            save_file(found, Path(folder) / f"{name}_{rank}.safetensors")
        Path(folder, f"{name}_{rank}.json").write_text(json.dumps({**facts, "said": said[:]}))
        said.clear()
    assert World.current().size == int(size)
    leave()


if __name__ == "__main__":
    main()
