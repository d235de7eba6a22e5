"""A file to continue from gives the adapter that was saved, whatever its key names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tidetable.runtime import paths, tiny
from tidetable.runtime.continuing import continued_network
from tidetable.runtime.saving import save_lora_model
from tidetable.runtime.training import AdapterConfig, train_lora
from tidetable.tests.host.comparing import inference_copy
from tidetable.tests.host.test_training import CONFIG, LORA, data  # noqa: F401


def trained(data, name="unet-v", **settings):  # noqa: F811
    config = AdapterConfig(**{"rank": 4, "lora_alpha": 2.0, "targets": "linear_conv", **settings})
    with torch.inference_mode():
        return train_lora(inference_copy(tiny.load_tiny_model(name)), data[0], CONFIG, LORA, adapter=config).lora


def restored(name, model="unet-v"):
    real = tiny.load_tiny_model(model).model
    network = continued_network(real, AdapterConfig(continue_from=name), torch.device("cpu"))
    return {f"diffusion_model.{layer}.{key}": t for layer, parts in network.saved() for key, t in parts.items()}


@pytest.mark.parametrize("kind", ["lora", "dora", "dora_input", "loha"])
def test_a_file_comes_back_as_what_was_saved(kind, data):  # noqa: F811
    lora = trained(data, kind=kind)
    back = restored(save_lora_model(lora, "tests/continue"))
    assert back.keys() == lora.keys()
    assert all(torch.allclose(back[key], lora[key], atol=1e-7) for key in lora)


def test_kohya_and_peft_names_and_the_alpha_of_a_peft_header(data):  # noqa: F811
    lora, folder = trained(data), paths.loras_folder()
    kohya = {
        "lora_unet_" + key.removeprefix("diffusion_model.").split(".lora_")[0].removesuffix(".alpha").replace(".", "_")
        + (".alpha" if key.endswith(".alpha") else ".lora_" + key.split(".lora_")[1]): value
        for key, value in lora.items()
    }  # fmt: skip
    peft = {
        key.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): value
        for key, value in lora.items()
        if not key.endswith(".alpha")
    }
    save_file(kohya, folder / "kohya.safetensors")
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2.0})}
    save_file(peft, folder / "peft.safetensors", metadata=header)
    for name in ("kohya.safetensors", "peft.safetensors"):
        back = restored(name)
        up = [key for key in lora if key.endswith("lora_up.weight") and lora[key].shape[1] == 4]
        assert back.keys() == lora.keys() and all(torch.equal(back[key], lora[key]) for key in up)
        assert all(back[key.replace("lora_up.weight", "alpha")] == 2.0 for key in up)


def test_a_run_goes_on_from_a_file(data):  # noqa: F811
    lora = trained(data)
    again = trained(data, continue_from=save_lora_model(lora, "tests/go-on"))
    assert again.keys() == lora.keys()
    assert any(not torch.equal(again[key], lora[key]) for key in lora)


def test_a_file_of_another_architecture_or_none_at_all_is_refused(data):  # noqa: F811
    name = save_lora_model(trained(data, "mmdit-flow"), "tests/other")
    with pytest.raises(
        ValueError, match=r"is not for this model: \d+ of its \d+ layers are missing here, the first is"
    ):
        restored(name)
    with pytest.raises(ValueError, match="there is no LoRA 'nowhere'"):
        restored("nowhere")
    (paths.loras_folder() / "cut.safetensors").write_bytes((paths.loras_folder() / name).read_bytes()[:999])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        restored("cut.safetensors")
