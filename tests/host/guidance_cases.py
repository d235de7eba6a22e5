"""For the guidance tests: a tiny network of every family, and where its attention can be tapped."""

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

from tidetable.tests.host.guidance_models import normal
from tidetable.tests.host.model_zoo import ZOO


TEXT = 6


@dataclasses.dataclass
class Tap:
    """An attention: the layer that makes v, the one that takes its result, which of its tokens are the picture's."""

    source: torch.nn.Module
    after: torch.nn.Module
    tokens: slice = field(default_factory=lambda: slice(None))
    read: Callable = lambda v: v  # v out of what the source makes
    gate: Callable = lambda: 1.0  # what is multiplied on between


@dataclasses.dataclass(frozen=True)
class Case:
    config: str
    network: dict
    latent: tuple[int, ...]
    auto: str
    """The places that "auto" must choose, as written in the blocks input."""
    taps: Callable[[Any], list[Tap]]
    """Network -> taps of the places in `auto`."""
    options: dict = field(default_factory=dict)
    """Further conditioning."""
    module: str = ""
    """The module of ComfyUI that must exist."""


def _third(size: int) -> Callable:
    return lambda qkv: qkv[..., 2 * size : 3 * size]


def _fields(params: type, **values: Any) -> dict:
    return {name: value for name, value in values.items() if name in params.__dataclass_fields__}


def _network(name: str, **changes: Any) -> dict:
    return {**ZOO[name][1], **changes}


def _unet_taps(*layers: Callable) -> Callable:
    return lambda n: [Tap(b.attn1.to_v, b.attn1.to_out) for layer in layers for b in layer(n).transformer_blocks]


def _flux_double(index: int) -> Callable:
    return lambda n: [_double(n.double_blocks[index].img_attn)]


def _double(attention: Any) -> Tap:
    return Tap(attention.qkv, attention.proj, read=_third(attention.proj.in_features))


def _flux_single(index: int, tokens: slice) -> Callable:
    def taps(n: Any) -> list[Tap]:
        block = n.single_blocks[index]
        return [Tap(block.linear1, block.linear2, tokens, _third(block.hidden_size))]

    return taps


def _sd3(n: Any) -> list[Tap]:
    x = n.joint_blocks[1].x_block
    attentions = [x.attn, x.attn2] if x.x_block_self_attn else [x.attn]
    return [_double(attention) for attention in attentions]


def _lumina(n: Any) -> list[Tap]:
    attention, text = n.layers[1].attention, 32 if n.pad_tokens_multiple else TEXT
    width = attention.n_local_kv_heads * attention.head_dim
    repeats = attention.n_local_heads // attention.n_local_kv_heads

    def read(qkv: torch.Tensor) -> torch.Tensor:
        return qkv[..., -width:].unflatten(-1, (-1, attention.head_dim)).repeat_interleave(repeats, -2).flatten(-2)

    return [Tap(attention.qkv, attention.out, slice(text, text + 24), read)]


