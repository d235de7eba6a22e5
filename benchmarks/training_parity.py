"""Whether the arms of `bench training` compute the same thing: loss and gradients at batch 1, beside ComfyUI's node.

The node trains on one sample for two steps. What it drew (noise, sigma) and what it had (parameters, losses, gradients
before each update) is recorded through ComfyUI's own model wrapper and torch's optimizer hook; the others then compute
loss and gradients at the same point. The second step counts too: only there have both factors of a pair a gradient.
"""

from dataclasses import dataclass

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from tidetable.runtime.trainable import training_session
from tidetable.training.objective import loss_for_batch

from .training_arms import ARMS, X0, WholeNetwork, plain_loop, run_arm
from .training_cases import Data, build


TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """One step of ComfyUI's node on one sample."""

    sigma: Tensor
    """[1], sigma / alpha for a v model, t for a flow model."""
    x: Tensor
    """[1, C, H, W], what `apply_model` was given."""
    parameters: Tensors
    gradients: Tensors
    loss: float


@dataclass(frozen=True)
class Difference:
    """Relative errors between an arm and ComfyUI's node (for `core-bypass`: between it and `tidetable`)."""

    loss: float
    gradient: float
    """Length of the difference of the whole gradient over the length of the gradient."""


def compare(network: str, data: Data) -> dict[str, Difference]:
    """arm -> the larger of its differences over both steps. ValueError where the arms train different tensors."""
    points = core_points("core", network, data)
    found = {arm: _largest(points, arm, network, data) for arm in ("tidetable", "loop")}
    if "core-bypass" in ARMS:  # it draws the same, but its own second step is elsewhere
        found["core-bypass"] = _largest(core_points("core-bypass", network, data), "tidetable", network, data)
    return found


def check(network: str, differences: dict[str, Difference]) -> None:
    """ValueError where an arm is further from ComfyUI's node than float32 explains: its speed would mean nothing."""
    for arm, found in differences.items():
        if not (found.loss <= TOLERANCE and found.gradient <= TOLERANCE):
            raise ValueError(
                f"{network}: {arm} and ComfyUI's node differ by {found.loss:.1e} in the loss and {found.gradient:.1e}"
                f" in the gradient (at most {TOLERANCE:g}): they do not train the same thing, so nothing is timed"
            )


def core_points(arm: str, network: str, data: Data) -> list[Point]:
    """Both steps of ComfyUI's node."""
    model, inputs = build(network), []

    def record(executor, x, t, *args, **kwargs):
        inputs.append((x.detach().clone(), t.detach().clone()))
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tidetable_benchmark", record)
    torch.manual_seed(0)
    (trained, losses), watch = run_arm(arm, model, data.one(), 1, 2, keep=(0, 1))
    points = []
    for (x, sigma), kept, loss in zip(inputs, watch.kept, losses, strict=True):
        # Newer ComfyUI trains each pair's alpha too; two steps leave it within 2e-6 of the others' 1.
        pairs = {name: kept.get(p.data_ptr()) for name, p in trained.items() if not name.endswith(".alpha")}
        named = {name.removeprefix("diffusion_model."): pair for name, pair in pairs.items() if pair is not None}
        values, gradients = ({name: pair[k] for name, pair in named.items()} for k in (0, 1))
        points.append(Point(sigma, x, values, gradients, loss))
    return points


def ours(network: str, data: Data, point: Point) -> tuple[float, Tensors]:
    """Loss and gradients by our engine's objective, denoiser and adapters."""
    with training_session(build(network)) as denoiser:
        base = dict(denoiser.real.diffusion_model.named_modules())
        adapters = WholeNetwork(base, denoiser.device)
        _load(adapters.named(), point, {name: copy.detach().clone() for name, (*_, copy) in adapters.copies.items()})
        dataset = denoiser.dataset([data.latents[0]["samples"][0]], data.positive[:1])
        process, flow = denoiser.process, denoiser.process.name == "flow"
        x0 = dataset.latents[0][None]
        t = point.sigma.double() if flow else process.t_from_ratio(point.sigma.double())
        with adapters.installed():
            loss = loss_for_batch(denoiser, x0, dataset.conditions, noise_of(point, x0, flow), t, X0).mean()
            loss.backward()
        return loss.item(), _gradients(adapters.named())


def loop(network: str, data: Data, point: Point) -> tuple[float, Tensors]:
    """Loss and gradients by the plain loop."""
    with torch.inference_mode(False), torch.enable_grad():
        model = build(network)
        plain = plain_loop(model)
        copies = {name: p.detach().clone() for name, p in plain.trained.items() if name.endswith((".diff", ".diff_b"))}
        _load(plain.trained, point, copies)
        x0 = data.latents[0]["samples"].clone()
        (context, options), flow = data.positive[0][0], plain.alpha_bar is None
        alpha = 1 - point.sigma if flow else 1 / (1 + point.sigma**2).sqrt()
        sigma = point.sigma if flow else point.sigma * alpha
        level = alpha, sigma, model.model.model_sampling.timestep(point.sigma)
        loss = plain.loss(x0, noise_of(point, x0, flow), level, context.clone(), options["pooled_output"].clone())
        loss.backward()
        return loss.item(), _gradients(plain.trained)


def noise_of(point: Point, x0: Tensor, flow: bool) -> Tensor:
    """The noise in what the node gave to `apply_model`."""
    sigma = point.sigma.double().view(-1, 1, 1, 1)
    clean = x0.double() * (1 - sigma if flow else 1)
    return ((point.x.double() - clean) / sigma).float()


def _load(parameters: Tensors, point: Point, base: Tensors) -> None:
    """Take over the node's values; it keeps norms and biases as changes of what is in `base`."""
    if set(parameters) != set(point.parameters):
        differ = sorted(set(parameters) ^ set(point.parameters))
        raise ValueError(f"not the same tensors are trained: {', '.join(differ[:4])} and {len(differ)} in all differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = point.parameters[name].reshape(parameter.shape)
            parameter.copy_(base[name] + value if name in base else value)


def _gradients(parameters: Tensors) -> Tensors:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def _difference(point: Point, loss: float, gradients: Tensors) -> Difference:
    if set(gradients) != set(point.gradients):
        raise ValueError(f"gradients of other tensors: {sorted(set(gradients) ^ set(point.gradients))[:4]}")
    theirs = torch.cat([gradient.double().flatten() for gradient in point.gradients.values()])
    found = torch.cat([gradients[name].double().flatten() for name in point.gradients])
    return Difference(abs(loss - point.loss) / point.loss, float((found - theirs).norm() / theirs.norm()))


def _largest(points: list[Point], arm: str, network: str, data: Data) -> Difference:
    compute = {"tidetable": ours, "loop": loop}[arm]
    found = [_difference(point, *compute(network, data, point)) for point in points]
    return Difference(max(d.loss for d in found), max(d.gradient for d in found))
