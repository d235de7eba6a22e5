"""A file with diffusers' names does in ComfyUI's own loader what the file with ComfyUI's names does."""

import json
import logging

import comfy.lora
import nodes as host_nodes
import pytest
import torch
from safetensors import safe_open

from tidetable.nodes.training import SaveLoRA
from tidetable.runtime import paths
from tidetable.runtime.diffusers_format import diffusers_names, to_diffusers
from tidetable.runtime.lora_keys import to_lora_model
from tidetable.runtime.saving import save_lora_model
from tidetable.runtime.trainable import training_session
from tidetable.tests.host import model_zoo
from tidetable.tests.host.model_zoo import ZOO, zoo
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig, match_targets


_FLUX = {**ZOO["flux"][1], "mlp_ratio": 4.0}  # as all of Flux; the map has it built in
_PIXART = {"image_model": "pixart_alpha", "depth": 1, "num_heads": 16, "hidden_size": 32, "model_max_length": 8}
FAMILIES = {**ZOO, "flux": ("Flux", _FLUX), "flux_schnell": ("FluxSchnell", _FLUX), "pixart": ("PixArtAlpha", _PIXART)}
WITHOUT_MAP = ("lumina2", "wan")
WITH_MAP = [name for name in FAMILIES if name not in WITHOUT_MAP]


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    monkeypatch.setattr(model_zoo, "ZOO", FAMILIES)


def random_lora(model, **settings):
    """A LORA_MODEL with every layer changed that has a name; ranks and strengths differ between layers."""
    config = AdapterConfig(**{"rank": 4, "lora_alpha": 3.0, "targets": "linear_conv", **settings})
    with training_session(model) as denoiser:
        names = diffusers_names(denoiser.real)
        layers = match_targets(dict(denoiser.real.diffusion_model.named_modules()), config)
        layers = {name: layer for name, layer in layers.items() if names is None or name in names.parts}
        network = AdapterNetwork(layers, config, denoiser.device)
        generator = torch.Generator().manual_seed(0)
        for parameter in network.trainable():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        lora = to_lora_model(network, {"ss_base_model_version": type(denoiser.real).__name__})
        lora.diffusers = names
    return lora


def changed_weights(model, name):
    """Every weight of the model as the stock loader patches it."""
    with torch.inference_mode():
        patches = host_nodes.LoraLoader().load_lora(model, None, name, 1.0, 0.0)[0].patches
        return {
            key: comfy.lora.calculate_weight(patches.get(key, []), tensor.clone(), key)
            for key, tensor in model.model.state_dict().items()
        }


@pytest.mark.parametrize("name", WITH_MAP)
def test_the_stock_loader_makes_the_same_weights_of_both_files(name, caplog):
    model = zoo(name)
    lora = random_lora(model, ranks="*q* = 2, *.0* = 3")
    with caplog.at_level(logging.WARNING):
        files = [save_lora_model(lora, f"tests/{name}", form=form) for form in ("comfyui", "diffusers")]
        ours, theirs = (changed_weights(model, file) for file in files)
    assert "lora key not loaded" not in caplog.text
    layers = {key.split(".lora_up")[0] + ".weight" for key in lora if ".lora_up" in key}
    base = model.model.state_dict()
    for key in layers:
        assert torch.allclose(ours[key], theirs[key], atol=1e-6), key
        assert not torch.allclose(ours[key], base[key], atol=1e-3), key
    assert all(torch.equal(theirs[key], base[key]) for key in base.keys() - layers)


@pytest.mark.parametrize("name", WITH_MAP)
def test_every_layer_that_presets_train_has_a_name(name):
    model = zoo(name).model
    names = diffusers_names(model)
    layers = match_targets(dict(model.diffusion_model.named_modules()), AdapterConfig(targets="attention_mlp"))
    assert not layers.keys() - names.parts.keys()


def test_the_header_is_what_peft_makes_its_settings_from():
    lora = random_lora(zoo("sd3"), ranks="*mlp* = 2")
    name = save_lora_model(lora, "tests/header", form="diffusers")
    with safe_open(paths.loras_folder() / name, "pt") as file:
        header, keys = file.metadata(), set(file.keys())
        ranks = {key.removesuffix(".lora_A.weight"): len(file.get_tensor(key)) for key in keys if ".lora_A." in key}
    settings = json.loads(header["lora_adapter_metadata"])
    assert header["ss_base_model_version"] == "SD3" and not any(key.endswith("alpha") for key in keys)
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4
    modules = set(settings["transformer.target_modules"])
    assert {f"transformer.{module}" for module in modules} == ranks.keys()
    for module in modules:
        pattern = settings["transformer.rank_pattern"].get(f"^{module}", 4)
        assert pattern == ranks[f"transformer.{module}"] == settings["transformer.alpha_pattern"].get(f"^{module}", 4)


