"""Trainings in a process that is started with options of ComfyUI's own: `offload_child.py FILE dynamic|plain OPTION…`.

The LoRAs of a run with as many weights on the device as fit, and of one with them in main memory, go to FILE. `dynamic`
hands over a MODEL with dynamic VRAM, as newer ComfyUI's loaders make them on a graphics card.
"""

import importlib
import logging
import sys
from pathlib import Path


PLACES = ("auto", "offload")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from devtools import loading

    file, kind, *options = sys.argv[1:]
    sys.argv = [sys.argv[0], *options]  # read by ComfyUI when `comfy.cli_args` is imported
    logging.basicConfig(level=logging.INFO)
    loading.load_checkout()
    sys.path.insert(0, str(loading.comfyui_path()))
    importlib.import_module("comfy.options").enable_args_parsing()
    if kind == "dynamic":  # before ComfyUI's own modules look for it, as main.py does
        importlib.import_module("comfy_aimdo.control").init()
    loading.prepare_host(Path(file).parent)

    import comfy.model_management
    from safetensors.torch import save_file

    from tidetable.tests.host import offload_child

    found = {}
    for place in PLACES:
        for name, tensor in offload_child.learned(place, offload_child.model_of(kind)).items():
            found[f"{place}.{name}"] = tensor.contiguous()
    save_file(found, file, metadata={"state": comfy.model_management.vram_state.name})


def learned(place: str, model=None):
    """The LoRA of a short run with the weights in one place; the model's weights are the same bits afterwards."""
    import torch

    from tidetable.runtime.training import TrainingData, train_lora
    from tidetable.training.config import LoRAConfig, TrainConfig
    from tidetable.training.memory import MemoryConfig

    def normal(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    model = model or model_of("plain")
    config = TrainConfig(steps=3, batch_size=2, learning_rate=1e-2, warmup_steps=0, seed=3)
    prompts = [[[normal(1, 6, 128, seed=i), {"pooled_output": normal(1, 128, seed=9 + i)}]] for i in range(2)]
    data, lora = TrainingData([{"samples": normal(2, 3, 16, 16, seed=5)}], prompts), LoRAConfig(rank=4, lora_alpha=4.0)
    before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
    with torch.inference_mode():
        result = train_lora(model, data, config, lora, memory=MemoryConfig(base_weights=place))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.model.state_dict().items())
    return result.lora


def model_of(kind: str):
    import comfy.model_patcher
    import torch

    from tidetable.runtime.tiny import load_tiny_model

    plain = load_tiny_model("unet-v")
    if kind == "plain":
        return plain
    cpu = torch.device("cpu")
    # Only for a graphics card is it made as a dynamic one; then it is moved, as ComfyUI's Select Model Device does.
    model = comfy.model_patcher.ModelPatcherDynamic(plain.model, torch.device("cuda", 0), cpu)
    model.load_device = cpu
    model.register_load_device(cpu)
    assert model.is_dynamic()
    refuse_what_cannot_load_twice(model)
    model.cached_patcher_init = (load_tiny_model, ("unet-v",))
    return model


def refuse_what_cannot_load_twice(model) -> None:
    import pytest

    from tidetable.runtime.trainable import training_session

    with pytest.raises(ValueError, match="--disable-dynamic-vram"), training_session(model):
        pass


if __name__ == "__main__":
    main()
