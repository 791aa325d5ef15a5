"""A whole model quantised, layer by layer: each layer sees what the quantised ones before it let through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from martlet import chat, hub
from martlet.errors import BackendUnavailable, UsageError
from martlet.export import folder, merge
from martlet.export.arguments import ExportArguments
from martlet.export.quantise import layouts, rounding
from martlet.export.quantise.layerwise import LayerWise
from martlet.export.quantise.rounding import Grid, Rounded
from martlet.export.source import Source, merged_in_float32, tensors
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.model import families, weights
from martlet.model.spec import DecoderSpec, Layer
from martlet.train import datasets, encode
from martlet.train.rows import RowError

log = logging.getLogger("martlet")

METHODS = ("rtn", "gptq", "awq")
BITS = {"rtn": (4, 8), "gptq": (4, 8), "awq": (4,)}
TINY = 1e-12  # a token's mean square that counts as nothing
TOGETHER = 8  # calibration sequences that run at once
FED = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up"), "down": ("down",)}  # what shares an input

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """method: of METHODS. group: inputs that share a scale, None for all of a row. act_order: of gptq."""

    method: str
    bits: int
    group: int | None
    act_order: bool = False

    def grid(self, inputs: int) -> Grid:
        return Grid(self.bits, self.group or inputs, symmetric=self.method != "awq")

    @property
    def layout(self) -> layouts.Layout:
        if self.method == "rtn":
            return layouts.INT8 if self.bits == 8 and self.group is None else layouts.PACKED
        return layouts.GPTQ if self.method == "gptq" else layouts.AWQ


def recipe(arguments: ExportArguments, spec: DecoderSpec) -> Recipe:
    """Raises UsageError for what cannot be done, naming what can."""
    method, bits = arguments.quant_method, arguments.quant_bits
    if bits not in BITS[method]:
        raise UsageError(
            f"--quant_method {method} rounds to {' or '.join(map(str, BITS[method]))} bits, not {bits}",
            param="quant_bits",
        )
    if method != "rtn" and not arguments.dataset:
        raise UsageError(f"--quant_method {method} needs --dataset with texts to calibrate on", param="dataset")
    if method != "rtn" and any(layer.mlp.experts for layer in spec.layers):
        raise UsageError(
            f"--quant_method {method} cannot calibrate mixtures of experts; rtn needs no calibration",
            param="quant_method",
        )
    group = arguments.quant_group_size
    group = (None if (method, bits) == ("rtn", 8) else 128) if group is None else None if group == -1 else group
    widths = {p.shape[1] for p in weights.parameters(spec) if p.kind == "linear" and p.name != "head"}
    if group is not None and (group < 1 or any(width % group for width in widths)):
        fits = [size for size in (128, 64, 32) if all(width % size == 0 for width in widths)]
        raise UsageError(
            f"linears with {', '.join(map(str, sorted(widths)))} inputs have no whole groups of {group}; "
            f"--quant_group_size {', '.join(map(str, [*fits, -1]))} would do",
            param="quant_group_size",
        )
    return Recipe(method, bits, group, act_order=method == "gptq" and arguments.quant_act_order)


def write(source: Source, target: Path, arguments: ExportArguments, progress: Progress | None = None) -> Path:
    """The source's model, its adapter merged in, quantised at `target`. progress(done, total) counts layers."""
    card, checkpoint = merged_in_float32(source)
    try:
        model = LayerWise(card, checkpoint, _device(arguments.quant_device_map))
        how = recipe(arguments, model.spec)
        with folder.staged(target, replace=arguments.replace_if_exists) as beside:
            beside.mkdir()
            texts = None if how.method == "rtn" else calibration(source.card, arguments)
            linears, changed = _quantised(model, how, texts, progress)
            dtype = merge.DTYPES[arguments.dtype] or _sixteen_bits(source.card)
            folder.write_weights(beside, _file(source, dtype, linears, changed))
            config = how.layout.config(how.grid(-1))
            if how.layout.left_alone:
                config[how.layout.left_alone] = _left_alone(model.spec, source.card)
            folder.write_beside(beside, source.card, dtype=dtype, quantization_config=config)
    finally:
        checkpoint.close()
    return target


