"""Small CLIPs of ComfyUI's own text-model classes with its own tokenizers, and models that go with them."""

from types import SimpleNamespace

import comfy.sd
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import flux

from tidetable.runtime.tiny import NEAR_ZERO, initialize
from tidetable.runtime.training import TrainingData
from tidetable.tests.host.comparing import inference_copy
from tidetable.tests.host.model_zoo import zoo


CAPTIONS = ("a (red:1.3) cat", "a blue dog on grass", "a (red:1.3) cat", "two birds")
_SIZE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}
_CLASSES = {
    "sd15": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
    "sdxl": (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer),
    "flux": (flux.FluxClipModel, flux.FluxTokenizer),
}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
_NETWORK = {"sd15": {"context_dim": 32}, "sdxl": {"context_dim": 64}, "flux": {}}
FAMILIES = tuple(_CLASSES)
ENCODERS = {"sd15": "", "sdxl": "", "flux": "clip_l, t5xxl"}
"""What to choose for all text models of a family."""


def small_clip(family: str, seed: int = 0) -> comfy.sd.CLIP:
    """A CLIP of 2 or 3 layers and width 32 for each text model, with random weights, as loaders hand it over."""
    model, tokenizer = _CLASSES[family]
    options = {"clip_l_model_config": _SIZE, "clip_g_model_config": _SIZE, "t5xxl_model_config": _T5}
    with torch.inference_mode(False), torch.no_grad():
        target = SimpleNamespace(params={}, clip=model, tokenizer=tokenizer)
        clip = comfy.sd.CLIP(target, parameters=1_000_000, model_options=options)
        initialize(clip.cond_stage_model, seed)
    inference_copy(clip.patcher)
    return clip


def small_model(family: str):
    """The family's MODEL for the conditionings of `small_clip`."""
    model = zoo(family, **_NETWORK[family])
    with torch.no_grad():
        for name, parameter in model.model.diffusion_model.named_parameters():
            if name.endswith(NEAR_ZERO):  # or the text would hardly reach the output
                parameter.mul_(50)
    return inference_copy(model)


def encode(clip: comfy.sd.CLIP, text: str) -> list:
    """What CLIP Text Encode puts out."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def training_data(clip: comfy.sd.CLIP, captions=CAPTIONS, percent: int = 0) -> TrainingData:
    """Random latents [C, 8, 8] for the captions, as nodes hand them over."""
    channels = 16 if hasattr(clip.cond_stage_model, "t5xxl") else 4
    with torch.inference_mode():
        samples = torch.randn(len(captions), channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return TrainingData([{"samples": samples}], [encode(clip, caption) for caption in captions], None, percent)