def _omnigen(n: Any) -> list[Tap]:
    attention = n.layers[1].attn

    def read(v: torch.Tensor) -> torch.Tensor:
        heads = v.unflatten(-1, (-1, attention.dim_head))
        return heads.repeat_interleave(attention.heads // attention.kv_heads, -2).flatten(-2)

    return [Tap(attention.to_v, attention.to_out[0], slice(TEXT, None), read)]


def _krea(n: Any) -> list[Tap]:
    attention, kept = n.blocks[1].attn, {}
    attention.gate.register_forward_hook(lambda _, __, out: kept.update(gate=out))

    def read(v: torch.Tensor) -> torch.Tensor:
        heads = v.unflatten(-1, (attention.kvheads, -1))
        return heads.repeat_interleave(attention.heads // attention.kvheads, -2).flatten(-2)

    return [Tap(attention.wv, attention.wo, slice(TEXT, None), read, lambda: torch.sigmoid(kept["gate"]))]


_COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 96,
    "num_blocks": 3,
    "num_heads": 3,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
_CHROMA = _fields(
    ChromaParams,
    **{
        "txt_ids_dims": [],
        **ZOO["flux"][1],
        "in_channels": 64,
        "out_channels": 64,
        "depth": 2,
        "depth_single_blocks": 2,
    },
    in_dim=64,
    out_dim=96,
    hidden_dim=96,
    n_layers=1,
)
_RADIANCE = _fields(
    ChromaRadianceParams,
    **{**_CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 4},
    nerf_hidden_size=16,
    nerf_mlp_ratio=2,
    nerf_depth=1,
    nerf_max_freqs=4,
    nerf_tile_size=0,
    nerf_final_head_type="conv",
    nerf_embedder_dtype=torch.float32,
    use_x0=False,
    use_sequential_txt_ids=False,
)
_HUNYUAN = _fields(
    HunyuanVideoParams,
    **{**ZOO["flux"][1], "patch_size": [1, 2, 2], "theta": 256, "depth": 2, "depth_single_blocks": 2},
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)
_HIDREAM = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "caption_channels": [32, 32],
    "text_emb_dim": 32,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": [8, 12, 12],
    "llama_layers": [0, 1, 0, 1, 1],
}
_OMNIGEN = {
    "image_model": "omnigen2",
    "hidden_size": 96,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "axes_dim_rope": [8, 8, 8],
    "text_feat_dim": 32,
    "multiple_of": 32,
}
_KREA = {
    "image_model": "krea2",
    "features": 128,
    "tdim": 32,
    "txtdim": 16,
    "heads": 4,
    "kvheads": 2,
    "layers": 3,
    "txtlayers": 2,
    "txtheads": 2,
    "txtkvheads": 2,
}
_SDXL_DEEP = {"transformer_depth_middle": 3}
_LLAMA = {"conditioning_llama3": normal(1, 2, 5, 32, seed=7)}
_MASK = {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}

SQUARE = (2, 4, 8, 12)
FLUX = (2, 16, 8, 12)  # 4 × 6 tokens
VIDEO = (2, 16, 3, 8, 12)  # 3 frames of 4 × 6 tokens
CASES = {
    "sd15": Case("SD15", _network("sd15"), SQUARE, "middle", _unet_taps(lambda n: n.middle_block[1])),
    "sd20": Case(
        "SD20", _network("sd15", adm_in_channels=None), SQUARE, "middle", _unet_taps(lambda n: n.middle_block[1])
    ),
    "sdxl": Case("SDXL", _network("sdxl", **_SDXL_DEEP), SQUARE, "middle", _unet_taps(lambda n: n.middle_block[1])),
    "refiner": Case(
        "SDXLRefiner",
        _network("sdxl", adm_in_channels=32 + 5 * 256),
        SQUARE,
        "middle",
        _unet_taps(lambda n: n.middle_block[1]),
    ),
    "unet_without_middle": Case(
        "SD15",
        _network("sd15", transformer_depth_middle=-1),
        SQUARE,
        "output 0",
        _unet_taps(lambda n: n.output_blocks[0][1]),
    ),
    "sd3": Case("SD3", _network("sd3", num_blocks=3), FLUX, "joint 1", _sd3),
    "sd35_medium": Case("SD3", _network("sd3", num_blocks=3, x_block_self_attn_layers=[0, 1]), FLUX, "joint 1", _sd3),
    "auraflow": Case(
        "AuraFlow",
        _network("auraflow", n_layers=3, n_double_layers=1),
        SQUARE,
        "single 0",
        # 8 registers before the text
        lambda n: [Tap(n.single_layers[0].attn.w1v, n.single_layers[0].attn.w1o, slice(8 + TEXT, None))],
    ),
    "auraflow_double": Case(
        "AuraFlow",
        _network("auraflow", n_layers=3, n_double_layers=2),
        SQUARE,
        "double 1",
        lambda n: [Tap(n.double_layers[1].attn.w2v, n.double_layers[1].attn.w2o)],
    ),
    "flux": Case(
        "Flux", _network("flux", depth=2, depth_single_blocks=2), FLUX, "single 0", _flux_single(0, slice(TEXT, None))
    ),
    "flux_double": Case("Flux", _network("flux", depth=3), FLUX, "double 2", _flux_double(2)),
    "flux2": Case(
        "Flux2",
        _network(
            "flux",
            in_channels=128,
            out_channels=128,
            patch_size=1,
            depth=1,
            depth_single_blocks=2,
            vec_in_dim=None,
            axes_dim=[8, 8, 8, 8],
            global_modulation=True,
            mlp_silu_act=True,
            qkv_bias=False,
            ops_bias=False,
        ),
        (2, 128, 4, 6),
        "single 0",
        _flux_single(0, slice(512, None)),  # the prompt is padded to 512 tokens
    ),
    "chroma": Case("Chroma", _CHROMA, FLUX, "single 0", _flux_single(0, slice(TEXT, None))),
    "chroma_radiance": Case(
        "ChromaRadiance", _RADIANCE, (2, 3, 16, 24), "single 0", _flux_single(0, slice(TEXT, None))
    ),
    "hunyuan_video": Case(
        "HunyuanVideo",
        _HUNYUAN,
        VIDEO,
        "single 0",
        lambda n: _flux_single(
            0, slice(0, 72) if n.double_blocks[0].__dict__.get("flipped_img_txt") else slice(TEXT, None)
        )(n),
    ),
    "hunyuan_video_double": Case("HunyuanVideo", {**_HUNYUAN, "depth": 3}, VIDEO, "double 2", _flux_double(2)),
    "hunyuan_image": Case(
        "HunyuanImage21",
        {
            **_HUNYUAN,
            "patch_size": [2, 2],
            "in_channels": 64,
            "out_channels": 64,
            "vec_in_dim": None,
            "depth": 3,
            "axes_dim": [16, 16],
        },
        (2, 64, 8, 12),
        "double 2",
        _flux_double(2),
    ),
    "qwen_image": Case(
        "QwenImage",
        _network("qwen_image", num_layers=3),
        (2, 16, 1, 8, 12),
        "transformer 1",
        lambda n: [Tap(n.transformer_blocks[1].attn.to_v, n.transformer_blocks[1].attn.to_out[0])],
    ),
    "lumina2": Case("Lumina2", _network("lumina2", n_layers=3, n_kv_heads=4), FLUX, "layers 1", _lumina),
    "z_image": Case("ZImage", {**ZOO["z_image"][1], "n_layers": 3}, FLUX, "layers 1", _lumina),
    "omnigen2": Case("Omnigen2", _OMNIGEN, FLUX, "layers 1", _omnigen, _MASK),
    "hidream": Case(
        "HiDream",
        _HIDREAM,
        FLUX,
        "single 0",
        lambda n: [
            Tap(n.single_stream_blocks[0].block.attn1.to_v, n.single_stream_blocks[0].block.attn1.to_out, slice(0, 24))
        ],
        _LLAMA,
    ),
    "wan": Case(
        "WAN21_T2V",
        _network("wan", num_layers=3),
        VIDEO,
        "blocks 1",
        lambda n: [Tap(n.blocks[1].self_attn.v, n.blocks[1].self_attn.o)],
    ),
    "wan_vace": Case(
        "WAN21_Vace",
        _network("wan", num_layers=4, model_type="vace", vace_layers=2, vace_in_dim=96),
        VIDEO,
        "blocks 2",
        lambda n: [Tap(n.blocks[2].self_attn.v, n.blocks[2].self_attn.o)],
    ),
    "cosmos": Case(
        "CosmosT2IPredict2",
        _COSMOS,
        VIDEO,
        "blocks 1",
        lambda n: [Tap(n.blocks[1].self_attn.v_proj, n.blocks[1].self_attn.output_proj)],
    ),
    "anima": Case(
        "Anima",
        {**_COSMOS, "image_model": "anima"},
        (2, 16, 1, 8, 12),
        "blocks 1",
        lambda n: [Tap(n.blocks[1].self_attn.v_proj, n.blocks[1].self_attn.output_proj)],
        module="comfy.ldm.anima.model",
    ),
    "krea2": Case("Krea2", _KREA, (2, 16, 1, 8, 12), "blocks 1", _krea, module="comfy.ldm.krea2.model"),
}
