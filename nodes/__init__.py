"""Every node of the pack, in the order of the menu."""

from comfy_api.latest import io

from . import guidance, model_sampling, plots, samplers, schedules, tiny, training


NODES: list[type[io.ComfyNode]] = [
    *model_sampling.NODES,
    *schedules.NODES,
    *samplers.NODES,
    *plots.NODES,
    *guidance.NODES,
    *training.NODES,
    *tiny.NODES,
]
