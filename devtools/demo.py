"""`python3 dev.py demo`: the pack's main job in a real ComfyUI, over its own HTTP and WebSocket API.

Queues example_workflows/tidetable_demo.json, shows a progress bar per node, has independent classifiers look at the
samples, and leaves pictures and the LoRA file in demo-output/.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from devtools import loading
from devtools.client import Client, Result
from devtools.errors import DevError
from devtools.progress import NodeProgress
from devtools.server import Server
from devtools.workflow import to_prompt


WORKFLOW = loading.ROOT / "example_workflows" / "tidetable_demo.json"
OUTPUT = loading.ROOT / "demo-output"


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py demo")
    parser.add_argument("--keep", action="store_true", help="leave the server up and print its URL")
    keep = parser.parse_args().keep
    started = time.monotonic()
    OUTPUT.mkdir(exist_ok=True)
    print("Starting ComfyUI …", flush=True)
    with Server() as server:
        client = Client(server.base_url)
        result, prompt = run_workflow(client)
        files = collect(client, result, prompt, server)
        print_report(files, judge(files), time.monotonic() - started)
        if keep:
            wait_for_person(server)


def run_workflow(client: Client) -> tuple[Result, dict]:
    """Execute the demo workflow with a bar per node; ComfyUI's result and the prompt that it ran."""
    workflow = json.loads(WORKFLOW.read_text())
    info = client.object_info()
    prompt = to_prompt(workflow, info)
    print(f"ComfyUI runs at {client.base_url}; queueing {WORKFLOW.name} ({len(prompt)} nodes)", flush=True)
    return client.run(prompt, on_event=NodeProgress(prompt, info), timeout=1800, workflow=workflow), prompt


def collect(client: Client, result: Result, prompt: dict, server: Server) -> dict[str, list[Path]]:
    """Copy what the SaveImage nodes wrote, by the last part of their prefix, and the LoRA file, into demo-output/."""
    files: dict[str, list[Path]] = {}
    for node, settings in prompt.items():
        if settings["class_type"] == "SaveImage":
            name = settings["inputs"]["filename_prefix"].split("/")[-1]
            for number, image in enumerate(result.images(node)):
                path = OUTPUT / "samples" / f"{name}-{number:02}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(client.fetch(image))
                files.setdefault(name, []).append(path)
        if settings["class_type"] == "Tidetable_SaveLoRA":
            written = result.outputs[node]["text"][0]
            (source,) = server.base_directory.rglob(Path(written).name)
            files["lora"] = [Path(shutil.copyfile(source, OUTPUT / "handwritten.safetensors"))]
    for name in ("schedules", "training"):
        (only,) = files.get(name) or [None]
        if only is None:
            raise DevError(f"{WORKFLOW.name} has no SaveImage node with the prefix tidetable/{name}: restore the file")
        files[name] = [only.replace(OUTPUT / f"{name}.png")]
    return files


def judge(files: dict[str, list[Path]]) -> dict[str, float]:
    """What classifiers that never saw the model say of the samples before and after, and the grid of both."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors import safe_open

    from devtools.judges import accuracy, digit_judge, handwriting_judge

    def load(paths: list[Path]) -> torch.Tensor:
        small = [np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BOX)) for path in paths]
        return torch.from_numpy(np.stack(small)).movedim(-1, 1).float() / 255

    print("Classifiers are reading the samples …", flush=True)
    before, after = load(files["before"]), load(files["after"])
    wanted = requested_digits(len(before))
    digits, style = digit_judge(), handwriting_judge()
    with safe_open(files["lora"][0], "pt") as file:
        validation = json.loads(file.metadata()["tidetable_validation"])
    save_grid(files["before"], files["after"], OUTPUT / "before-and-after.png")
    return {
        "validation before": validation[0],
        "validation after": validation[-1],
        "digits before": accuracy(digits, before, wanted),
        "digits after": accuracy(digits, after, wanted),
        "digits judge": digits.accuracy,
        "style before": accuracy(style, before, ["handwritten"] * len(before)),
        "style after": accuracy(style, after, ["handwritten"] * len(after)),
        "style judge": style.accuracy,
        "samples": len(before),
    }


def requested_digits(samples: int) -> list[str]:
    """The digit in each sample's prompt: the workflow's second data set has the prompts, each drawn as a batch."""
    from tidetable.training.tiny_data import digit_batch

    workflow = json.loads(WORKFLOW.read_text())
    prompts = [
        n for n in workflow["nodes"] if n["type"] == "Tidetable_TinyDataset" and "held out" in n["widgets_values"][0]
    ]
    _, count, seed, *_ = prompts[0]["widgets_values"]
    digits = [glyph.character for glyph in digit_batch(count, seed, "test")[2]]
    return [digit for digit in digits for _ in range(samples // count)]


def save_grid(before: list[Path], after: list[Path], path: Path, columns: int = 10, side: int = 96) -> None:
    """Both sets of samples as one labeled picture."""
    from PIL import Image, ImageDraw, ImageFont

    rows, gap = -(-len(before) // columns), 34
    canvas = Image.new("RGB", (columns * side, 2 * (rows * side + gap)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for part, (title, paths) in enumerate(
        (("before the LoRA", before), ("after the LoRA, same seeds and prompts", after))
    ):
        top = part * (rows * side + gap)
        draw.text((6, top + gap / 2), title, fill="black", font=font, anchor="lm")
        for number, file in enumerate(paths):
            # Prompts run across, the samples of one prompt run down.
            column, row = (
                divmod(number, rows) if len(paths) == rows * columns else (number % columns, number // columns)
            )
            picture = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture, (column * side, top + gap + row * side))
    canvas.save(path)


def print_report(files: dict[str, list[Path]], numbers: dict[str, float], seconds: float) -> None:
    where = OUTPUT.relative_to(Path.cwd()) if OUTPUT.is_relative_to(Path.cwd()) else OUTPUT
    size, samples = files["lora"][0].stat().st_size / 1e6, int(numbers["samples"])
    print(
        f"""
Done in {seconds:.0f} s. In {where}{os.sep}:
  schedules.png             the noise levels that three spacings visit on this model
  training.png              training loss and held-out validation loss, with the base model's as the reference line
  before-and-after.png      the same prompts and seeds without and with the LoRA ({samples} samples each)
  handwritten.safetensors   the LoRA; any LoRA loader of ComfyUI takes it ({size:.1f} MB)

                                                   base model    with LoRA"""
    )
    rows = (
        ("validation loss at fixed noise, held-out digits", "validation", ".4f"),
        ("samples that look handwritten", "style", ".0%"),
        ("samples that show the requested digit", "digits", ".0%"),
    )
    for title, name, form in rows:
        print(f"  {title:<49}{numbers[f'{name} before']:>10{form}}{numbers[f'{name} after']:>13{form}}")
    print(
        "The classifiers never saw the model; on real held-out pictures they are right in "
        f"{numbers['style judge']:.1%} and {numbers['digits judge']:.1%} of cases.\n"
        "(The digit reader was trained on handwritten digits only, so rendered ones confuse it.)",
        flush=True,
    )


def wait_for_person(server: Server) -> None:
    print(f"\nComfyUI stays up at {server.base_url} (Ctrl-C stops it).")
    print("Open it, then Workflow > Browse Templates > ComfyUI-Tidetable > tidetable_demo.", flush=True)
    server.wait()


if __name__ == "__main__":
    main()
