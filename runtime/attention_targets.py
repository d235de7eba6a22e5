"""How a forward is weakened at a target: through ComfyUI's patch points and, for its length alone, hooks on the blocks.

A target is plain data, found once when the node runs (blocks.py). `weakened` puts everything in place for one forward,
yields the transformer options to use, and takes it away again whatever happens. What other packs have put at the same
place is called from inside.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from torch import Tensor, nn

from ..samplers.guidance import perturb
from . import attention_families as families


Place = tuple[str, int]
"""(name of a network's list of blocks, index in it)."""

UNET_LISTS = ("input_blocks", "middle_block", "output_blocks")
MIDDLE: Place = ("middle_block", 0)  # of a U-Net, its middle is one block


class Weakening:
    """What is done to the flagged chunks of one forward's rows, and how often it was done."""

    def __init__(self, method: perturb.Method, blur_sigma: float, flags: Sequence[bool], noise_level: float):
        self.method, self.blur_sigma, self.flags = method, blur_sigma, flags
        self.permutations = perturb.permutations_at(noise_level)
        self.hits = 0

    def rows(self, tensor: Tensor) -> list[slice]:
        return perturb.flagged_rows(len(tensor), self.flags)

    def attend(self, attention: perturb.Attention, q: Tensor, v: Tensor, picture: perturb.Picture) -> Tensor:
        """The attention's result [B, N, C], weakened; `q` and `v` [B, N, ...]."""
        self.hits += 1
        rows, tokens = self.rows(q), picture.tokens
        if self.method == "pag":
            return perturb.identity_attention(attention, q, v, rows, tokens)
        size = len(range(q.shape[1])[tokens])
        if self.method == "seg":
            if size != math.prod(picture.grid):
                raise RuntimeError(
                    f"Perturbed attention: blurring queries needs the {picture.grid} grid of the picture's tokens, but "
                    f"there are {size} of them. Another node merges or adds tokens: take it out, or use another method."
                )
            return perturb.blurred_query_attention(attention, q, rows, picture, self.blur_sigma)
        permutation = torch.randperm(size, generator=self.permutations)
        return perturb.shuffled_attention(attention, q, rows, tokens, permutation)


@dataclass(frozen=True)
class UNetTarget:
    """Transformer blocks of a U-Net with self-attention."""

    places: tuple[Place, ...]
    transformers: tuple[tuple[int, ...], ...]
    """For each place, the numbers of its transformer blocks with self-attention (SDXL's middle has 10)."""

    def __str__(self) -> str:
        return f"U-Net blocks {written(self.places)}"

    def num_hits(self, method: perturb.Method) -> int:
        """How often a forward that is weakened everywhere reports it."""
        return len(self.places) if method == "skip" else sum(len(numbers) for numbers in self.transformers)

    @contextlib.contextmanager
    def weakened(self, network: nn.Module, x: Tensor, conds: dict, weakening: Weakening) -> Iterator[dict]:
        options = conds["transformer_options"]
        if weakening.method == "skip":
            layers = [next(filter(_is_transformer, unet_block(network, place))) for place in self.places]
            with contextlib.ExitStack() as stack:
                for layer in layers:
                    stack.enter_context(_left_out(layer, ("x",), weakening))
                yield options
            return
        attn1 = options.get("patches_replace", {}).get("attn1", {})
        functions = {}
        for (name, index), numbers in zip(self.places, self.transformers, strict=True):
            block = (word_of(name), index)  # as ComfyUI names it to patches
            earlier = attn1.get(block)
            functions |= {(*block, i): _unet_attention(attn1.get((*block, i), earlier), weakening) for i in numbers}
        yield _with_replaced(options, "attn1", functions)


def unet_block(network: Any, place: Place) -> Any:
    return network.middle_block if place == MIDDLE else getattr(network, place[0])[place[1]]


def _is_transformer(layer: nn.Module) -> bool:
    return isinstance(layer, comfy_attention.SpatialTransformer)


def self_attention_numbers(layers: Any) -> tuple[int, ...]:
    """Numbers of the transformer blocks with self-attention in the layers of one U-Net block (None: no block)."""
    transformer = next(filter(_is_transformer, layers or ()), None)
    blocks: Any = transformer.transformer_blocks if transformer is not None else ()
    return tuple(index for index, block in enumerate(blocks) if not block.disable_self_attn)


def _unet_attention(earlier: Callable | None, weakening: Weakening) -> Callable:
    """A `patches_replace["attn1"]` function around `earlier` or, without one, around the model's own attention."""

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        def attention(q: Tensor) -> Tensor:
            if earlier is not None:
                return earlier(q, k, v, extra_options)
            heads, precision = extra_options["n_heads"], extra_options["attn_precision"]
            return comfy_attention.optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )

        height, width = extra_options["activations_shape"][-2:]
        return weakening.attend(attention, q, v, perturb.Picture(slice(None), (1, height, width)))

    return replacement


