"""Make one of the embedded models: `python3 dev.py exec models/train_tiny.py --model unet-v` (about an hour on one CPU
core).

The three runs are independent: start them side by side. Data, order, noise and initialization follow from --seed.
`models/README.md` says what came out; `models/judge.py` measures it.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tidetable.runtime import tiny
from tidetable.runtime.prediction import patch_flow_graft
from tidetable.runtime.trainable import ComfyDenoiser, training_session
from tidetable.training.config import TrainConfig
from tidetable.training.data import Dataset
from tidetable.training.engine import Trainer
from tidetable.training.events import StepDone
from tidetable.training.tiny_data import glyph_batch


HELD_OUT_SEED = 1_000_003


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tiny.TINY_MODELS, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=40_960)
    parser.add_argument(
        "--logit-mean", type=float, help="draw t logit-normally with this mean: above 0, more steps where shapes form"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--start", type=Path, help="go on from these weights, with another seed, instead of from scratch"
    )
    parser.add_argument(
        "--graft",
        type=float,
        metavar="SHIFT",
        help="train an eps or v model as a flow model of this shift (Flow Graft)",
    )
    parser.add_argument("--output", type=Path, default=tiny.MODELS_DIR)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    clip = tiny.load_tiny_clip()
    if not tiny.TEXT_FILE.exists():
        save_half(clip.cond_stage_model.state_dict(), tiny.TEXT_FILE, {"description": "fixed word vectors, seed 0"})
    patcher = tiny.build_patcher(args.model, load_file(args.start) if args.start else None, args.seed)
    if args.graft is not None:
        patcher = patch_flow_graft(patcher, args.graft)
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=100,
        weight_decay=0.01,
        ema_decay=0.999,
        caption_dropout=0.1,
        validate_every=200,
        density="auto" if args.logit_mean is None else "logit_normal",
        logit_mean=args.logit_mean or 0.0,
        seed=args.seed,
    )
    with training_session(patcher) as denoiser:
        dataset = make_dataset(denoiser, clip, args.images, args.seed)
        held_out = make_dataset(denoiser, clip, 128, HELD_OUT_SEED)
        parameters = list(patcher.model.diffusion_model.requires_grad_(True).parameters())
        trainer = Trainer(config, denoiser, parameters, dataset, held_out)
        train(trainer, args, patcher)


def train(trainer: Trainer, args: argparse.Namespace, patcher) -> None:
    started, recent = time.monotonic(), []
    for event in trainer.run():
        if isinstance(event, StepDone):
            recent.append(event.loss)
            if event.step % 20 == 0:
                print(
                    f"{event.step} loss {sum(recent) / len(recent):.4f} {time.monotonic() - started:.0f}s", flush=True
                )
                recent.clear()
        else:
            print("validation", event.step, f"{event.loss:.4f}", [round(loss, 4) for _, loss in event.by_t], flush=True)
            weights = patcher.model.diffusion_model.state_dict()
            if trainer.average is not None and trainer.average.updates:
                names = [name for name, _ in patcher.model.diffusion_model.named_parameters()]
                weights = {**weights, **dict(zip(names, trainer.average.average, strict=True))}
            record = {
                "model": args.model,
                "seed": str(args.seed),
                "steps": str(event.step),
                "batch_size": str(args.batch_size),
                "learning_rate": str(args.learning_rate),
                "images": str(args.images),
                "logit_mean": "" if args.logit_mean is None else str(args.logit_mean),
                "graft": "" if args.graft is None else str(args.graft),
                "start": args.start.name if args.start else "",
                "validation": json.dumps(event.by_t),
                "seconds": f"{time.monotonic() - started:.0f}",
                "modelspec.sai_model_spec": "1.0.0",
                "modelspec.license": "MIT",
            }
            save_half(weights, args.output / f"{tiny.TINY_SPECS[args.model].file}.safetensors", record)


def make_dataset(denoiser: ComfyDenoiser, clip, count: int, seed: int) -> Dataset:
    """Rendered characters with their captions, encoded by the embedded CLIP."""
    images, captions, _ = glyph_batch(count, seed)
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    return denoiser.dataset(list(images * 2 - 1), [encode(text) for text in captions], encode(""))


def save_half(weights: dict, path: Path, metadata: dict[str, str]) -> None:
    half = {key: value.detach().to(torch.float16).contiguous() for key, value in weights.items()}
    temporary = path.with_suffix(".tmp")
    save_file(half, temporary, metadata=metadata)
    temporary.replace(path)


if __name__ == "__main__":
    main()
