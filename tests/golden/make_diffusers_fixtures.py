"""Writes diffusers-official.json: the sigmas that diffusers' schedulers and pipelines give, to compare ours with.

Run with a Python that has diffusers, torch, transformers and scipy, in an environment apart from ComfyUI's:

    python tests/golden/make_diffusers_fixtures.py

Scheduler configs are the published ones; tokens are counted and set_timesteps is called as in each pipeline (the file
under diffusers/pipelines is named per case). Formulas are diffusers' own functions, none of this pack's.
"""

import importlib
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import scipy
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)


TARGET = Path(__file__).with_name("diffusers-official.json")
STEPS = (1, 4, 20, 50)
SIZES = ((512, 512), (1024, 1024), (1664, 928), (2048, 2048))
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
QWEN = {**DYNAMIC, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
LTX = {**DYNAMIC, "base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
COGVIEW = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True, "time_shift_type": "linear"}
COSMOS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"}
SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
RESPACINGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}


def module(path):
    return importlib.import_module(f"diffusers.pipelines.{path}")


def tokens(width, height, length=1, pixels=16, frames=1):
    return (width // pixels) * (height // pixels) * ((length - 1) // frames + 1)


def line_mu(path, config, count):
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    values = FlowMatchEulerDiscreteScheduler(**config).config
    return module(path).calculate_shift(count, *(values[name] for name in names))


def flow(config, steps, sigmas="trailing", mu=None):
    """Sigmas of the flow scheduler after set_timesteps as pipelines call it; `sigmas` is a list, or how to make one."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    if isinstance(sigmas, str):
        sigmas = {
            "trailing": np.linspace(1.0, 1 / steps, steps),
            "to_zero": np.linspace(1.0, 0.0, steps + 1)[:-1],
            "cogview4": np.linspace(1000, 1.0, steps).astype(np.int64).astype(np.float32) / 1000,
            "glm_image": np.linspace(1000, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32) / 1000,
            "none": None,
        }[sigmas]
    with np.errstate(all="ignore"):
        scheduler.set_timesteps(steps if sigmas is None else None, sigmas=sigmas, mu=mu)
    return scheduler.sigmas


def by_line(path, config, **counting):
    def case(steps, width, height, respacing=None):
        count = tokens(width, height, **counting)
        extra = {RESPACINGS[respacing]: True} if respacing else {}
        return flow({**config, **extra}, steps, mu=line_mu(path, config, count))

    return case


def static(shift, sigmas="trailing"):
    def case(steps, width, height, respacing=None):
        extra = {RESPACINGS[respacing]: True} if respacing else {}
        return flow({"shift": shift, **extra}, steps, sigmas)

    return case


def cogview(path, sigmas):
    def case(steps, width, height):
        mu = module(path).calculate_shift(tokens(width, height), 256, 0.25, 0.75)
        return flow(COGVIEW, steps, sigmas, mu)

    return case


def flux2(steps, width, height):
    mu = module("flux2.pipeline_flux2").compute_empirical_mu(tokens(width, height), steps)
    return flow(DYNAMIC, steps, mu=mu)


def ideogram4(steps, width, height):
    pipeline = module("ideogram4.pipeline_ideogram4")
    mu = pipeline._resolution_aware_mu(height=height, width=width, base_mu=0.0)
    return flow({}, steps, pipeline._logit_normal_sigmas(steps, mu, std=1.5, device="cpu").tolist())


def mochi(steps, width, height):
    sigmas = np.array(module("mochi.pipeline_mochi").linear_quadratic_schedule(steps, 0.025))
    return 1.0 - flow({"invert_sigmas": True}, steps, sigmas)


def euler(steps, width, height):
    scheduler = EulerDiscreteScheduler(**SDXL)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def cosmos(steps, width, height):
    scheduler = EDMEulerScheduler(**COSMOS)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def cosmos_predict2(steps, width, height):
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, steps, dtype=torch.float64).numpy())
    return scheduler.sigmas


def unipc(shift):
    def case(steps, width, height):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas

    return case


# family -> (case, whether it depends on the size)
OFFICIAL = {
    "flux": (by_line("flux.pipeline_flux", DYNAMIC), True),
    "flux_schnell": (static(1.0), False),
    "flux2": (flux2, True),
    "chroma": (by_line("chroma.pipeline_chroma", DYNAMIC), True),
    "longcat_image": (by_line("longcat_image.pipeline_longcat_image", {**DYNAMIC, "base_shift": 1.15}), True),
    "qwen_image": (by_line("qwenimage.pipeline_qwenimage", QWEN), True),
    "krea2": (by_line("krea2.pipeline_krea2", {**DYNAMIC, "max_image_seq_len": 6400}), True),
    "sd3": (static(3.0, "none"), False),
    "auraflow": (static(1.73, "none"), False),
    "joyimage": (static(1.5, "none"), False),
    "z_image": (static(3.0), False),
    "lumina2": (static(6.0), False),
    "anima": (static(3.0), False),
    "ernie_image": (static(3.0, "to_zero"), False),
    "hunyuan_image": (static(5.0, "to_zero"), False),
    "hunyuan_video": (static(7.0, "to_zero"), False),
    "ltxv": (by_line("ltx.pipeline_ltx", LTX, pixels=32, frames=8), True),
    "ltx2": (by_line("ltx2.pipeline_ltx2", LTX, pixels=32, frames=8), True),
    "ideogram4": (ideogram4, True),
    "cogview4": (cogview("cogview4.pipeline_cogview4", "cogview4"), True),
    "glm_image": (cogview("glm_image.pipeline_glm_image", "glm_image"), True),
    "mochi": (mochi, False),
    "sdxl": (euler, False),
    "cosmos": (cosmos, False),
    "cosmos_predict2": (cosmos_predict2, False),
}
RESPACED = ("flux", "qwen_image", "sd3")
# What diffusers does otherwise than the authors' own code, or than a schedule should.
DIFFERENT = {
    "kandinsky5_image": static(3.0, "none"),
    "kandinsky5": static(10.0, "none"),
    "wan22_5b": unipc(5.0),
    "hidream": unipc(3.0),
}


def numbers(values):
    """float32 values to 9 digits, which is all they have; None where they are not finite or the pipeline fails."""
    values = [float(value) for value in values]
    return [float(f"{value:.9g}") for value in values] if all(map(math.isfinite, values)) else None


def curves(case, depends):
    made = {}
    for width, height in SIZES if depends else SIZES[1:2]:
        for steps in STEPS:
            try:
                sigmas = numbers(case(steps, width, height))
            except ZeroDivisionError:
                sigmas = None
            made[f"{width}x{height}/{steps}"] = sigmas
    return made


def main():
    respaced = {
        f"{key}/{name}": curves(lambda *size, c=OFFICIAL[key][0], n=name: c(*size, n), OFFICIAL[key][1])
        for key in RESPACED
        for name in RESPACINGS
    }
    record = {
        "made_by": "tests/golden/make_diffusers_fixtures.py",
        "versions": {
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "official": {key: curves(*entry) for key, entry in OFFICIAL.items()},
        "respaced": respaced,
        "different": {key: curves(case, False) for key, case in DIFFERENT.items()},
    }
    TARGET.write_text(json.dumps(record, separators=(",", ":")).replace('},"', '},\n"').replace("],", "],\n") + "\n")
    print(f"wrote {TARGET}: {TARGET.stat().st_size} bytes, diffusers {diffusers.__version__}")


if __name__ == "__main__":
    main()
