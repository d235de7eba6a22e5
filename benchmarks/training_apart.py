"""`bench training --shape`: LoRA training at a published size, each arm of each case in a process of its own.

`python3 dev.py bench training --device cuda --shape sdxl` yields for each case (sdxl-b1, sdxl-b1-blocks …
sdxl-b16-blocks: batch size, and with gradient checkpointing by blocks) and arm (tidetable, core, core-bypass:
training_arms.py)

- `samples_per_second`: distinct samples, from the median time from one optimizer step to the next, the device
  synchronized at each, the first ones left out;
- `mfu`: model FLOPs utilization, samples_per_second · flops_per_sample / what the device can do (--peak-flops, or the
  table in training_shapes.py; unknown where neither has it). `flops_per_sample` is the same for all arms: work that an
  arm does twice, or for nothing, makes its utilization smaller, not larger;
- `peak_bytes`: the most that torch's allocator held on the device, weights (`weights_bytes`) included. On the CPU: what
  tensors made by the arm took at once (counting.py), and the weights;
- `rows_per_step`: rows that went through the network for one step, and `rows_at_once`, in one pass at most. Fewer than
  the batch: our engine ran out of memory and went on with smaller passes, and `peak_bytes` is all that there was;
- `setup_seconds`: from the call to the first forward pass, loading included;
- `oom` 1: memory ran out, and the figures above are unknown. `failed` 1: something else went wrong, on stderr;
- speed and peak of `tidetable / core` and `tidetable / core-bypass`.

With --steps 0 nothing is trained: `flops_per_sample`, and `counted_bytes`, what a step needs at least by the shapes of
its tensors, for our rows and for those of ComfyUI's node, both with our adapters and checkpointing.

bfloat16 weights and arithmetic, rank 16, AdamW. Adapters are bfloat16 in ComfyUI's node, which is its default and takes
the least memory, and float32 in ours. Nothing is compared here: that the arms train the same thing is what `bench
training` without --shape finds out first.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from devtools import loading
from tidetable.benchmarks.counting import LiveBytes
from tidetable.benchmarks.training_arms import ARMS, How, run_arm
from tidetable.benchmarks.training_cases import Passes
from tidetable.benchmarks.training_shapes import (
    SHAPES,
    build,
    bytes_of,
    bytes_of_step,
    flops_per_sample,
    make_data,
    peak_flops,
)


DEFAULT_ARMS = tuple(arm for arm in ("tidetable", "core", "core-bypass") if arm in ARMS)
BATCHES = (1, 4, 8, 16)
CHECKPOINTING = ("off", "blocks")
WARMUP = 3
UNITS = {
    "samples_per_second": "1/s",
    "mfu": "",
    "flops_per_sample": "FLOP",
    "peak_bytes": "B",
    "weights_bytes": "B",
    "rows_per_step": "rows",
    "rows_at_once": "rows",
    "setup_seconds": "s",
    "oom": "",
}
RUN_FILE = loading.ROOT / "devtools" / "run_file.py"


@dataclass(frozen=True)
class Case:
    shape: str
    device: str
    batch: int
    blocks: bool
    """Gradient checkpointing."""
    steps: int
    """Timed ones."""

    @property
    def name(self) -> str:
        return f"{self.shape}-b{self.batch}{'-blocks' if self.blocks else ''}"


def run(arguments: list[str]) -> Iterator[tuple]:
    """Rows (case, arm, metric, value, unit); a value None is unknown."""
    options = parse(arguments)
    work = flops_per_sample(SHAPES[options.shape])
    peak = options.peak_flops or peak_flops(torch.device(options.device))
    for batch, checkpointing in itertools.product(options.batches, options.checkpointing):
        case = Case(options.shape, options.device, batch, checkpointing == "blocks", options.steps)
        if not options.steps:
            yield from counted(case, work)
            continue
        found = {}
        for arm in options.arms:
            measured = in_a_process(arm, case)
            if measured is None:
                yield case.name, arm, "failed", 1.0, ""
                continue
            speed = measured.get("samples_per_second")
            mfu = speed * work / peak if speed and peak else None
            found[arm] = dict.fromkeys(UNITS) | measured | {"flops_per_sample": work, "mfu": mfu}
            for metric, unit in UNITS.items():
                yield case.name, arm, metric, found[arm][metric], unit
        yield from ratios(case.name, found)


def counted(case: Case, work: int) -> Iterator[tuple]:
    """What shapes alone tell. ComfyUI's node sends batch² rows through the network."""
    needed = [bytes_of_step(SHAPES[case.shape], rows, case.blocks) for rows in (case.batch, case.batch**2)]
    yield case.name, "tidetable", "flops_per_sample", work, "FLOP"
    for arm, value in zip(("tidetable", "core"), needed, strict=True):
        yield case.name, arm, "counted_bytes", value, "B"
    yield case.name, "tidetable / core", "counted_bytes", needed[0] / needed[1], "x"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench training")
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--arms", nargs="+", choices=(*DEFAULT_ARMS, "tidetable-node"), default=DEFAULT_ARMS)
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=BATCHES)
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING, default=CHECKPOINTING)
    parser.add_argument("--steps", type=int, default=5, help=f"timed, after {WARMUP} that are not; 0: count only")
    parser.add_argument("--peak-flops", type=float, default=None, help="FLOP/s of the device in bfloat16, for mfu")
    return parser.parse_args(arguments)


