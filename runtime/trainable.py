"""A ComfyUI MODEL as something that can be trained: ComfyUI's own network, noise process, conditioning and memory
management.

Nodes run in inference mode, whose tensors cannot take part in a backward pass. A training session leaves that mode,
gives every weight a differentiable view of the same memory, and puts the original objects back at the end, whatever
happens in between.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ..schedules.prediction import Prediction
from ..schedules.process import VP, NoiseProcess
from ..training.data import Dataset
from ..training.memory import BaseWeights
from .offload import load, recomputing
from .process import prediction_of, process_of, stored_shift
from .quantized import dequantizing, ordinary


logger = logging.getLogger(__name__)
UNSUPPORTED_CONDITIONING = (
    "control",
    "area",
    "mask",
    "hooks",
    "gligen",
    "start_percent",
    "end_percent",
    "concat_latent_image",
)
"""Conditioning options that mean something only while sampling; a sample that carries one is refused, not misread."""
OUT_OF_PLACE_CLASSES = (
    "UNetModel",
    "MMDiT",
    "OpenAISignatureMMDITWrapper",
    "QwenImageTransformer2DModel",
    "NextDiT",
    "WanModel",
)
"""Networks without in-place residuals (gradients checked in float64: reference/seams-runtime.md, 2.3)."""

Row = dict[str, Tensor | object]


class ComfyDenoiser:
    """`training.protocols.TrainableDenoiser` over a loaded ComfyUI model. Made by `training_session`."""

    process: NoiseProcess
    prediction: Prediction
    shift: float

    def __init__(
        self, patcher: comfy.model_patcher.ModelPatcher, beside: Sequence[comfy.model_patcher.ModelPatcher] = ()
    ):
        self.patcher = patcher
        self.loaded = [patcher, *beside]
        """What must not be moved while it trains: the model, and a text encoder that is trained with it."""
        self.real = patcher.model
        self.device = patcher.load_device
        sampling = self.real.model_sampling
        process, prediction = process_of(sampling), prediction_of(sampling)
        if process is None or prediction is None or float(getattr(sampling, "noise_scale", 1.0)) != 1.0:
            classes = ", ".join(cls.__name__ for cls in type(sampling).__mro__[1:3])
            raise ValueError(
                f"a model with this sampling ({classes}) cannot be trained here: "
                "supported are eps, v and x0 models with a discrete schedule, and flow models without noise scaling"
            )
        self.process, self.prediction, self.shift = process, prediction, stored_shift(sampling) or 1.0
        self.resolve: Callable[[Sequence[Any]], Sequence[Row]] | None = None
        """Makes rows of what a data set has in their place, at each forward pass: captions, where text is trained."""
        self.passes: Callable[[int], int] = int
        """How many forward passes a batch makes that needs so many: more where other processes need more."""
        network = type(self.real.diffusion_model).__name__
        self.in_place = network not in OUT_OF_PLACE_CLASSES

    def snap(self, t: Tensor) -> Tensor:
        """Table rows for discrete models, t itself for flow models."""
        if isinstance(self.process, VP):
            last = len(self.process.alpha_bar) - 1
            return (t * last).round() / last
        return t

    def gradient_context(self) -> AbstractContextManager:
        # Flux-type blocks add residuals in place to tensors that backward needs.
        return torch.autograd.graph.allow_mutation_on_saved_tensors() if self.in_place else nullcontext()

    def predict(self, x_t: Tensor, t: Tensor, conditions: Sequence[Row]) -> Tensor:
        """Native prediction for x_t [B, C, ...] at t [B].

        Rows whose conditionings have one shape share a forward pass.
        """
        if self.resolve is not None:
            conditions = self.resolve(conditions)
        signatures = [_signature(row) for row in conditions]
        kinds = list(dict.fromkeys(signatures))
        more = self.passes(len(kinds)) - len(kinds)
        if len(kinds) == 1:
            result = self._forward(x_t, t, conditions)
        else:
            out: list[Tensor | None] = [None] * len(conditions)
            for signature in kinds:
                rows = [i for i, other in enumerate(signatures) if other == signature]
                part = self._forward(x_t[rows], t[rows], [conditions[i] for i in rows])
                for place, row in enumerate(rows):
                    out[row] = part[place]
            result = torch.stack([row for row in out if row is not None])
        for _ in range(more):  # its backward pass is made as well, and gives nothing
            result = result + 0 * self._forward(x_t[:1], t[:1], conditions[:1])
        return result

    def _forward(self, x_t: Tensor, t: Tensor, conditions: Sequence[Row]) -> Tensor:
        # One step may be many batches, and a validation many more: a cancel waits for one forward pass at most.
        comfy.model_management.throw_exception_if_processing_interrupted()
        # ComfyUI's eps and v models live in the variance-exploding picture: x / alpha, and sigma / alpha as sigma.
        if isinstance(self.process, VP):
            sigma = self.process.ratio(t).float().to(x_t.device)
            x_host = x_t / self.process.alpha(t).to(x_t).reshape(-1, *[1] * (x_t.ndim - 1))
        else:
            sigma, x_host = t.float().to(x_t.device), x_t
        captured: list[Tensor] = []
        hook = self.real.diffusion_model.register_forward_hook(lambda module, args, output: captured.append(output))
        try:
            options = {"optimized_attention_override": differentiable_attention, "sigmas": sigma}
            self.real.apply_model(x_host, sigma, transformer_options=options, **_collate(conditions))
        finally:
            hook.remove()
        return captured[-1].float()

    def condition(self, conditioning: list, latent: Tensor) -> Row:
        """One CONDITIONING of a node, with its latent [C, ...], to what `predict` takes: the model's own conds."""
        if len(conditioning) != 1:
            raise ValueError(
                f"a training sample needs one conditioning, this one has {len(conditioning)} entries: "
                "connect CLIPTextEncode directly, without Conditioning (Combine) or area nodes"
            )
        cross_attn, options = conditioning[0]
        found = [name for name in UNSUPPORTED_CONDITIONING if options.get(name) is not None]
        if found:
            raise ValueError(
                f"a training conditioning cannot carry {', '.join(found)}: connect CLIPTextEncode directly"
            )
        owned = {key: _own(value, self.device) for key, value in options.items()}
        conds = self.conds(_own(cross_attn, self.device), owned, latent)
        return {key: _own(value, self.device) for key, value in conds.items()}

    def conds(self, cross_attn: Tensor, options: dict[str, Any], latent: Tensor) -> Row:
        """The model's own conds from a conditioning and its options for one sample [C, ...]; gradients pass."""
        noise = latent[None]
        arguments = {
            **options,
            "cross_attn": cross_attn,
            "noise": noise,
            "latent_image": noise,
            "device": self.device,
            "prompt_type": "positive",
        }
        arguments.setdefault("width", latent.shape[-1] * 8)
        arguments.setdefault("height", latent.shape[-2] * 8)
        conds = self.real.extra_conds(**arguments)
        return {key: value.process_cond(batch_size=1, area=None).cond for key, value in conds.items()}

    def latent(self, sample: Tensor, name: str = "a latent") -> Tensor:
        """A VAE's latent [C, ...] to the space of the network, in fp32 on its device.

        Raises where the channels differ or a value is not finite; `name` says in the message which latent it is.
        """
        wanted = self.real.latent_format.latent_channels
        if sample.shape[0] != wanted:
            raise ValueError(
                f"the latents have {sample.shape[0]} channels but this model's have {wanted}: "
                "encode the images with the VAE that belongs to the model"
            )
        if not torch.isfinite(sample).all():
            raise ValueError(f"{name} contains nan or inf: look at the image it came from, or use a VAE in fp32")
        sample = _own(sample, self.device).float()
        if getattr(self.real.latent_format, "latent_dimensions", 2) == 3 and sample.ndim == 3:
            sample = sample[:, None]
        return self.real.process_latent_in(sample[None])[0]

    def dataset(self, samples: Sequence[Tensor], conditionings: Sequence[list], empty: list | None = None) -> Dataset:
        """Latents and conditionings of nodes, paired one to one (or one conditioning for all), as a data set."""
        if len(conditionings) == 1:
            conditionings = list(conditionings) * len(samples)
        if len(samples) != len(conditionings):
            raise ValueError(
                f"{len(samples)} latents but {len(conditionings)} conditionings: connect one for each latent, or a"
                " single one"
            )
        latents = [self.latent(sample, f"latent {i + 1} of {len(samples)}") for i, sample in enumerate(samples)]
        with torch.no_grad():
            rows = [self.condition(c, latent) for c, latent in zip(conditionings, latents, strict=True)]
            empty_row = self.condition(empty, latents[0]) if empty is not None else None
        return Dataset(latents, rows, empty_row)


