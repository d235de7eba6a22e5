"""A denoiser whose optimum is known: all data is one point c, so the perfect velocity is (x_t - c) / t."""

from contextlib import nullcontext

import torch
from torch import nn

from tidetable.schedules.process import Flow
from tidetable.training.data import Dataset


CENTER = (1.5, -0.5, 0.25)


class PointDenoiser(nn.Module):
    """Predicts the velocity towards its only parameter, three numbers."""

    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(3))
        self.process, self.prediction, self.shift = Flow(), "velocity", 1.0
        self.batches: list[int] = []

    def snap(self, t):
        return t

    def gradient_context(self):
        return nullcontext()

    def predict(self, x_t, t, conditions):
        assert len(conditions) == len(x_t) == len(t)
        self.batches.append(len(x_t))
        scale = torch.stack([torch.tensor(1.0 if c is None else float(c)) for c in conditions])
        t = t.to(x_t.dtype)[:, None, None, None]
        return (x_t - (self.center * scale[:, None])[:, :, None, None]) / t.clamp_min(0.05)


def point_dataset(count: int = 12, empty=None) -> Dataset:
    point = torch.tensor(CENTER)[:, None, None].expand(3, 4, 4)
    return Dataset([point.clone() for _ in range(count)], [1.0] * count, empty)
