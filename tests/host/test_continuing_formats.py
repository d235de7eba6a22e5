"""Files of other trainers to continue from: the first step starts at what ComfyUI's own loader makes of the file."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tidetable.runtime import paths, tiny
from tidetable.runtime.continuing import continued_network
from tidetable.runtime.lora_files import read_lora
from tidetable.runtime.saving import save_lora_model
from tidetable.runtime.training import AdapterConfig, train_lora
from tidetable.tests.host import model_zoo
from tidetable.tests.host.comparing import inference_copy
from tidetable.tests.host.model_zoo import zoo
from tidetable.tests.host.test_diffusers_format import FAMILIES, WITH_MAP, changed_weights, random_lora
from tidetable.tests.host.test_training import CONFIG, LORA, data  # noqa: F401


LONGER = replace(CONFIG, steps=20, learning_rate=1e-2)
LINEAR, CONV = "middle_block.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2"


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    monkeypatch.setattr(model_zoo, "ZOO", FAMILIES)


def factors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def forms():
    """Name -> what LyCORIS writes for the linear layer (64 to 64) and the 3×3 convolution (32 to 32 channels)."""
    alpha = {"alpha": torch.tensor(2.0)}
    yield "lora", {**factors(**{"lora_up.weight": (64, 4), "lora_down.weight": (4, 64)}), **alpha}, LINEAR
    yield "no alpha", factors(**{"lora_up.weight": (64, 4), "lora_down.weight": (4, 64)}), LINEAR
    up = {"lora_up.weight": (32, 4, 1, 1)}
    yield "locon", {**factors(**up, **{"lora_down.weight": (4, 32, 3, 3)}), **alpha}, CONV
    tucker = {"lora_down.weight": (4, 32, 1, 1), "lora_mid.weight": (4, 4, 3, 3)}
    yield "locon tucker", {**factors(**up, **tucker), **alpha}, CONV
    first = {"hada_w1_a": (32, 4), "hada_w2_a": (32, 4)}
    yield "loha", {**factors(**first, hada_w1_b=(4, 288), hada_w2_b=(4, 288)), **alpha}, CONV
    cores = {"hada_t1": (4, 4, 3, 3), "hada_t2": (4, 4, 3, 3)}
    sides = {f"hada_w{number}_{side}": (4, 32) for number in (1, 2) for side in "ab"}
    yield "loha tucker", {**factors(**sides, **cores), **alpha}, CONV
    whole, split = {"lokr_w1": (4, 8)}, {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 8)}
    second, products = {"lokr_w2": (16, 8)}, {"lokr_w2_a": (16, 4), "lokr_w2_b": (4, 8)}
    for name, one in (("whole", whole), ("split", split)):
        for other, two in (("whole", second), ("split", products)):
            yield f"lokr {name} {other}", {**factors(**one, **two), **alpha}, LINEAR
    yield "lokr conv", {**factors(lokr_w1=(4, 4), lokr_w2=(8, 8, 3, 3)), **alpha}, CONV


FORMS = {name: (tensors, layer) for name, tensors, layer in forms()}


def continued(model, name):
    """Layer -> change of its weight at the first step."""
    network = continued_network(model.model, AdapterConfig(continue_from=name), torch.device("cpu"))
    return {layer: adapter.delta().detach() for layer, adapter in network.adapters.items()}


def stock_changes(model, name):
    changed, base = changed_weights(model, name), model.model.state_dict()
    deltas = {key: changed[key] - base[key] for key in base if not torch.equal(changed[key], base[key])}
    return {key.removeprefix("diffusion_model.").removesuffix(".weight"): delta for key, delta in deltas.items()}


def assert_same(ours, stock):
    assert ours.keys() == stock.keys() and ours
    for layer, delta in stock.items():
        assert torch.allclose(ours[layer].reshape(delta.shape), delta, atol=1e-5), layer


def write(name, tensors, **header):
    paths.loras_folder().mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        paths.loras_folder() / name,
        {"format": "pt", **header},
    )
    return name


@pytest.mark.parametrize("prefix", ["kohya", "generic"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_as_the_stock_loader_has_it(form, prefix):
    model, (tensors, layer) = zoo("sd15"), FORMS[form]
    named = f"lora_unet_{layer.replace('.', '_')}" if prefix == "kohya" else f"diffusion_model.{layer}"
    name = write("form.safetensors", {f"{named}.{suffix}": tensor for suffix, tensor in tensors.items()})
    assert_same(continued(model, name), stock_changes(model, name))


def test_lokr_in_tucker_form_starts_at_lycoris_formula():
    """ComfyUI's loader fails on it with this torch (a view of a tensor that is not contiguous) and leaves the layer."""
    core = {"lokr_w2_a": (4, 8), "lokr_w2_b": (4, 8), "lokr_t2": (4, 4, 3, 3)}
    found = factors(lokr_w1=(4, 4), **core)
    w2 = torch.einsum("ijkl,jr,ip->prkl", found["lokr_t2"], found["lokr_w2_b"], found["lokr_w2_a"]).contiguous()
    expected = torch.kron(found["lokr_w1"][:, :, None, None], w2) * (2.0 / 4)
    tensors = {f"diffusion_model.{CONV}.{key}": tensor for key, tensor in found.items()}
    name = write("tucker.safetensors", {**tensors, f"diffusion_model.{CONV}.alpha": torch.tensor(2.0)})
    assert_same(continued(zoo("sd15"), name), {CONV: expected})