def test_layers_of_clip_go_under_the_names_that_comfyui_knows_for_them():
    """As SDXL names its two text encoders; ComfyUI's map reads nothing of them but the names of their weights."""
    clip, layer = torch.nn.Module(), torch.nn.Linear(4, 4)
    for model in ("clip_l", "clip_g"):
        inner = clip
        for name in (model, "transformer", "text_model", "encoder", "layers", "3", "self_attn"):
            inner.add_module(name, torch.nn.Module())
            inner = getattr(inner, name)
        inner.add_module("q_proj", layer)
    known = comfy.lora.model_lora_keys_clip(clip, {})
    lora = random_lora(zoo("sd15"))
    kohya = [f"lora_te{number}_text_model_encoder_layers_3_self_attn_q_proj" for number in (1, 2)]
    for name in kohya:
        up, down, alpha = torch.randn(4, 2), torch.randn(2, 4), torch.tensor(3.0)
        lora |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
    tensors, header = to_diffusers(lora)
    before = comfy.lora.load_lora(dict(lora), known, log_missing=False)
    after = comfy.lora.load_lora(tensors, known, log_missing=False)
    assert before.keys() == after.keys() == {known[name] for name in kohya}
    for key in before:
        first, second = (
            comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], torch.zeros(4, 4), key)
            for patches in (before, after)
        )
        assert torch.allclose(first, second, atol=1e-6) and first.norm() > 0
    settings = json.loads(header)
    for name in ("text_encoder", "text_encoder_2"):
        assert settings[f"{name}.r"] == settings[f"{name}.lora_alpha"] == 2


@pytest.mark.parametrize("name", WITHOUT_MAP)
def test_a_family_without_a_map_is_refused(name):
    with pytest.raises(ValueError, match=r"no map of diffusers' layer names for \w+: use format 'comfyui'"):
        save_lora_model(random_lora(zoo(name)), "tests/refused", form="diffusers")


def test_what_diffusers_has_no_form_for_is_refused():
    for kind, reason in (("dora", "another norm"), ("loha", "no LoHa"), ("lokr", "no LoKr")):
        with pytest.raises(ValueError, match=f"no diffusers form .*{reason}.*: use format 'comfyui'"):
            save_lora_model(random_lora(zoo("sd15"), kind=kind), "tests/refused", form="diffusers")
    lora = {"diffusion_model.out.2.lora_up.weight": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match="not from Train LoRA"):
        save_lora_model(lora, "tests/refused", form="diffusers")


def test_a_layer_whose_rows_the_map_does_not_cover_is_refused(monkeypatch):
    """ComfyUI's map has Flux's ratio of 4 built in: with another, its slices are not the layer."""
    monkeypatch.setattr(model_zoo, "ZOO", ZOO)
    model = zoo("flux")
    assert "single_blocks.0.linear1" not in diffusers_names(model.model).parts
    lora = random_lora(model)
    lora["diffusion_model.single_blocks.0.linear1.lora_up.weight"] = torch.zeros(1, 1)
    lora["diffusion_model.single_blocks.0.linear1.lora_down.weight"] = torch.zeros(1, 1)
    lora["diffusion_model.single_blocks.0.linear1.alpha"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"no name for the layer single_blocks\.0\.linear1: use format 'comfyui'"):
        save_lora_model(lora, "tests/refused", form="diffusers")


def test_the_workflow_is_in_the_header_only_when_asked_for(monkeypatch):
    from comfy.cli_args import args
    from comfy_api.latest import io

    lora = random_lora(zoo("sd15"))
    graph, page = {"1": {"class_type": "Tidetable_SaveLoRA"}}, {"nodes": [1]}
    hidden = io.HiddenHolder.from_dict({io.Hidden.prompt: graph, io.Hidden.extra_pnginfo: {"workflow": page}})
    monkeypatch.setattr(SaveLoRA, "hidden", hidden)

    def header(**settings):
        name = SaveLoRA.execute(lora, "tests/workflow", "", **settings)[0]
        with safe_open(paths.loras_folder() / name, "pt") as file:
            return file.metadata()

    assert "prompt" not in header() and "workflow" not in header(format="diffusers")
    for form in ("comfyui", "diffusers"):
        found = header(format=form, include_workflow=True)
        assert json.loads(found["prompt"]) == graph and json.loads(found["workflow"]) == page
    monkeypatch.setattr(args, "disable_metadata", True)
    assert "prompt" not in header(include_workflow=True)
