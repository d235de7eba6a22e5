"""SAMPLERs as our nodes and ComfyUI give them, and the noise levels that KSampler would take."""

import comfy.samplers

from tidetable.nodes.samplers import FlowSampler, Sampler


def ours(name, eta=1.0, s_noise=1.0, order=0, churn=0.0):
    return Sampler.execute(name, eta, s_noise, order, churn).args[0]


def safe(name):
    return FlowSampler.execute(name).args[0]


def stock(name):
    return comfy.samplers.sampler_object(name)


def sigmas_for(model, steps=12, name="euler", scheduler="simple", denoise=1.0):
    return comfy.samplers.KSampler(
        model, steps, "cpu", name, scheduler, denoise=denoise, model_options=model.model_options
    ).sigmas
