"""What guidance costs beside plain CFG: perturbed attention by ComfyUI's own node and by ours, on published shapes.

`python3 dev.py bench guidance` yields for each case (sd15, sdxl, flux, qwen) and arm

- `flops_per_step`, `model_calls_per_step` and `peak_bytes` (tensors other than weights) of one guided evaluation at
  full size and depth, 1024 x 1024 pixels (SD1.5: 512), counted on shapes (counting.py): the same on every machine;
- `seconds_per_step`: the median over rounds in which the arms take turns, on the size that published.py calls `timed`,
  and `cpu_seconds_per_step`, the same of processor time, which other programs disturb less. With --device cuda at full
  size, and beside it `allocated_bytes`: what torch's allocator held at most, weights left out;
- all of these divided by those of arm `cfg`, which runs the conditional and the unconditional row alone, and
  `share_of_steps`: how much of a run may be guided for the whole run to cost 1.2 times CFG;
- `flops_per_run` of a whole run of --run-steps, with all of the node at its default but the block and --end-percent.

Arms: `cfg`; `core-pag`, ComfyUI's PerturbedAttentionGuidance (U-Nets only); `tidetable-plain`, our node with the
perturbed row in the batch; `tidetable`, with the blocks before the perturbed one computed once.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

from tidetable.benchmarks import counting, published
from tidetable.benchmarks.published import PUBLISHED, Published, Shape
from tidetable.nodes.guidance import PerturbedAttention


CFG, SCALE = 5.0, 3.0
RUN_TARGET = 1.2  # a whole run beside one with CFG alone
UNITS = {
    "flops_per_step": "FLOP",
    "model_calls_per_step": "calls",
    "peak_bytes": "B",
    "seconds_per_step": "s",
    "cpu_seconds_per_step": "s",
    "allocated_bytes": "B",
}


def run(arguments: list[str]):
    """Rows (case, arm, metric, value, unit)."""
    parser = argparse.ArgumentParser(prog="bench guidance")
    parser.add_argument("--cases", nargs="+", choices=tuple(PUBLISHED), default=tuple(PUBLISHED))
    parser.add_argument("--device", default="cpu", help="cuda: timed there, at full size")
    parser.add_argument("--rounds", type=int, default=5, help="timed evaluations per arm; 0 counts only")
    parser.add_argument("--run-steps", type=int, default=20, help="steps of the whole run; 0 leaves it out")
    parser.add_argument("--end-percent", type=float, default=None, help="where guidance ends in the whole run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cpu, device = torch.device("cpu"), torch.device(options.device)
    for name in options.cases:
        model = PUBLISHED[name]
        patcher = published.build(model, model.full, cpu)
        results = counted(model, patcher)
        if options.rounds:
            shape = model.timed if device.type == "cpu" else model.full
            for arm, measured in timed(model, shape, device, options.rounds).items():
                results[arm].update(measured)
        yield from rows(name, results)
        if options.run_steps:
            settings = {} if options.end_percent is None else {"end_percent": options.end_percent}
            ours = tidetable(patcher, blocks=model.full.blocks, **settings)
            yield from run_rows(name, model, {"cfg": patcher, "tidetable": ours}, options.run_steps)


def rows(case: str, results: dict[str, dict[str, float]]):
    for arm, metrics in results.items():
        for metric, value in metrics.items():
            yield case, arm, metric, value, UNITS[metric]
    plain = results["cfg"]
    for arm, metrics in results.items():
        if arm != "cfg":
            for metric, value in metrics.items():
                yield case, f"{arm} / cfg", metric, value / plain[metric], "x"
            more = metrics["flops_per_step"] / plain["flops_per_step"] - 1.0
            yield case, arm, "share_of_steps", min((RUN_TARGET - 1.0) / more, 1.0), ""


def run_rows(case: str, model: Published, made: dict[str, ModelPatcher], steps: int):
    flops = {}
    for arm, patcher in made.items():
        flops[arm] = counting.count(patcher, lambda clone: whole_run(model, clone, steps)).flops
        yield case, arm, "flops_per_run", flops[arm], "FLOP"
    yield case, "tidetable / cfg", "flops_per_run", flops["tidetable"] / flops["cfg"], "x"


def arms(model: Published, shape: Shape, patcher: ModelPatcher) -> dict[str, ModelPatcher]:
    """The MODEL of each arm; all are clones that share their weights."""
    made = {"cfg": patcher}
    if model.unet:
        made["core-pag"] = PerturbedAttentionGuidance.execute(patcher, SCALE).args[0]
    for arm, sharing in (("tidetable-plain", "off"), ("tidetable", "on")):
        made[arm] = tidetable(patcher, scale=SCALE, blocks=shape.blocks, shared_prefix=sharing)
    return made


def tidetable(patcher: ModelPatcher, **settings) -> ModelPatcher:
    """Our node with the defaults that its schema declares, other than `settings`."""
    inputs = [given for given in PerturbedAttention.define_schema().inputs if given.id != "model"]
    return PerturbedAttention.execute(patcher, **{given.id: given.default for given in inputs} | settings).args[0]


def counted(model: Published, patcher: ModelPatcher) -> dict[str, dict[str, float]]:
    """arm -> metric -> value, of one evaluation at full size."""
    results = {}
    for arm, made in arms(model, model.full, patcher).items():
        cost = counting.count(made, lambda clone: evaluation(model, model.full, clone, [])())
        results[arm] = {
            "flops_per_step": cost.flops,
            "model_calls_per_step": cost.calls,
            "peak_bytes": cost.peak_bytes,
        }
    return results


def timed(model: Published, shape: Shape, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """arm -> metric -> value: medians, after one evaluation each that does not count."""
    taken, evaluations, allocated = {}, {}, {}
    for arm, made in arms(model, shape, published.build(model, shape, device)).items():
        taken[arm] = []
        evaluations[arm] = evaluation(model, shape, made, taken[arm])
    for _ in range(rounds + 1):
        for arm, evaluate in evaluations.items():
            allocated[arm] = allocated_bytes(evaluate, device)
    measured = {}
    for arm, times in taken.items():
        seconds, cpu_seconds = (statistics.median(column) for column in zip(*times[1:], strict=True))
        on_device = (
            {"allocated_bytes": allocated[arm]} if device.type == "cuda" else {"cpu_seconds_per_step": cpu_seconds}
        )
        measured[arm] = {"seconds_per_step": seconds, **on_device}
    return measured


def allocated_bytes(evaluate: Callable[[], object], device: torch.device) -> int:
    """What the GPU's allocator held at most while `evaluate` ran, beyond what it held before; 0 on a CPU."""
    if device.type != "cuda":
        evaluate()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    evaluate()
    return torch.cuda.max_memory_allocated(device) - before


