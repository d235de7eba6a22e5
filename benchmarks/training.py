"""LoRA training: this pack beside ComfyUI's own TrainLoraNode and a plain PyTorch loop, on the same data.

`python3 dev.py bench training` yields for each case (unet-b1 … mmdit-b16: network and batch size) and arm

- `loss_difference` and `gradient_difference`, relative, beside ComfyUI's node at batch 1 (training_parity.py).
  Nothing is timed where they are above 1e-5;
- `rows_per_step`: rows of the batch that went through the network for one step, and `peak_bytes`: the most that tensors
  made by the arm took together, its gradients and optimizer state included (counting.py; the same on every machine,
  unlike resident memory; the weights of the model handed in are left out, a second copy of them is not);
- `samples_per_second`: distinct samples, from the median step of the median round, and `samples_per_cpu_second`, the
  same of processor time, which other programs disturb less. Arms take turns, --rounds times. A step is the time from
  one optimizer step to the next, the first ones of a round left out;
- `setup_seconds`: from the call to the first forward pass;
- both speeds of `tidetable / core` and so on: the median over rounds of the ratio within a round, and `spread`
  and `cpu_spread`, their interquartile ranges over these: the noise of the machine.

Arms (training_arms.py): `tidetable`, `core`, `core-bypass` (newer ComfyUI only) and `loop` train the same tensors with
AdamW at rank 16 in fp32 without checkpointing. `tidetable-node` trains the low-rank pairs alone.

With `--shape sdxl --device cuda`, the arms at a published size on a GPU: training_apart.py.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch

from tidetable.benchmarks import training_apart
from tidetable.benchmarks.counting import LiveBytes
from tidetable.benchmarks.training_arms import ARMS, run_arm
from tidetable.benchmarks.training_cases import CASES, SIDE, Data, Passes, build, make_data, parse_case
from tidetable.benchmarks.training_parity import check, compare


COUNTED_STEPS = 2
WARMUP = 2
STEPS = {1: 16, 4: 10, 16: 5}
"""Batch size -> timed steps of an arm in a round."""
SPEEDS = {"samples_per_second": "spread", "samples_per_cpu_second": "cpu_spread"}
BASELINES = ("core", "core-bypass", "loop")


def run(arguments: list[str]):
    """Rows (case, arm, metric, value, unit)."""
    if any(argument.partition("=")[0] == "--shape" for argument in arguments):
        yield from training_apart.run(arguments)
        return
    parser = argparse.ArgumentParser(prog="bench training", epilog="--shape sdxl -h: at a published size, on a GPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each arm; 0 counts and compares only")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a turn; 0 chooses by the batch size")
    parser.add_argument("--side", type=int, default=SIDE, help="of the latents; the embedded models draw 32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data = make_data(options.side)
    for network in dict.fromkeys(parse_case(case)[0] for case in options.cases):
        differences = compare(network, data)
        for arm, found in differences.items():
            yield f"{network}-b1", arm, "loss_difference", found.loss, ""
            yield f"{network}-b1", arm, "gradient_difference", found.gradient, ""
        check(network, differences)
    for case in options.cases:
        for arm in options.arms:
            for metric, value, unit in counted(case, arm, data):
                yield case, arm, metric, value, unit
        if options.rounds:
            steps = options.steps or STEPS[parse_case(case)[1]]
            yield from timed(case, options.arms, data, steps, options.rounds)


def counted(case: str, arm: str, data: Data):
    """(metric, value, unit) of what does not depend on the machine's speed."""
    network, batch = parse_case(case)
    model = build(network)
    Passes.seen.clear()
    with LiveBytes() as live:
        run_arm(arm, model, data, batch, COUNTED_STEPS)
    yield "rows_per_step", sum(rows for _, rows in Passes.seen) / COUNTED_STEPS, "rows"
    yield "peak_bytes", live.peak, "B"


def timed(case: str, arms: Sequence[str], data: Data, steps: int, rounds: int):
    """Rows of one case, all arms taking turns."""
    network, batch = parse_case(case)
    speeds: dict[tuple[str, str], list[float]] = {(arm, metric): [] for arm in arms for metric in SPEEDS}
    setups: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            model = build(network)
            Passes.seen.clear()
            _, watch = run_arm(arm, model, data, batch, WARMUP + steps)
            step = watch.median_step(WARMUP)
            for metric, seconds in zip(SPEEDS, step, strict=True):
                speeds[arm, metric].append(batch / seconds)
            setups[arm].append(Passes.seen[0][0] - watch.started)
    for arm in arms:
        for metric in SPEEDS:
            yield case, arm, metric, statistics.median(speeds[arm, metric]), "1/s"
        yield case, arm, "setup_seconds", statistics.median(setups[arm]), "s"
    pairs = [(arm, base) for arm in arms if arm.startswith("tidetable") for base in BASELINES if base in arms]
    for arm, base in pairs:
        for metric in SPEEDS:
            ratios = [a / b for a, b in zip(speeds[arm, metric], speeds[base, metric], strict=True)]
            yield case, f"{arm} / {base}", metric, statistics.median(ratios), "x"
            yield case, f"{arm} / {base}", SPEEDS[metric], spread(ratios), ""


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle
