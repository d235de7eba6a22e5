"""Writes diffusers-vp.json: what diffusers' DDIM, Euler and DPM++ schedulers make of Stable Diffusion's betas.

Run it with the Python of an environment of its own that has torch and diffusers:

    python tests/golden/diffusers_vp.py
"""

import importlib.metadata
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr


FILE = Path(__file__).resolve().with_name("diffusers-vp.json")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
STEPS = (1, 4, 20, 50)
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
# The released configs of Stable Diffusion have leading with offset 1; trailing is what zero terminal SNR asks for.
SPACINGS = {"trailing": {}, "leading": {"steps_offset": 1}}


def table(kind: str, zero: bool) -> dict[str, list[float]]:
    scheduler = DDIMScheduler(beta_schedule=kind, rescale_betas_zero_snr=zero, **BETAS)
    # Rescaled in float64: what their float32 loses in betas near 1 (7e-6) is not what a comparison should look at.
    betas = DDIMScheduler(beta_schedule=kind, **BETAS).betas.double()
    return {
        "betas": digits(rescale_zero_terminal_snr(betas) if zero else betas),
        "alphas_cumprod": digits(scheduler.alphas_cumprod),
    }


def digits(values: torch.Tensor) -> list[float]:
    """Ten of them: float32 has eight."""
    return [float(f"{value:.10g}") for value in values.double().tolist()]


def visited(name: str, zero: bool, spacing: str, steps: int) -> dict:
    scheduler = SCHEDULERS[name](
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero,
        timestep_spacing=spacing,
        **SPACINGS[spacing],
        **BETAS,
    )
    scheduler.set_timesteps(steps)
    sigmas = digits(scheduler.sigmas) if hasattr(scheduler, "sigmas") else None
    return {
        "scheduler": name,
        "zero_terminal": zero,
        "spacing": spacing,
        "steps": steps,
        "timesteps": [float(t) for t in scheduler.timesteps],
        "sigmas": sigmas,
    }


def main() -> None:
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in ("diffusers", "torch")},
        "tables": {
            f"{kind}{' zero terminal' if zero else ''}": table(kind, zero)
            for kind in ("scaled_linear", "linear")
            for zero in (False, True)
        },
        "schedules": [
            visited(name, zero, spacing, steps)
            for name in SCHEDULERS
            for zero in (False, True)
            for spacing in SPACINGS
            for steps in STEPS
        ],
    }
    FILE.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    print(f"wrote {FILE}, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