@pytest.mark.parametrize("name", WITH_MAP)
def test_slices_of_fused_layers_become_one_adapter_of_the_layer(name):
    """Our own export cuts one adapter, so the same rank comes back; a trainer's own has a down for each name."""
    model = zoo(name)
    lora = random_lora(model)
    file = save_lora_model(lora, f"tests/slices-{name}", form="diffusers")
    assert_same(continued(model, file), stock_changes(model, file))
    network = continued_network(model.model, AdapterConfig(continue_from=file), torch.device("cpu"))
    ranks = {key.removeprefix("diffusion_model.").split(".lora_")[0]: len(lora[key]) for key in lora if "_down" in key}
    assert {layer: adapter.rank for layer, adapter in network.adapters.items()} == ranks
    tensors = {key: tensor.clone() for key, tensor in read_lora(file).items() if not key.endswith(".alpha")}
    generator = torch.Generator().manual_seed(1)
    own = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items() if "down" in key or
           ".lora_A" in key}  # fmt: skip
    tensors = {key: own.get(key, tensor) for key, tensor in tensors.items()}
    assert_same(continued(model, write("own.safetensors", tensors)), stock_changes(model, "own.safetensors"))


def test_some_rows_of_a_fused_layer_are_enough():
    model = zoo("sd3")
    tensors = {
        f"transformer.transformer_blocks.0.attn.{name}.lora_{side}.weight": torch.randn(shape)
        for name in ("to_q", "to_v")
        for side, shape in (("A", (3, 64)), ("B", (64, 3)))
    }
    name = write("some.safetensors", tensors)
    assert_same(continued(model, name), stock_changes(model, name))
    delta = continued(model, name)["joint_blocks.0.x_block.attn.qkv"]
    assert delta[:64].norm() > 0 and delta[128:].norm() > 0 and delta[64:128].norm() == 0