def _device(name: str) -> str:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"--quant_device_map must be cpu, cuda or cuda:N, got {name!r}", param="quant_device_map")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"--quant_device_map {name}: this torch finds {torch.cuda.device_count()} CUDA devices; cpu would do",
            param="quant_device_map",
        )
    return name


def calibration(card: ModelCard, arguments: ExportArguments) -> list[list[int]]:
    """--quant_n_samples sequences of --quant_seqlen tokens, of the rows of --dataset one after another."""
    tokenizer, length = hub.load_tokenizer(card), arguments.quant_seqlen
    if length > card.config.get("max_position_embeddings", length):
        raise UsageError(
            f"--quant_seqlen {length} is more than the {card.config['max_position_embeddings']} positions of "
            f"{card.name}",
            param="quant_seqlen",
        )
    found = datasets.load(arguments.dataset, seed=arguments.dataset_seed)
    template = _template(card, tokenizer)
    ids: list[int] = []
    left_out = len(found.problems)
    for row in found.rows:
        try:
            ids += encode.encode(row, template, tokenizer).ids
        except RowError:
            left_out += 1
        if len(ids) >= arguments.quant_n_samples * length:
            break
    texts = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][: arguments.quant_n_samples]
    if not texts:
        raise UsageError(
            f"the rows of --dataset have {len(ids)} tokens together, less than --quant_seqlen {length}", param="dataset"
        )
    log.info(
        "calibrating on %d sequences of %d tokens%s",
        len(texts),
        length,
        f"; {left_out} rows were left out" if left_out else "",
    )
    return texts


def _template(card: ModelCard, tokenizer: Tokenizer) -> chat.Template | None:
    """The chat template, or None for a model that has none."""
    return chat.template_for(card, tokenizer) if card.is_chat else None


def _quantised(
    model: LayerWise, how: Recipe, texts: list[list[int]] | None, progress: Progress | None
) -> tuple[dict[str, layouts.Tensors], dict[str, np.ndarray]]:
    """(tensors of each quantised matrix by suffix, others that had to change), by the names of Hugging Face."""
    spec, family = model.spec, families.get(model.card.family)
    batches = []
    if texts is not None:
        batches = model.embed(texts[at : at + TOGETHER] for at in range(0, len(texts), TOGETHER))
    linears: dict[str, layouts.Tensors] = {}
    changed: dict[str, np.ndarray] = {}
    for number, layer in enumerate(spec.layers):
        parts = model.fetch(f"layers.{number}")
        before = {name: tensor for name, tensor in parts.items() if tensor.ndim == 1}
        rounded = _layer(model, how, number, layer, parts, batches)
        for name, matrix in rounded.items():
            parts[name] = matrix.values()
        homes: dict[str, list[tuple[families.Source, Rounded]]] = {}
        for name, matrix in rounded.items():
            place = family.source(spec, f"layers.{number}.{name}", "safetensors")
            homes.setdefault(place.name, []).append((place, matrix))
        for name, held in homes.items():
            whole = _stacked(held)
            linears[name] = how.layout.tensors(whole, how.grid(whole.quants.shape[1]))
        for name, tensor in before.items():
            if parts[name] is not tensor:
                place = family.source(spec, f"layers.{number}.{name}", "safetensors")
                changed[place.name] = parts[name].numpy(force=True) - np.float32(place.add)
        if batches:
            model.run(number, parts, batches)
        if progress is not None:
            progress(number + 1, len(spec.layers))
    return linears, changed


@torch.inference_mode()
def _layer(
    model: LayerWise, how: Recipe, number: int, layer: Layer, parts: dict[str, torch.Tensor], batches: list
) -> dict[str, Rounded]:
    """A layer's linears rounded. awq also changes the norms, and the biases, that its scales are folded into."""
    names = [name for name in parts if parts[name].ndim == 2 and not name.endswith(("router", "shared_gate"))]
    if how.method == "rtn":
        return {name: rounding.rtn(parts[name], how.grid(parts[name].shape[1])) for name in names}
    grams = _grams(model, number, parts, batches)
    if how.method == "awq":
        _fold(layer, parts, grams, how)
    rounded = {}
    for fed, members in FED.items():
        for name in [member for member in members if member in parts]:
            grid = how.grid(parts[name].shape[1])
            if how.method == "gptq":
                rounded[name] = rounding.gptq(parts[name], grams[fed], grid, act_order=how.act_order)
            else:  # scores are sensitive to the largest weights of q and k, so those are not clipped
                part = 1.0 if name in ("q", "k") else rounding.best_clip(parts[name], grams[fed], grid)
                rounded[name] = rounding.rtn(parts[name], grid, part)
    return rounded


