"""Linear multistep methods in sigma: they combine past slopes d = (x − D)/sigma."""

from itertools import pairwise

import numpy as np
from torch import Tensor

from .steps import Denoise, Noise, Report, Space, finish_step, push_of, split_step


def adams_bashforth_weights(nodes: list[float], end: float) -> list[float]:
    """Weights w with sum(w_j·f(nodes_j)) = integral of f from nodes[0] to `end`, for polynomials f that the nodes fix.

    Solves the moment equations sum(w_j·(nodes_j − nodes_0)^m) = h^(m+1)/(m+1), in units of h = end − nodes[0].
    """
    h = end - nodes[0]
    powers = np.arange(len(nodes))
    offsets = (np.array(nodes) - nodes[0]) / h
    return (h * np.linalg.solve(offsets[None, :] ** powers[:, None], 1.0 / (powers + 1.0))).tolist()


def ipndm_v(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report, order: int = 4
) -> Tensor:
    """iPNDM with variable steps (Zhang & Chen 2022, arXiv:2204.13902): Adams–Bashforth with a growing order.

    The weights are those of the steps really taken (Hairer, Nørsett & Wanner, Solving ODEs I, III.5), where the
    published code's four-step weights do not even sum to 1 on uneven steps. The first steps, of lower order, limit
    orders 3 and 4 to smaller errors at a slope of 2.
    """
    nodes: list[float] = []
    slopes: list[Tensor] = []
    for i, (start, end) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, start).denoised
        report(i, x, start, denoised)
        if end == 0.0:
            return denoised
        nodes, slopes = [start, *nodes][:order], [(x - denoised) / start, *slopes][:order]
        for weight, d in zip(adams_bashforth_weights(nodes, end), slopes, strict=True):
            x = x + weight * d
    return x


def gradient_estimation(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report
) -> Tensor:
    """Gradient estimation (Permenter & Yuan 2023, arXiv:2306.04848, Algorithm 2 with gamma = 2): d̄ = 2·d − d_old."""
    d_old = None
    for i, (start, end) in enumerate(pairwise(sigmas)):
        guided = denoise(x, start)
        report(i, x, start, guided.denoised)
        if end == 0.0:
            return guided.denoised
        d = (x - guided.base) / start
        mean = d if d_old is None else 2.0 * d - d_old
        x = finish_step(x + (end - start) * mean, push_of(guided), split_step(space, start, end), noise)
        d_old = d
    return x
