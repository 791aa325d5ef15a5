"""Weights on the GPU: fused with their neighbours, streamed there through pinned memory as they are read.

A checkpoint is a memory mapping, so a tensor is read from disk when it is copied into one of two pinned buffers; the
GPU empties one while the other fills. A dummy checkpoint's weights repeat, so only a period of each is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from martlet.errors import UsageError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import PackedTensor, open_checkpoint
from martlet.hub.dummy import _POOL as PERIOD
from martlet.hub.dummy import DummyCheckpoint
from martlet.hub.quantised.blocks import HEAD, INTEGERS, split_int4
from martlet.kernels.cuda.int4 import Groups
from martlet.kernels.cuda.linear import Linear
from martlet.model import weights
from martlet.model.spec import DecoderSpec, Layer

FP8_MAX = 448.0  # of e4m3
STAGE_BYTES = 32 << 20  # a pinned buffer; tensors go through in pieces of this size


@dataclass(frozen=True, slots=True)
class Block:
    """A layer. qkv: rows of q, k, v; up: rows of gate (if gated), up. qk_norms: float32 [H + K, D] or None."""

    attn_norm: torch.Tensor
    qkv: Linear
    qk_norms: torch.Tensor | None
    o: Linear
    attn_post_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    up: Linear
    down: Linear
    mlp_post_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    embed: torch.Tensor
    blocks: list[Block]
    norm: torch.Tensor
    head: Linear
    nbytes: int


def load(
    card: ModelCard,
    spec: DecoderSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    int4: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """All parameters of `card` on `device`: `allocate` and `fill` in one."""
    places, keep = allocate(spec, device, dtype, fp8=fp8, int4=int4)
    fill(card, spec, places, keep, seed=seed, progress=progress)
    return keep


def fill(
    card: ModelCard,
    spec: DecoderSpec,
    places: dict[str, Place],
    keep: Weights,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read all parameters of `card` into what `allocate` made. progress(done, total) counts parameters.

    Raises CheckpointError.
    """
    device, dtype = keep.embed.device, keep.embed.dtype
    if card.format == "dummy":
        dummy, part = DummyCheckpoint(seed), spec.part
        shapes = {p.name: p.shape for p in weights.parameters(spec if part is None else part.whole)}
        for name, place in places.items():
            period = dummy.random(name, (min(math.prod(shapes[name]), PERIOD),))
            with place.filled(dtype) as values:
                if part is None or values.shape == shapes[name]:
                    _repeat(part.cut(name, period) if part is not None and name.endswith(".bias") else period, values)
                else:
                    _repeat_part(period, values, shapes[name], part.rows(name), part.columns(name))
    else:
        checkpoint = open_checkpoint(card)
        stage = Stage(device)
        try:
            for done, (name, tensor) in enumerate(weights.load(card, spec, checkpoint), 1):
                if not (isinstance(tensor, PackedTensor) and places[name].take(tensor)):
                    array = tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor
                    with places[name].filled(dtype) as values:
                        stage.copy(np.ascontiguousarray(array), values)
                if progress is not None:
                    progress(done, len(places))
        finally:
            stage.close()
            checkpoint.close()
    for block, layer in zip(keep.blocks, spec.layers, strict=True):
        if block.qk_norms is not None:  # one weight a head is what the kernel reads; q and k came to the first of each
            heads = layer.mixer.heads
            block.qk_norms[:heads] = block.qk_norms[0].clone()
            block.qk_norms[heads:] = block.qk_norms[heads].clone()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter goes: a view of a fused tensor. scales: float32, one a row, where it is kept in FP8. int4: of
    its groups, where it is kept in four bits. What lies in the file as it is kept goes through `take`, anything else
    through `filled`.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    int4: Groups | None = None

    def take(self, tensor: PackedTensor) -> bool:
        """Copy what the file has, scales and all; False where it is kept otherwise."""
        if self.int4 is not None:
            pairs, scales, zeros = split_int4(tensor.data, self.int4.size)
            self.values.copy_(torch.from_numpy(pairs.view(np.int32)))
            self.int4.scales.copy_(torch.from_numpy(scales))
            self.int4.zeros.copy_(torch.from_numpy(np.ascontiguousarray(zeros)))
            return True
        if self.scales is None or tensor.format != "fp8_row":
            return False
        data = np.ascontiguousarray(tensor.data)
        self.scales.copy_(torch.from_numpy(np.ascontiguousarray(data[:, :HEAD]).view(np.float32)[:, 0]))
        self.values.copy_(torch.from_numpy(np.ascontiguousarray(data[:, HEAD:])).view(torch.float8_e4m3fn))
        return True

    @contextmanager
    def filled(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor of `dtype` to be filled inside: the place itself, or what goes there in FP8 afterwards."""
        if self.scales is None:
            yield self.values
            return
        whole = self.values.new_empty(self.values.shape, dtype=dtype)
        yield whole
        largest = whole.abs().amax(1).float().clamp_(min=1e-30)
        self.scales.copy_(largest / FP8_MAX)
        self.values.copy_(whole * (FP8_MAX / largest)[:, None])


def int4_sizes(card: ModelCard, spec: DecoderSpec) -> dict[str, int]:
    """Which linears a checkpoint holds in blocks of four bits, and the blocks' size. Reads scales, and no weights.

    Raises UsageError when there are none, or when ranks share the decoder.
    """
    if spec.part is not None:
        raise UsageError("quant int4 is for one GPU; leave --quant out, and ranks unpack their parts", param="quant")
    sizes: dict[str, int] = {}
    checkpoint = DummyCheckpoint() if card.format == "dummy" else open_checkpoint(card)
    try:
        for parameter in weights.parameters(spec):
            if parameter.kind != "linear" or parameter.name == "head" or card.format != "safetensors":
                continue
            tensor = weights.fetch(card, spec, checkpoint, parameter)
            if isinstance(tensor, PackedTensor) and tensor.format in INTEGERS and tensor.order is None:
                sizes[parameter.name] = int(tensor.format.removeprefix("int4_"))
    finally:
        checkpoint.close()
    if not sizes:
        raise UsageError(
            f"quant int4: the CUDA runner keeps the four bits of a checkpoint, and {card.name} has none that it can "
            "(of act-order it unpacks); `martlet export --quant_bits 4` makes one",
            param="quant",
        )
    return sizes


def allocate(
    spec: DecoderSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    int4: Mapping[str, int] | None = None,
    beside: int = 0,
) -> tuple[dict[str, Place], Weights]:
    """Empty tensors for every parameter: by name, as views of the fused tensors, and as the kernels take them.

    fp8: the layers' matrices are e4m3 with a scale a row; embedding, norms and head stay in `dtype`. int4: of
    `int4_sizes`; matrices whose parts all are of one size stay in four bits. beside: rows of zeros, for each part,
    behind the layers' matrices that stay in `dtype` (`Linear.wide`).
    """
    places: dict[str, Place] = {}
    total = 0

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        nonlocal total
        tensor = torch.empty(shape, dtype=dtype, device=device)
        total += tensor.nbytes
        return tensor

    def vector(name: str, size: int) -> torch.Tensor:
        places[name] = Place(new(size))
        return places[name].values

    def fused(prefix: str, parts: list[tuple[str, int]], columns: int, bias: bool) -> Linear:
        rows = sum(size for _, size in parts)
        sizes = {(int4 or {}).get(prefix + part) for part, _ in parts}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            scales, zeros = (new(rows, columns // size, dtype=kind) for kind in (torch.float16, torch.uint8))
            words = new(rows, columns // 8, dtype=torch.int32)
            linear = Linear(words, new(rows) if bias else None, int4=Groups(size, scales, zeros))
        elif fp8:
            scales = new(rows, dtype=torch.float32)
            linear = Linear(new(rows, columns, dtype=torch.float8_e4m3fn), new(rows) if bias else None, scales)
        elif beside:
            more = len(parts) * beside
            wide = Linear(new(rows + more, columns), new(rows + more) if bias else None)
            linear = Linear(wide.matrix[:rows], None if wide.bias is None else wide.bias[:rows], wide=wide)
            wide.matrix[rows:] = 0
            if wide.bias is not None:
                wide.bias[rows:] = 0
        else:
            linear = Linear(new(rows, columns), new(rows) if bias else None)
        for part, span in weights.fused_rows(parts).items():
            scales = None if linear.scales is None else linear.scales[span]
            groups = None if linear.int4 is None else linear.int4[span]
            places[prefix + part] = Place(linear.matrix[span], scales, groups)
            if linear.bias is not None:
                places[prefix + part + ".bias"] = Place(linear.bias[span])
        return linear

    def block(number: int, layer: Layer) -> Block:
        attention, mlp, at = layer.mixer, layer.mlp, f"layers.{number}."
        qk_norms = None
        if attention.qk_norm:
            qk_norms = new(attention.heads + attention.kv_heads, attention.head_dim, dtype=torch.float32)
            places[at + "q_norm"], places[at + "k_norm"] = Place(qk_norms[0]), Place(qk_norms[attention.heads])
        qkv = [("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)]
        up = [("gate", mlp.hidden), ("up", mlp.hidden)] if mlp.gated else [("up", mlp.hidden)]
        return Block(
            attn_norm=vector(at + "attn_norm", spec.width),
            qkv=fused(at, qkv, spec.width, attention.qkv_bias),
            qk_norms=qk_norms,
            o=fused(at, [("o", spec.width)], attention.q_size, attention.out_bias),
            attn_post_norm=vector(at + "attn_post_norm", spec.width) if layer.post_norms else None,
            mlp_norm=vector(at + "mlp_norm", spec.width),
            up=fused(at, up, spec.width, mlp.bias),
            down=fused(at, [("down", spec.width)], mlp.hidden, mlp.bias),
            mlp_post_norm=vector(at + "mlp_post_norm", spec.width) if layer.post_norms else None,
        )

    tokens = spec.vocabulary.stop - spec.vocabulary.start
    embed = new(tokens, spec.width)
    places["embed"] = Place(embed)
    blocks = [block(number, layer) for number, layer in enumerate(spec.layers)]
    norm = vector("norm", spec.width)
    if not spec.tied:
        places["head"] = Place(new(tokens, spec.width))
    return places, Weights(embed, blocks, norm, Linear(places.get("head", places["embed"]).values), total)


class Stage:
    """Two buffers between host arrays and the device."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.buffers = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.free = [torch.cuda.Event() for _ in self.buffers] if on_gpu else []
        self.turn = 0

    def copy(self, source: np.ndarray, target: torch.Tensor) -> None:
        """Start the copy of a contiguous array into `target`, converting to its dtype on the device."""
        element = _torch_dtype(source)
        flat, step = source.reshape(-1).view(np.uint8), STAGE_BYTES // source.itemsize * source.itemsize
        there, begin = target.view(-1), 0
        for piece in (flat[at : at + step] for at in range(0, len(flat), step)):
            if self.free:
                self.free[self.turn].synchronize()
            staged = self.buffers[self.turn][: len(piece)]
            np.copyto(staged.numpy(), piece)
            values = staged.view(element)
            there[begin : begin + len(values)].copy_(values.to(target.device, non_blocking=True))
            begin += len(values)
            if self.free:
                self.free[self.turn].record()
            self.turn ^= 1

    def close(self) -> None:
        for event in self.free:
            event.synchronize()


def _repeat(period: np.ndarray, target: torch.Tensor) -> None:
    """Fill `target` with `period` over and over."""
    once = torch.from_numpy(period.astype(np.float32)).to(target.device, target.dtype)
    flat = target.view(-1)
    whole = len(flat) // len(once)
    flat[: whole * len(once)].view(whole, -1).copy_(once.expand(whole, -1))
    flat[whole * len(once) :].copy_(once[: len(flat) - whole * len(once)])


def _repeat_part(
    period: np.ndarray, target: torch.Tensor, shape: tuple[int, ...], rows: slice | None, columns: slice | None
) -> None:
    """Fill `target` with those rows or columns of what `_repeat` makes of a tensor of `shape`."""
    once = torch.from_numpy(period.astype(np.float32)).to(target.device, target.dtype)
    rows, columns = rows or slice(0, shape[0]), columns or slice(0, math.prod(shape[1:]))
    there = target.view(len(target), -1)
    across = torch.arange(columns.start, columns.stop, device=target.device)
    for begin in range(0, len(there), 1024):
        end = min(begin + 1024, len(there))
        down = torch.arange(rows.start + begin, rows.start + end, device=target.device) * math.prod(shape[1:])
        there[begin:end] = once[(down[:, None] + across) % len(once)]


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "float64": torch.float64,
    }[array.dtype.name]
