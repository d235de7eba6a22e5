"""The one function that all our guidance nodes share in ComfyUI's single slot for evaluating cond and uncond.

ComfyUI keeps one `sampler_calc_cond_batch_function` per MODEL; the last node that sets it wins. Ours all set the same
one, and what each node contributes lies beside it in the model options, so their order in the graph does not matter.
"""

from collections.abc import Callable
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor


SLOT = "sampler_calc_cond_batch_function"
STAGES = "tidetable_cond_batch"  # in model_options: what nodes contribute, immutable
RUN = "tidetable_guidance_run"  # in the model_options of one sampling run: what its evaluations hand on

Prepare = Callable[[dict], dict]
"""args -> args, the slot's arguments: for example without the uncond that nobody is going to use."""
Evaluate = Callable[[dict], list[Tensor]]
"""args -> one prediction for each of args["conds"]."""


def install(model: ModelPatcher, prepare: Prepare | None = None, evaluate: Evaluate | None = None) -> bool:
    """Add a stage to a cloned MODEL; whether ComfyUI will call it, which it does not where another pack has the slot.

    The functions must be of a module, without state of their own: two nodes of a kind install the same one.
    """
    given = {name: stage for name, stage in (("prepare", prepare), ("evaluate", evaluate)) if stage is not None}
    model.model_options[STAGES] = {**model.model_options.get(STAGES, {}), **given}
    if SLOT not in model.model_options:
        model.set_model_sampler_calc_cond_batch_function(predict)
    return model.model_options[SLOT] is predict


def predict(args: dict) -> list[Tensor]:
    """`sampler_calc_cond_batch_function`: the predictions for args["conds"], by the stages that nodes have added."""
    stages: dict[str, Any] = args["model_options"].get(STAGES, {})
    if (prepare := stages.get("prepare")) is not None:
        args = prepare(args)
    return stages.get("evaluate", evaluate_plainly)(args)


def evaluate_plainly(args: dict) -> list[Tensor]:
    """The predictions as ComfyUI makes them without anybody in the slot."""
    model, conds, x, sigma, options = (args[key] for key in ("model", "conds", "input", "sigma", "model_options"))
    return comfy.samplers.calc_cond_batch(model, conds, x, sigma, options)


def run_state(model_options: dict) -> dict:
    """What the evaluations of one sampling run hand on to each other; empty when a run begins."""
    return model_options.setdefault(RUN, {})