@contextmanager
def training_session(
    patcher: comfy.model_patcher.ModelPatcher,
    memory_required: float = 0,
    beside: Sequence[comfy.model_patcher.ModelPatcher] = (),
    base_weights: BaseWeights = "full",
) -> Iterator[ComfyDenoiser]:
    """Load the model, make it differentiable in place, and leave it exactly as it was found.

    The same for plain patchers `beside` it, loaded at the same time: a text encoder's.
    """
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        patcher = plain_patcher(patcher)
        refuse_compiled(patcher)
        load(patcher, beside, memory_required, base_weights)
        models = [loaded.model for loaded in (patcher, *beside)]
        for model in models:
            stack.enter_context(thawed(model))
            stack.enter_context(dequantizing(model))
        if base_weights != "full" or any(model.model_lowvram for model in models):  # --novram never loads in full
            stack.enter_context(recomputing(models))
        stack.enter_context(training_flag(True))
        yield ComfyDenoiser(patcher, beside)


def refuse_compiled(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError where torch.compile took the place of the network or a block: adapters would get the wrong names.

    ComfyUI's own node only wraps sampling, which training does not go through.
    """
    places = {**dict(patcher.model.named_modules()), **patcher.object_patches}
    compiled = [name for name, module in places.items() if type(module).__name__ == "OptimizedModule"]
    if compiled:
        raise ValueError(
            f"the MODEL carries a torch.compile of {', '.join(compiled[:3])}: connect the MODEL as it is before that "
            "node, and compile the trained one"
        )


def plain_patcher(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone; of a MODEL with dynamic VRAM one whose weights are loaded anew, as ordinary tensors.

    Dynamic VRAM gives the memory of a weight to another layer as soon as a forward pass is over.
    """
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return patcher.clone()
    try:
        clone = patcher.clone(disable_dynamic=True)
    except RuntimeError as error:  # a loader of another package that cannot load again
        raise ValueError(
            f"this MODEL uses dynamic VRAM and cannot be loaded without ({error}): start ComfyUI with "
            "--disable-dynamic-vram, or load it with ComfyUI's own loader"
        ) from error
    logger.info("this MODEL uses dynamic VRAM, which has no backward pass: its file is loaded once more, without")
    return clone


@contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """Swap inference tensors for ordinary ones on the same memory, and freeze every parameter; undo both at the end.

    An entry that somebody else replaced meanwhile (unloading a patched model puts the clean weights back) is left
    alone: restoring it would write the patched weights into the base model for good. The original goes with its
    replacement, so that one whose place is taken by a share of it is freed.
    """
    swapped: list[tuple[dict, str]] = []
    frozen: list[Tensor] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or hasattr(tensor, "__tensor_flatten__"):  # of others: autograd never sees it
                        continue
                    if tensor.is_inference():
                        view = ordinary(tensor)
                        new = nn.Parameter(view, requires_grad=False) if table is module._parameters else view
                        vars(new)["tidetable_original"] = tensor
                        table[name] = new
                        swapped.append((table, name))
                    elif tensor.requires_grad and tensor.is_leaf:
                        frozen.append(tensor.requires_grad_(False))
        yield
    finally:
        for table, name in swapped:
            original = vars(table[name]).pop("tidetable_original", None) if table.get(name) is not None else None
            if original is not None:
                table[name] = original
        for tensor in frozen:
            tensor.requires_grad_(True)


@contextmanager
def training_flag(value: bool) -> Iterator[None]:
    """Newer ComfyUI uses fused kernels without a backward pass unless its `in_training` says otherwise."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before = management.in_training
    management.in_training = value
    try:
        yield
    finally:
        management.in_training = before


def differentiable_attention(func, *args, **kwargs):
    """Attention override: torch's own, which has a backward pass, in place of whatever backend is configured."""
    del func
    return attention_pytorch(*args, **kwargs)


def _own(value: Any, device: torch.device) -> Any:
    """A copy outside inference mode, on the device; anything but tensors (and lists of them) passes through."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
        return [_own(item, device) for item in value]
    return value


def _signature(row: Row) -> tuple:
    def describe(value):
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, list):
            return tuple(describe(item) for item in value)
        return repr(value)

    return tuple((key, describe(value)) for key, value in sorted(row.items()))


def _collate(rows: Sequence[Row]) -> Row:
    """Rows of one signature to a batch: tensors along the first dimension, constants once."""

    def join(values: list):
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], list):
            return [join([value[i] for value in values]) for i in range(len(values[0]))]
        return values[0]

    return {key: join([row[key] for row in rows]) for key in rows[0]}