@pytest.mark.parametrize("where", ["header", "beside"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_alphas_with_patterns_and_rslora(where, rslora):
    """PEFT's scale is lora_alpha / r, or / sqrt(r), with exceptions by pattern; the tensors do not say."""
    model = zoo("sd15")
    one, other = (f"mid_block.attentions.0.transformer_blocks.0.attn{number}.to_out.0" for number in (1, 2))
    tensors = {}
    for module, rank in ((one, 4), (other, 2)):
        width = 64
        tensors |= {
            f"{module}.lora_A.weight": torch.randn(rank, width),
            f"{module}.lora_B.weight": torch.randn(64, rank),
        }
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {f"^{other}": 2}, "alpha_pattern": {"attn2.to_out.0": 3}}
    settings["use_rslora"] = rslora
    config = paths.loras_folder() / "adapter_config.json"
    try:
        if where == "header":
            text = json.dumps(
                {f"unet.{key}": value for key, value in settings.items()} | {"text_encoder.lora_alpha": 99}
            )
            files = {f"unet.{key}": tensor for key, tensor in tensors.items()}
            name = write("peft-header.safetensors", files, lora_adapter_metadata=text)
        else:
            config.write_text(json.dumps({"peft_type": "LORA", **settings}))
            name = write("peft-beside.safetensors", {f"base_model.model.{key}": t for key, t in tensors.items()})
        found = continued(model, name)
    finally:
        config.unlink(missing_ok=True)
    for module, alpha, rank in ((one, 8, 4), (other, 3, 2)):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        layer = f"middle_block.1.transformer_blocks.0.{module.split('.')[-3]}.to_out.0"
        expected = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"] * scale
        assert torch.allclose(found[layer], expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["locon tucker", "loha tucker", "lokr whole whole", "lokr split split", "lokr conv"])
def test_training_goes_on_and_the_stock_loader_reads_the_result(form, data):  # noqa: F811
    tensors, layer = FORMS[form]
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    weights = {name: getattr(m, "weight", None) for name, m in model.model.diffusion_model.named_modules()}
    shape = (64, 64) if layer == LINEAR else (32, 32, 3, 3)
    layer = [name for name, weight in weights.items() if weight is not None and weight.shape == shape][-1]
    tensors = {f"diffusion_model.{layer}.{key}": value for key, value in tensors.items()}
    start = continued(model, write("goes-on.safetensors", tensors))[layer]
    first = next(iter(tensors))
    tensors[first] = tensors[first] * (
        2 * weights[layer].norm() / start.norm()
    )  # so wrong that there is a lot to learn
    name = write("goes-on.safetensors", tensors)
    start = continued(model, name)[layer]
    with torch.inference_mode():
        result = train_lora(model, data[0], LONGER, LORA, adapter=AdapterConfig(continue_from=name))
    assert result.loss_map["validation_loss"][-1] < 0.98 * result.loss_map["validation_loss"][0]
    saved = save_lora_model(result.lora, "tests/goes-on")
    end = stock_changes(model, saved)[layer]
    assert not torch.allclose(end, start.reshape(end.shape), atol=1e-3)
    assert_same(continued(model, saved), {layer: end})
    kind = result.lora.metadata["ss_network_module"]
    assert kind == ("networks.lora" if form.startswith("locon") else f"lycoris.{form[:4]}")


def test_what_cannot_be_continued_says_what_to_do_instead():
    model = zoo("sd15")
    base = {f"diffusion_model.{LINEAR}.{suffix}": tensor for suffix, tensor in FORMS["lora"][0].items()}
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(2, 2)}
    whole = {f"diffusion_model.{LINEAR}.diff": torch.zeros(64, 64)}
    cases = {
        "nothing but a text encoder's layers .*Use another file": text,
        "is empty: it has no tensors": {},
        "whole new weight .*put Load LoRA with this file in front": whole,
        "tensors that ComfyUI's loader does not read, the first is .*lora_B.bias": {
            **base,
            f"diffusion_model.{LINEAR}.lora_B.bias": torch.zeros(64),
        },
        "PEFT's DoRA": {f"diffusion_model.{LINEAR}.lora_magnitude_vector.weight": torch.zeros(64)},
        r"up is \(32, 4\), the layer needs \(64, 4\)": {
            **base,
            f"diffusion_model.{LINEAR}.lora_up.weight": torch.zeros(32, 4),
        },
        "do not make a weight of": {f"diffusion_model.{LINEAR}.lokr_w{number}": torch.zeros(3, 3) for number in (1, 2)},
        "kind loha with DoRA cannot be continued: put Load LoRA": {
            **{f"diffusion_model.{LINEAR}.{key}": tensor for key, tensor in factors(
                hada_w1_a=(64, 2), hada_w1_b=(2, 64), hada_w2_a=(64, 2), hada_w2_b=(2, 64)).items()},
            f"diffusion_model.{LINEAR}.dora_scale": torch.ones(64, 1),
        },
    }  # fmt: skip
    for reason, tensors in cases.items():
        with pytest.raises(ValueError, match=reason):
            continued(model, write("refused.safetensors", tensors))
    (paths.loras_folder() / "nothing.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        continued(model, "nothing.safetensors")
    with pytest.raises(ValueError, match="settings of bad.safetensors are not JSON"):
        continued(model, write("bad.safetensors", base, lora_adapter_metadata="{"))