def ratios(case: str, found: dict[str, dict[str, float | None]]) -> Iterator[tuple]:
    ours = found.get("tidetable", {})
    for base in ("core", "core-bypass"):
        for metric in ("samples_per_second", "peak_bytes"):
            value, other = ours.get(metric), found.get(base, {}).get(metric)
            if value and other:
                yield case, f"tidetable / {base}", metric, value / other, "x"


def in_a_process(arm: str, case: Case) -> dict[str, float] | None:
    """`measure` in a fresh process: nothing that another arm left in memory counts. None where it failed."""
    with tempfile.TemporaryDirectory(prefix="tidetable-bench-") as folder:
        answer = Path(folder, "answer.json")
        settings = json.dumps(asdict(case))
        command = [sys.executable, str(RUN_FILE), __file__, arm, settings, str(answer)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        return json.loads(answer.read_text()) if done.returncode == 0 else None


def measure(arm: str, case: Case) -> dict[str, float]:
    """Metrics of one arm at one case, in this process."""
    model, data, how = build(case.shape, torch.device(case.device)), make_data(case.shape), How("bf16", case.blocks)
    weights = bytes_of(model.model.diffusion_model)
    try:
        peak = weights + counted_on_cpu(arm, case, how) if case.device == "cpu" else 0
        Passes.seen.clear()
        _, watch = run_arm(arm, model, data, case.batch, WARMUP + case.steps, how=how)
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"{case.name}, {arm}: {error}\n")
        return {"oom": 1.0, "weights_bytes": weights}
    last_step = [rows for when, rows in Passes.seen if when > watch.times[-2][0]]
    return {
        "oom": 0.0,
        "samples_per_second": case.batch / watch.median_step(WARMUP)[0],
        "peak_bytes": peak or torch.cuda.max_memory_allocated(case.device),
        "weights_bytes": weights,
        "rows_per_step": sum(last_step),
        "rows_at_once": max(last_step),
        "setup_seconds": Passes.seen[0][0] - watch.started,
    }


def counted_on_cpu(arm: str, case: Case, how: How) -> int:
    """The most bytes that tensors made in two steps took together."""
    model, data = build(case.shape, torch.device("cpu")), make_data(case.shape)
    with LiveBytes() as live:
        run_arm(arm, model, data, case.batch, 2, how=how)
    return live.peak


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(measure(sys.argv[1], Case(**json.loads(sys.argv[2])))))