@dataclass(frozen=True)
class BlockTarget:
    """Blocks of a diffusion transformer."""

    family: families.Family
    places: tuple[Place, ...]
    num_attentions: tuple[int, ...]
    """For each place, how many attentions of the block are over the picture; they are its first ones."""

    def __str__(self) -> str:
        return f"{self.family.name} blocks {written(self.places)}"

    def num_hits(self, method: perturb.Method) -> int:
        return len(self.places) if method == "skip" else sum(self.num_attentions)

    @contextlib.contextmanager
    def weakened(self, network: nn.Module, x: Tensor, conds: dict, weakening: Weakening) -> Iterator[dict]:
        options = conds["transformer_options"]
        with contextlib.ExitStack() as stack:
            if weakening.method == "skip":
                for (name, _), block in zip(self.places, self._blocks(network), strict=True):
                    streams = self.family.streams[self.family.lists.index(name)]
                    stack.enter_context(_left_out(block, streams, weakening))
                yield options
                return
            visit = _Visit()
            for block, num_attentions in zip(self._blocks(network), self.num_attentions, strict=True):
                stack.enter_context(_visited(block, num_attentions, visit))
            if self.family.stream is not None:
                stack.enter_context(self._stream_noted(network, visit))
            yield self._with_override(network, x, conds, weakening, visit)

    def _blocks(self, network: Any) -> list[nn.Module]:
        return [getattr(network, name)[index] for name, index in self.places]

    @contextlib.contextmanager
    def _stream_noted(self, network: Any, visit: "_Visit") -> Iterator[None]:
        streams = self.family.streams[0]

        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            visit.stream = _stream(streams, self.family.stream, args, kwargs).shape[1]

        first = getattr(network, self.family.lists[0])[0]
        handle = first.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _with_override(self, network: Any, x: Tensor, conds: dict, weakening: Weakening, visit: "_Visit") -> dict:
        """The options with an `optimized_attention_override` around the one that may be there already."""
        options = conds["transformer_options"]
        earlier = options.get("optimized_attention_override")

        def override(function: Callable, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def attention(q: Tensor) -> Tensor:
                if earlier is not None:
                    return earlier(function, q, k, v, *args, **kwargs)
                return function(q, k, v, *args, **kwargs)

            if visit.attentions_left == 0:
                return attention(q)
            visit.attentions_left -= 1
            heads = args[0] if args else kwargs["heads"]
            form = _Form(heads, kwargs.get("skip_reshape", False), kwargs.get("skip_output_reshape", False))
            length = q.shape[2] if form.heads_first else q.shape[1]
            stream = visit.stream or _stream_from(kwargs.get("transformer_options") or {})
            picture = self._picture(network, x.shape, length, stream, conds)
            return form.out(weakening.attend(form.attention(attention), form.q(q), form.v(v), picture))

        return {**options, "optimized_attention_override": override}

    def _picture(
        self, network: Any, shape: Sequence[int], length: int, stream: int | None, conds: dict
    ) -> perturb.Picture:
        patch = self.family.patch(network)
        grid = [-(-size // cells) for size, cells in zip(shape[-len(patch) :], patch, strict=True)]
        frames, height, width = [1] * (3 - len(grid)) + grid
        count = frames * height * width
        tokens = self.family.picture(families.Sequence(length, count, stream or count, network, conds))
        found = tokens.stop - tokens.start
        if tokens.start < 0 or tokens.stop > length or found % (frames * height):
            raise RuntimeError(
                f"Perturbed attention: the {frames} × {height} × {width} tokens of the picture were not found in a "
                f"sequence of {length} in the {self}. Another node changes the sequence: take it or this node out."
            )
        return perturb.Picture(tokens, (frames, height, found // (frames * height)))


Target = UNetTarget | BlockTarget


@dataclass
class _Visit:
    """Where a forward is: what is left to do in the target's block it is in, and what was noted on the way."""

    attentions_left: int = 0
    stream: int | None = None


@dataclass(frozen=True)
class _Form:
    """The layouts of one call of ComfyUI's attention, seen from outside as q, v [B, N, ...] and result [B, N, C]."""

    heads: int
    heads_first: bool
    """q, k and v are [B, H, N, D], not [B, N, C]."""
    result_heads_first: bool

    def q(self, q: Tensor) -> Tensor:
        return q.transpose(1, 2) if self.heads_first else q

    def v(self, v: Tensor) -> Tensor:
        if not self.heads_first:
            return v
        v = v.transpose(1, 2)
        return v.repeat_interleave(self.heads // v.shape[2], 2)  # fewer heads in grouped-query attention

    def attention(self, attention: perturb.Attention) -> perturb.Attention:
        def rows_of_tokens(q: Tensor) -> Tensor:
            result = attention(q.transpose(1, 2) if self.heads_first else q)
            return result.transpose(1, 2).flatten(2) if self.result_heads_first else result

        return rows_of_tokens

    def out(self, result: Tensor) -> Tensor:
        return result.unflatten(2, (self.heads, -1)).transpose(1, 2) if self.result_heads_first else result


@contextlib.contextmanager
def _visited(block: nn.Module, num_attentions: int, visit: _Visit) -> Iterator[None]:
    """For its length, `visit` says that the next `num_attentions` attentions are the block's, when it is entered."""

    def enter(*_: Any) -> None:
        visit.attentions_left = num_attentions

    def leave(*_: Any) -> None:
        visit.attentions_left = 0

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _left_out(block: nn.Module, streams: Sequence[str], weakening: Weakening) -> Iterator[None]:
    """For its length, the weakened rows come out of the block as they went in."""
    kept: list[list[Tensor]] = []

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        # Copies: Flux-type blocks write into what they are given.
        inputs = [_stream(streams, name, args, kwargs) for name in streams]
        kept[:] = [[x[row].clone() for row in weakening.rows(x)] for x in inputs]

    def leave(_: nn.Module, args: tuple, output: Any) -> Any:
        weakening.hits += 1
        outputs = output if isinstance(output, tuple) else (output,)
        # SD3's last block gives no text back.
        outputs = tuple(
            x if x is None else perturb.skipped_block(x, before, weakening.rows(x))
            for x, before in zip(outputs, kept, strict=True)
        )
        return outputs if isinstance(output, tuple) else outputs[0]

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stream(streams: Sequence[str], name: str | None, args: tuple, kwargs: dict) -> Tensor:
    """One of a block's token streams from the arguments it is called with."""
    return kwargs[name] if name in kwargs else args[streams.index(str(name))]


def _stream_from(transformer_options: dict) -> int | None:
    start, stop = transformer_options.get("img_slice") or (0, 0)
    return stop - start or None


def _with_replaced(transformer_options: dict, kind: str, functions: dict) -> dict:
    """A copy of the options with `functions` added to `patches_replace[kind]`."""
    replaced = transformer_options.get("patches_replace", {})
    return {**transformer_options, "patches_replace": {**replaced, kind: {**replaced.get(kind, {}), **functions}}}


def written(places: tuple[Place, ...]) -> str:
    """Places as one writes them in the node's blocks: "input 4-5, middle, output 3"."""
    numbers = {name: [i for other, i in places if other == name] for name, _ in places}
    return ", ".join("middle" if name == MIDDLE[0] else f"{word_of(name)} {_ranges(n)}" for name, n in numbers.items())


def word_of(name: str) -> str:
    """The short name of a list of blocks: "double" for "double_blocks", "layer" for "layers"."""
    return name.split("_")[0].removesuffix("s")


def _ranges(numbers: Iterable[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
