"""Tiny MODELs whose base weights are stored small, in every format of the running ComfyUI and in one like GGUF's, and
the plain fp32 MODEL with the same weights.
"""

import json
from functools import partial

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.supported_models
import comfy.utils
import torch
from torch import nn

from tidetable.tests.host.gradient_cases import NETWORKS
from tidetable.tests.host.guidance_models import normal


BLOCK = 32
CPU = torch.device("cpu")


class Packed(torch.Tensor):
    """Signed bytes and a half precision scale for each 32 values of a row, in one row of bytes. Says another shape."""

    def __new__(cls, data, *, logical):
        del logical
        return super().__new__(cls, data)

    def __init__(self, data, *, logical):
        del data
        super().__init__()
        self.logical = logical

    @staticmethod
    def pack(weight):
        blocks = weight.float().reshape(len(weight), -1, BLOCK)
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
        codes = (blocks / scale.float()).round().to(torch.int8)
        data = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], -1)
        return Packed(data.reshape(len(weight), -1), logical=weight.shape)

    def unpacked(self):
        if self.logical is None:
            return torch.Tensor(self)  # type: ignore[call-arg]
        data = torch.Tensor.reshape(self, (-1, BLOCK + 2))
        scale, codes = data[:, :2].contiguous().view(torch.float16), data[:, 2:].contiguous().view(torch.int8)
        return torch.Tensor((scale.float() * codes).reshape(self.logical))

    @property
    def shape(self):
        return super().shape if getattr(self, "logical", None) is None else self.logical

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.logical = getattr(self, "logical", None)
        return new

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Notes patches on the tensors; the layers apply them in forward."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **others):
        weight = comfy.utils.get_attr(self.model, key)
        if key in self.patches:
            weight.patches = [(self.patches[key], key)]
        return weight

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for p in self.model.parameters():
            if unpatch_weights and isinstance(p, Packed):
                p.patches = []
        return super().unpatch_model(device_to, unpatch_weights)


class PackedOps(comfy.ops.manual_cast):
    """Layers that unpack their weight in every forward pass."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input):
            weight = self.weight.unpacked().to(input.dtype)
            for patches, key in getattr(self.weight, "patches", []):
                weight = comfy.lora.calculate_weight(patches, weight, key)
            bias = None if self.bias is None else self.bias.unpacked().to(input.dtype)
            return nn.functional.linear(input, weight, bias)


def with_operations(name, operations=None, prepare=None, dtype=torch.float32, **network):
    """The family's MODEL with random weights and other layers: computes in fp32, stores in `dtype`."""
    case = NETWORKS[name]
    config = getattr(comfy.supported_models, case.config)({**case.network, **network})
    config.set_inference_dtype(dtype, torch.float32)
    config.custom_operations = operations or comfy.ops.manual_cast
    model = config.get_model({}, "", device=CPU)
    values = {}
    for i, (key, shape) in enumerate(shapes_of(name, **network).items()):
        random = normal(*shape, seed=i)
        fan_in = random[0].numel() if len(shape) > 1 else 1
        values[key] = random / fan_in**0.5 if len(shape) > 1 else 0.1 * random + (0.0 if key.endswith("bias") else 1.0)
    for key, module in model.diffusion_model.named_modules():
        if prepare is not None and type(module).__name__ == "Linear":
            prepare(key, module, values)
    model.diffusion_model.load_state_dict(values, strict=False)
    model.requires_grad_(False).eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def shapes_of(name, **network):
    case = NETWORKS[name]
    config = getattr(comfy.supported_models, case.config)({**case.network, **network})
    config.set_inference_dtype(torch.float32, None)
    return {key: p.shape for key, p in config.get_model({}, "", device=CPU).diffusion_model.state_dict().items()}


def plain_fp8(name, operations=None, **network):
    """Weights cast to fp8, the rest of the layers too, as a loader with weight_dtype fp8_e4m3fn does."""
    return with_operations(name, operations, dtype=torch.float8_e4m3fn, **network)


