"""One process of a run of several: `distributed_child.py RANK SIZE RENDEZVOUS FOLDER FROM TO`.

Trains a small network from step FROM to step TO, going on from FOLDER's checkpoint where there is one, and writes the
next there.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from devtools import loading


loading.load_checkout()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from tidetable.schedules.process import Flow  # noqa: E402
from tidetable.tests.training.solvable import PointDenoiser  # noqa: E402
from tidetable.training.checkpoint import read_newest, write_checkpoint  # noqa: E402
from tidetable.training.config import TrainConfig, with_optimizer  # noqa: E402
from tidetable.training.data import Dataset  # noqa: E402
from tidetable.training.distributed import leave  # noqa: E402
from tidetable.training.engine import Trainer  # noqa: E402
from tidetable.training.events import StepDone, Validated  # noqa: E402
from tidetable.training.optimizers import OptimizerConfig  # noqa: E402
from tidetable.training.recipe import ObjectiveConfig  # noqa: E402


class Network(PointDenoiser):
    """A network with a layer that some batches do not reach, and one that none does."""

    def __init__(self):
        super().__init__()
        self.process = Flow()
        generator = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(3, 3, generator=generator))
        self.rare, self.never = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def predict(self, x_t, t, conditions):
        out = super().predict(x_t, t, conditions)
        rare = torch.tensor([float(c) > 0.9 for c in conditions])
        if rare.any():
            out = out + rare[:, None, None, None] * self.rare[:, None, None]
        return out + torch.einsum("ij,bjhw->bihw", self.mix, x_t)


class Watched(list):
    """Latents, and which of them were read."""

    def __init__(self, latents):
        super().__init__(latents)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def main() -> None:
    rank, size, rendezvous, folder, steps = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(3, 4, 4, generator=generator) for _ in range(21)]
    watched = Watched(latents[:16])
    data, held_out = Dataset(watched, [i / 16 for i in range(16)], 0.0, keys=[0] * 16), Dataset(latents[16:], [0.5] * 5)
    objective = ObjectiveConfig(offset_noise=0.1, pyramid_discount=0.3, input_perturbation=0.1)
    base = TrainConfig(steps=12, batch_size=4, learning_rate=1e-2, caption_dropout=0.2, objective=objective)
    config = with_optimizer(base, OptimizerConfig(accumulate=2, ema_decay=0.9, warmup=2))
    network = Network()
    trainer = Trainer(config, network, list(network.parameters()), data, held_out)
    saved, _ = read_newest(Path(folder))
    if saved is not None:
        trainer.load_state(saved["trainer"])
    losses, validations = [], []
    for event in trainer.run():
        if isinstance(event, StepDone):
            losses.append(event.loss)
        if isinstance(event, Validated):
            validations.append(event.loss)
        if trainer.step == steps and isinstance(event, StepDone):
            break
    Path(folder, f"read_{rank}.json").write_text(json.dumps(watched.read))
    if rank == 0:
        write_checkpoint(Path(folder), trainer.step, {"trainer": trainer.state(), "losses": losses,
                         "validations": validations, "batches": network.batches}, 9)  # fmt: skip
    if size > 1:
        leave()


if __name__ == "__main__":
    main()
