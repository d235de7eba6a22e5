"""A training run as a folder that `train.py` runs without the page: settings, the model's graph, and the data set."""

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import folder_paths
import torch
import torch.distributed as dist

from ..training.adapter_settings import AdapterConfig
from ..training.config import LoRAConfig, TrainConfig, with_optimizer
from ..training.dataset.encoded import EncodedDataset, EncodedPicture
from ..training.distributed import PATIENCE, World, leave
from ..training.memory import MemoryConfig
from ..training.settings_text import from_toml, to_toml
from .headless import model_of, upstream
from .saving import save_lora_model
from .training import train_lora
from .training_data import TrainingData
from .training_run import RunConfig


logger = logging.getLogger(__name__)
COMMENT = """A training run of ComfyUI-Tidetable, written by the node Export Training Job. Run it with

    python train.py job.toml
    torchrun --nproc-per-node 8 train.py job.toml

train.py is in the pack's folder. batch_size is that of all processes together. With shard_base = true each of several
processes holds its share of the model's weights only. Keys that are not known are an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What job.toml says. Paths are relative to its folder."""

    model_output: tuple[str, int]
    """Node and output of the graph that give the model."""
    model_graph: str = "model.json"
    """The nodes that make the model, in ComfyUI's API format."""
    dataset: str = "dataset.json"
    """The samples: names of records in the cache."""
    cache: str
    """The cache's folder, as Encode Dataset wrote it."""
    validation_percent: int = 0
    filename_prefix: str = "tidetable/lora"
    """Name of the LoRA in the loras folder."""
    train: TrainConfig
    lora: LoRAConfig
    adapter: AdapterConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)
    memory: MemoryConfig | None = None
    shard_base: bool = False
    """Of several processes each holds its share of the model's weights only."""


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_job(
    name: str, prompt: dict[str, Any], node_id: str, dataset: EncodedDataset, settings: dict[str, Any]
) -> Path:
    """Write output/tidetable/jobs/<name>/ for the node `node_id` of the running prompt; the path of its job.toml.

    `settings` are the inputs of Train LoRA by name. ValueError for a name that leaves the folder, and for inputs that a
    job cannot have.
    """
    for part in ("preview", "text_encoder"):
        if settings.pop(part, None) is not None:
            raise ValueError(f"a job cannot have {part}: disconnect it, or train on this machine with Train LoRA")
    folder = jobs_folder(name)
    link = prompt[node_id]["inputs"]["model"]
    graph = upstream(prompt, link)
    parts = ("adapter", "optimizer", "run", "memory")
    adapter, optimizer, run, memory = (settings.pop(part, None) for part in parts)
    lora = LoRAConfig(**{part: settings.pop(part) for part in ("rank", "lora_alpha", "targets")}, seed=settings["seed"])
    job = Job(
        model_output=(str(link[0]), link[1]),
        cache=str(dataset.folder),
        validation_percent=settings.pop("validation_percent"),
        filename_prefix=settings.pop("filename_prefix"),
        lora=lora,
        adapter=adapter,
        run=run or RunConfig(),
        memory=memory,
        shard_base=settings.pop("shard_base", False),
        train=with_optimizer(TrainConfig(**settings), optimizer),
    )
    records = {"dropped": dataset.dropped, "pictures": [asdict(picture) for picture in dataset.pictures]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in (
            (job.model_graph, json.dumps(graph, indent=1)),
            (job.dataset, json.dumps(records)),
            ("job.toml", to_toml(job, COMMENT)),
        ):
            write(folder / file, text)
    except OSError as error:
        raise ValueError(f"could not write the job to {folder}: {error}. Free some space, then queue again") from error
    return folder / "job.toml"


def jobs_folder(name: str) -> Path:
    base = Path(folder_paths.get_output_directory()).resolve() / "tidetable" / "jobs"
    folder = (base / name).resolve() if name.strip() and "\0" not in name else base
    if base not in folder.parents:
        raise ValueError(f"{name!r} is not a folder inside {base}: use a plain name")
    return folder


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_file(path: Path) -> None:
    """Run a job file in this process, with the others of the torchrun that started it. Exits with the reason."""
    join()
    try:
        name = run_job(read_job(path), path.parent)
    except ValueError as error:
        sys.exit(f"{path.name}: {error}")
    if name:
        logger.info("saved %s", name)
    if dist.is_initialized():
        leave()


def join() -> None:
    """The process group of torchrun's environment; without one this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def read_job(path: Path) -> Job:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    return from_toml(Job, text, path.name)


def run_job(job: Job, folder: Path) -> str | None:
    """Train; the name of the LoRA as loaders list it, None in all processes but the first."""
    model = model_of(json.loads((folder / job.model_graph).read_text(encoding="utf-8")), list(job.model_output))
    records = json.loads((folder / job.dataset).read_text(encoding="utf-8"))
    pictures = tuple(
        EncodedPicture(**{**row, "latents": tuple(row["latents"]), "texts": tuple(row["texts"])})
        for row in records["pictures"]
    )
    # Encode Dataset has looked at every record; a job of several processes does not read them all again in each.
    encoded = EncodedDataset(folder / job.cache, pictures, records["dropped"], verify=World.current().size == 1)
    data = TrainingData(validation_percent=job.validation_percent, encoded=encoded)
    memory = {"memory": job.memory, "shard_base": job.shard_base}
    result = train_lora(model, data, job.train, job.lora, adapter=job.adapter, run=job.run, **memory)
    return save_lora_model(result.lora, job.filename_prefix, "") if World.current().rank == 0 else None