def scaled_fp8(name, matrix_mult=False, **network):
    """ComfyUI 0.3.75: fp8 with one scale for each layer."""

    def prepare(key, module, values):
        weight = values[f"{key}.weight"]
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        values[f"{key}.weight"], values[f"{key}.scale_weight"] = (weight / scale).to(torch.float8_e4m3fn), scale

    operations = comfy.ops.scaled_fp8_ops(matrix_mult, override_dtype=torch.float8_e4m3fn)
    return with_operations(name, operations, prepare, **network)


def mixed(name, quantization="float8_e4m3fn", full_precision=True, input_scale=None, **network):
    """Layers of `QUANT_ALGOS`, through their own loading of a state dict."""
    layers = {key.removesuffix(".weight") for key, shape in shapes_of(name, **network).items() if len(shape) == 2}
    settings = {layer: {"format": quantization} for layer in layers}
    operations = comfy.ops.mixed_precision_ops(settings, torch.float32, full_precision)
    multiple = 256 if quantization in ("convrot_w4a4", "asym_w4a8_int8") else 1
    layout = comfy.quant_ops.QUANT_ALGOS[quantization]["comfy_tensor_layout"]

    def prepare(key, module, values):
        del module
        weight = values.pop(f"{key}.weight")
        if weight.shape[1] % multiple:
            values[f"{key}.weight"] = weight
            return
        if hasattr(comfy.quant_ops.QuantizedTensor, "state_dict"):  # newer ComfyUI
            quantize = {"scale": "recalculate"} if "int8" not in quantization else {}
            tensor = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **quantize)
            values.update(tensor.state_dict(f"{key}.weight"))
            values[f"{key}.comfy_quant"] = torch.tensor(list(json.dumps(settings[key]).encode()), dtype=torch.uint8)
        else:
            tensor = comfy.quant_ops.QuantizedTensor.from_float(weight, layout)
            values[f"{key}.weight"] = tensor._qdata
            values[f"{key}.weight_scale"] = tensor._layout_params["scale"]
        if input_scale is not None:
            values[f"{key}.input_scale"] = torch.tensor(input_scale)

    return with_operations(name, operations, prepare, **network)


def packed(name, **network):
    """The large weights packed, the small ones in the same class with a dtype that torch knows."""
    patcher = with_operations(name, PackedOps, **network)
    for module in patcher.model.diffusion_model.modules():
        if not isinstance(module, PackedOps.Linear):
            continue
        weight = module.weight.data
        new = Packed.pack(weight) if weight.shape[1] % BLOCK == 0 else Packed(weight, logical=None)
        module.weight = nn.Parameter(new, requires_grad=False)
        if module.bias is not None:
            module.bias = nn.Parameter(Packed(module.bias.data, logical=None), requires_grad=False)
    return PackedPatcher(patcher.model, load_device=CPU, offload_device=CPU)


def plain_twin(patcher, name, **network):
    """The MODEL in fp32 with the weights that the layers of `patcher` compute with."""
    twin = with_operations(name, comfy.ops.disable_weight_init, **network)
    layers = dict(patcher.model.diffusion_model.named_modules())
    with torch.inference_mode(False), torch.no_grad():
        for key, p in twin.model.diffusion_model.named_parameters():
            module, attribute = layers[key.rpartition(".")[0]], key.rpartition(".")[2]
            p.copy_(values_of(module, getattr(module, attribute)))
    return twin


def values_of(module, tensor):
    if isinstance(tensor, Packed):
        return tensor.unpacked()
    if isinstance(tensor, comfy.quant_ops.QuantizedTensor):
        return tensor.dequantize().float()
    scale = getattr(module, "scale_weight", None)
    return tensor.float() * scale if scale is not None and tensor is module.weight else tensor.float()


FORMATS = {"fp8": plain_fp8, "packed": packed, "mixed": mixed, "mixed_fast": partial(mixed, full_precision=False)}
FORMATS |= {"fp8_fast": partial(plain_fp8, operations=comfy.ops.fp8_ops)}
if hasattr(comfy.ops, "scaled_fp8_ops"):
    FORMATS |= {"scaled": scaled_fp8, "scaled_fast": partial(scaled_fp8, matrix_mult=True)}
    FORMATS |= {"mixed_input": partial(mixed, full_precision=False, input_scale=0.05)}
FORMATS |= {
    q: partial(mixed, quantization=q, full_precision=False) for q in comfy.quant_ops.QUANT_ALGOS if "e4m3" not in q
}