def _grams(model: LayerWise, number: int, parts: dict[str, torch.Tensor], batches: list) -> dict[str, torch.Tensor]:
    """X^T X / rows of the input of each linear, every token brought to a mean square of 1.

    Behind `down` a text's first token may be hundreds of times as large as the others (massive activations, Sun et al.,
    arXiv 2402.17762). Such a token is as large in the residual stream, and the norm behind divides by that: what counts
    of an error is its size beside the token's own. By their squares a few tokens would outweigh all others.
    """
    grams: dict[str, torch.Tensor] = {}
    rows = sum(len(batch.hidden) for batch in batches)

    def watch(name: str, x: torch.Tensor) -> None:
        gram = grams.setdefault(name, torch.zeros(x.shape[1], x.shape[1], device=x.device))
        x = x * x.square().mean(-1, keepdim=True).clamp(min=TINY).rsqrt()
        gram.addmm_(x.T, x, alpha=1 / rows)

    model.run(number, parts, batches, watch, keep=False)
    return grams


def _fold(layer: Layer, parts: dict[str, torch.Tensor], grams: dict[str, torch.Tensor], how: Recipe) -> None:
    """awq: inputs are divided by scales where they are made, and the columns that meet them multiplied.

    What makes inputs: a norm, or linearly the rows of v (if no heads share them) and of up. A row that is divided
    changes nothing for its own rounding, whose scales follow.
    """
    steps = [("attn_norm", "qkv"), ("mlp_norm", "up")]
    if layer.mixer.heads == layer.mixer.kv_heads:
        steps.append(("v", "o"))
    if layer.mlp.gated:
        steps.append(("up", "down"))
    for maker, fed in steps:
        members = [name for name in FED[fed] if name in parts]
        gram = grams[fed]
        scale = rounding.awq_scale([parts[name] for name in members], gram, how.grid(len(gram)))
        for name in members:
            parts[name] = parts[name] * scale
        grams[fed] = gram / scale / scale[:, None]
        parts[maker] = parts[maker] / (scale if parts[maker].ndim == 1 else scale[:, None])
        if maker + ".bias" in parts:
            parts[maker + ".bias"] = parts[maker + ".bias"] / scale


def _stacked(held: list[tuple[families.Source, Rounded]]) -> Rounded:
    """The parts of a fused matrix in its own order of rows."""
    (place, first), *others = held
    if place.rows is None and not others:
        return first
    tall = place.tall or len(first.quants)

    def whole(field: str) -> torch.Tensor:
        out = getattr(first, field).new_empty(tall, getattr(first, field).shape[1])
        for at, part in held:
            rows = at.rows if isinstance(at.rows, slice) else torch.from_numpy(at.rows)
            out[rows] = getattr(part, field)
        return out

    return replace(first, quants=whole("quants"), scales=whole("scales"), zeros=whole("zeros"))


def _file(
    source: Source, dtype: str, linears: dict[str, layouts.Tensors], changed: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in tensors(source, dtype):
        if name in linears:
            module = name.removesuffix(".weight")
            yield from ((f"{module}.{suffix}", tensor) for suffix, tensor in linears[name].items())
        else:
            yield name, changed[name].astype(values.dtype) if name in changed else values


def _sixteen_bits(card: ModelCard) -> str:
    """What is not quantised is as the source has it, and at most 16 bits wide."""
    stored = str(card.config.get("dtype") or card.config.get("torch_dtype") or "").removeprefix("torch.")
    return "bfloat16" if stored == "bfloat16" and card.format != "gguf" else "float16"


def _left_alone(spec: DecoderSpec, card: ModelCard) -> list[str]:
    """Linears that stay as they are: the head, and what chooses experts."""
    family = families.get(card.family)
    kept = [p.name for p in weights.parameters(spec) if p.kind == "router"]
    names = [family.source(spec, name, "safetensors").name for name in kept]
    return ["lm_head", *(name.removesuffix(".weight") for name in names)]