def evaluation(
    model: Published, shape: Shape, patcher: ModelPatcher, times: list[tuple[float, float]]
) -> Callable[[], object]:
    """A function that has ComfyUI's CFGGuider make one evaluation, and appends its (seconds, processor's seconds)."""
    device = patcher.load_device

    def sample(denoise, x, sigmas, extra_args, **_):
        synchronize(device)
        started = time.perf_counter(), time.process_time()
        denoised = denoise(x, sigmas[0].expand(len(x)), **extra_args)
        synchronize(device)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        return denoised

    sigma = float(patcher.get_model_object("model_sampling").percent_to_sigma(0.4))
    return sampling(model, shape, patcher, comfy.samplers.KSAMPLER(sample), torch.tensor([sigma, 0.0]))


def whole_run(model: Published, patcher: ModelPatcher, steps: int) -> None:
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), model.scheduler, steps)
    sampling(model, model.full, patcher, comfy.samplers.sampler_object("euler"), sigmas)()


def sampling(model: Published, shape: Shape, patcher: ModelPatcher, sampler, sigmas) -> Callable[[], object]:
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(*(published.make_prompt(model, shape, seed) for seed in (1, 2)))
    guider.set_cfg(CFG)
    latent = published.make_latent(model, shape)

    def sample():
        with torch.no_grad():
            return guider.sample(latent, torch.zeros_like(latent), sampler, sigmas, seed=0, disable_pbar=True)

    return sample


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
