"""Every node of the pack, in the order of the menu."""

from comfy_api.latest import io

from ..runtime.folders import serve_folders as serve_folders
from ..runtime.live import serve_curves as serve_curves
from . import (
    dataset,
    guidance,
    model_sampling,
    official,
    plots,
    prediction,
    samplers,
    schedule_editing,
    schedules,
    tiny,
    training,
    training_adapter,
    training_job,
    training_memory,
    training_objective,
    training_preview,
    training_run,
    training_text,
)


NODES: list[type[io.ComfyNode]] = [
    *model_sampling.NODES,
    *prediction.NODES,
    *schedules.NODES,
    *official.NODES,
    *schedule_editing.NODES,
    *samplers.NODES,
    *plots.NODES,
    *guidance.NODES,
    *dataset.NODES,
    *training.NODES,
    *training_adapter.NODES,
    *training_objective.NODES,
    *training_run.NODES,
    *training_preview.NODES,
    *training_text.NODES,
    *training_job.NODES,
    *training_memory.NODES,
    *tiny.NODES,
]
