"""For the guidance tests: tiny real models, ways to call them, an independent computation of perturbed attention."""

import contextlib
import dataclasses

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_model_advanced, nodes_pag

from tidetable.nodes.guidance import PerturbedAttention
from tidetable.runtime.tiny import TINY_SPECS, TinyConfig


def variant(name, **network):
    return dataclasses.replace(TINY_SPECS[name], network={**TINY_SPECS[name].network, **network})


SPECS = {
    "unet": TINY_SPECS["unet-eps"],
    "unet-deep": variant("unet-v", transformer_depth_middle=3),
    "mmdit": TINY_SPECS["mmdit-flow"],
    "mmdit-dual": variant("mmdit-flow", x_block_self_attn_layers=[1]),  # as in SD3.5 medium
}
FAMILIES = ("unet", "mmdit")
SCALE = 3.0


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name="unet", **network):
    """A MODEL with random weights of unit gain, so that every layer has an effect that can be seen in the output."""
    spec = dataclasses.replace(SPECS[name], network={**SPECS[name].network, **network})
    model = spec.base(TinyConfig(spec), spec.model_type, device=torch.device("cpu"))
    for i, p in enumerate(model.diffusion_model.parameters()):
        random = normal(*p.shape, seed=i)
        p.data.copy_(random / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.1 * random)
    model.requires_grad_(False)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


WIDTH = SPECS["unet"].network["context_dim"]


def prompt(seed, tokens=6, **options):
    pooled = normal(1, SPECS["mmdit"].network["adm_in_channels"], seed=seed + 100)
    return [[normal(1, tokens, WIDTH, seed=seed), {"pooled_output": pooled, **options}]]


POSITIVE, NEGATIVE = prompt(1), prompt(2)
LATENT = (2, 3, 16, 24)


def node(model, scale=SCALE, start_percent=0.0, end_percent=1.0, **options):
    return PerturbedAttention.execute(model, scale, start_percent, end_percent, **options).args[0]


def core_pag(model, scale=SCALE):
    return nodes_pag.PerturbedAttentionGuidance.execute(model, scale).args[0]


def rescale_cfg(model, multiplier=0.7):
    return nodes_model_advanced.RescaleCFG().patch(model, multiplier)[0]


def make_guider(model, cfg, positive=POSITIVE, negative=NEGATIVE):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def evaluate(model, cfg=4.0, percent=0.4, guider=None, shape=LATENT, **conds):
    """The guided prediction at one noise level: what a sampler gets from one call of its denoiser."""
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(percent))
    sampler = comfy.samplers.KSAMPLER(lambda f, x, s, extra_args, **_: f(x, s[0].expand(len(x)), **extra_args))
    guider = guider or make_guider(model, cfg, **conds)
    return guider.sample(normal(*shape), torch.zeros(shape), sampler, torch.tensor([sigma, 0.0]), seed=0)


def sample(model, cfg=4.0, steps=4, scheduler="simple", callback=None):
    sampler = comfy.samplers.KSampler(model, steps, "cpu", "euler", scheduler, model_options=model.model_options)
    return sampler.sample(
        normal(*LATENT), POSITIVE, NEGATIVE, cfg, torch.zeros(LATENT), callback=callback, disable_pbar=True, seed=0
    )


def counted(model):
    """A clone that notes, for every forward, the number of rows and which kind each chunk claims to be."""
    calls = []

    def count(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        calls.append((len(x), list(transformer_options["cond_or_uncond"])))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    return model, calls


def slot_taken(model):
    """A clone whose `sampler_calc_cond_batch_function` belongs to somebody else."""
    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(
        lambda a: comfy.samplers.calc_cond_batch(a["model"], a["conds"], a["input"], a["sigma"], a["model_options"])
    )
    return model


def assert_close(got, expected, tolerance=1e-5):
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance * expected.abs().max().item())


def value_taps(network):
    """For every attention to perturb: the layer that makes v, how to read v off it, and the layer after attention."""
    if hasattr(network, "middle_block"):
        attentions = [block.attn1 for block in network.middle_block[1].transformer_blocks]
        return [(a.to_v, lambda v: v, a.to_out) for a in attentions]
    x_block = network.joint_blocks[1].x_block
    attentions = [x_block.attn] + ([x_block.attn2] if x_block.x_block_self_attn else [])
    return [(a.qkv, lambda qkv: qkv.chunk(3, -1)[2], a.proj) for a in attentions]


@contextlib.contextmanager
def values_for_attention(model):
    """Every row weakened, independently of the node: the layer after attention is handed v, by hooks on the modules."""
    handles = []
    for source, read, after in value_taps(model.model.diffusion_model):
        kept = {}
        handles += [
            source.register_forward_hook(lambda _, __, out, kept=kept, read=read: kept.update(v=read(out))),
            after.register_forward_pre_hook(lambda _, __, kept=kept: (kept["v"],)),
        ]
    yield
    for handle in handles:
        handle.remove()


def expected_guidance(model, guided, scale=SCALE, **options):
    """guided + scale · (cond − perturbed), both from plain evaluations of cond alone."""
    cond = evaluate(model, cfg=1.0, **options)
    with values_for_attention(model):
        perturbed = evaluate(model, cfg=1.0, **options)
    assert (cond - perturbed).abs().mean() > 0.01 * cond.abs().mean()  # otherwise nothing below would be tested
    return guided + scale * (cond - perturbed)
