"""A DecoderSpec as a program: weights packed, operations listed once, activations and KV memory as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from martlet.errors import BackendUnavailable
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import (
    ACTIVATIONS,
    PANEL,
    AnglesOp,
    AnyOp,
    AttentionOp,
    EmbedOp,
    Epilogue,
    HeadOp,
    LinearOp,
    Matrix,
    Program,
    address,
)
from martlet.model.rope import inverse_frequencies
from martlet.model.spec import Attention, DecoderSpec, FeedForward, Layer, Rope
from martlet.runners.cpu_runner.packing import Packer, Precision, contiguous, source_format

KV_GROUP = 16  # tokens of a tile of the cache: block sizes are multiples of it
MAX_HEAD_DIM = 512


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed matrix and what it does with its product. bias: float32 in panel order."""

    matrix: Matrix
    bias: np.ndarray | None
    outputs: int
    epilogue: Epilogue = Epilogue.STORE
    column: int = 0  # of the output buffer where its columns begin


@dataclass(frozen=True, slots=True)
class Block:
    """The linears of one layer in the order they run, and its norms (float32)."""

    attn_norm: np.ndarray
    qkv: list[Linear]
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    o: Linear
    mlp_norm: np.ndarray
    up: list[Linear]
    down: Linear


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer, uint8 [blocks, bytes a block] each; their inner layout is the kernels' own."""

    keys: np.ndarray
    values: np.ndarray


def check(spec: DecoderSpec, block_size: int) -> None:
    """Raise BackendUnavailable for a decoder that the kernels cannot run."""
    if block_size % KV_GROUP:
        raise BackendUnavailable(f"the native CPU kernels want KV blocks of a multiple of {KV_GROUP}, not {block_size}")
    if spec.features:
        raise BackendUnavailable(f"the native CPU kernels have no {' and no '.join(spec.features)}")
    for attention in {layer.mixer for layer in spec.layers}:
        if attention.head_dim % 16 or attention.head_dim > MAX_HEAD_DIM:
            raise BackendUnavailable(
                f"the native CPU kernels take head sizes that are multiples of 16 up to {MAX_HEAD_DIM}, "
                f"not {attention.head_dim}"
            )
        if attention.heads % attention.kv_heads or attention.rope.dim % 2:
            raise BackendUnavailable(f"the native CPU kernels cannot run {attention}")


class Decoder:
    """A decoder ready to run. weight_bytes: what its packed weights take."""

    def __init__(
        self, spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]], executor: Executor, precision: Precision
    ):
        self.spec, self.precision = spec, precision
        self.blocks: list[Block] = []
        self._packer = packer = Packer(executor)
        for place, group in groupby(weights, key=lambda item: _place(item[0])):
            tensors = {name.removeprefix(place + "."): contiguous(tensor) for name, tensor in group}
            match place:
                case "embed":
                    # An embedding that is not also the head is only looked up, so it keeps the precision it has.
                    self.embed = self._table(tensors["embed"], precision if spec.tied else Precision("stored"))
                case "norm":
                    self.norm = _floats(tensors["norm"])
                case "head":
                    self.head = self._table(tensors["head"], precision)
                case _:
                    self.blocks.append(self._block(spec.layers[len(self.blocks)], tensors))
        if spec.tied:
            self.head = self.embed
        self.weight_bytes = packer.arena.used

    def _table(self, tensor: Tensor, precision: Precision) -> Matrix:
        return self._packer.stack([tensor], precision.target(source_format(tensor), table=True))

    def _linears(self, parts: list[str], tensors: Mapping[str, Tensor], epilogue: Epilogue) -> list[Linear]:
        """Matrices that share an input, stacked where their formats agree."""
        linears: list[Linear] = []
        column = 0
        for source, names in groupby(parts, key=lambda part: source_format(tensors[part])):
            stacked = list(names)
            matrix = self._packer.stack([tensors[name] for name in stacked], self.precision.target(source))
            bias = _bias([tensors.get(name + ".bias") for name in stacked])
            linears.append(Linear(matrix, bias, matrix.n, epilogue, column))
            column += matrix.n
        return linears

    def _block(self, layer: Layer, tensors: dict[str, Tensor]) -> Block:
        return Block(
            attn_norm=_floats(tensors["attn_norm"]),
            qkv=self._linears(["q", "k", "v"], tensors, Epilogue.STORE),
            q_norm=_floats(tensors["q_norm"]) if layer.mixer.qk_norm else None,
            k_norm=_floats(tensors["k_norm"]) if layer.mixer.qk_norm else None,
            o=self._linears(["o"], tensors, Epilogue.ADD)[0],
            mlp_norm=_floats(tensors["mlp_norm"]),
            up=self._up(layer.mlp, tensors),
            down=self._linears(["down"], tensors, Epilogue.ADD)[0],
        )

    def _up(self, mlp: FeedForward, tensors: dict[str, Tensor]) -> list[Linear]:
        if not mlp.gated:
            return self._linears(["up"], tensors, Epilogue.ACTIVATE)
        gate, up = tensors["gate"], tensors["up"]
        if source_format(gate) != source_format(up):
            (first,) = self._linears(["gate"], tensors, Epilogue.ACTIVATE)
            (second,) = self._linears(["up"], tensors, Epilogue.MULTIPLY)
            return [first, second]
        matrix = self._packer.interleave(gate, up, self.precision.target(source_format(gate)))
        bias = None
        if mlp.bias:
            sides = np.zeros((2, matrix.n // 2), np.float32)
            sides[0, : mlp.hidden], sides[1, : mlp.hidden] = _floats(tensors["gate.bias"]), _floats(tensors["up.bias"])
            bias = np.ascontiguousarray(sides.reshape(2, -1, PANEL // 2).swapaxes(0, 1)).reshape(-1)
        return [Linear(matrix, bias, mlp.hidden, Epilogue.GATED)]

    def caches(self, num_blocks: int, block_size: int) -> list[Cache]:
        """Zeroed KV memory, in whole cache lines; the system gives pages only as they are written."""
        element = 2 if self.precision.kv_bf16 else 4
        sizes = [layer.mixer.kv_size * block_size * element for layer in self.spec.layers]
        return [Cache(*(_aligned_zeros(num_blocks, size) for _ in range(2))) for size in sizes]

    def program(self, tokens: int, caches: list[Cache]) -> Program:
        """The whole step, for at most `tokens` tokens."""
        return _Builder(self, tokens, caches).build()


class _Builder:
    """Lists the operations and owns the activations between them, float32 [tokens, size]."""

    def __init__(self, decoder: Decoder, tokens: int, caches: list[Cache]):
        self.decoder, self.tokens, self.caches = decoder, tokens, caches
        layers = decoder.spec.layers
        self.x = self._buffer(decoder.spec.width)
        self.qkv = self._buffer(max(layer.mixer.q_size + 2 * layer.mixer.kv_size for layer in layers))
        self.mixed = self._buffer(max(layer.mixer.q_size for layer in layers))
        self.hidden = self._buffer(max(layer.mlp.hidden for layer in layers))
        self.keep: list[np.ndarray | Decoder] = [decoder, self.x, self.qkv, self.mixed, self.hidden]

    def _buffer(self, size: int) -> np.ndarray:
        return np.zeros((self.tokens, size), np.float32)

    def build(self) -> Program:
        decoder, spec = self.decoder, self.decoder.spec
        ops: list[AnyOp] = [EmbedOp(decoder.embed, address(self.x), self.x.shape[1])]
        angles: dict[Rope, AnglesOp] = {}
        for rope in dict.fromkeys(layer.mixer.rope for layer in spec.layers):
            angles[rope] = self._angles(rope)
            ops.append(angles[rope])
        for layer, block, cache in zip(spec.layers, decoder.blocks, self.caches, strict=True):
            ops += [self._linear(one, self.x, self.qkv, norm=block.attn_norm) for one in block.qkv]
            ops.append(self._attention(layer.mixer, block, cache, angles[layer.mixer.rope]))
            ops.append(self._linear(block.o, self.mixed, self.x))
            ops += [
                self._linear(one, self.x, self.hidden, norm=block.mlp_norm, activation=layer.mlp.activation)
                for one in block.up
            ]
            ops.append(self._linear(block.down, self.hidden, self.x))
        ops.append(HeadOp(decoder.head, address(self.x), address(decoder.norm), self.x.shape[1], spec.eps))
        program = Program(ops)
        program.keep = self.keep
        return program

    def _angles(self, rope: Rope) -> AnglesOp:
        frequencies = np.ascontiguousarray(inverse_frequencies(rope))
        cosines, sines = self._buffer(rope.dim // 2), self._buffer(rope.dim // 2)
        self.keep += [frequencies, cosines, sines]
        return AnglesOp(address(frequencies), address(cosines), address(sines), rope.dim // 2)

    def _linear(
        self, linear: Linear, x: np.ndarray, y: np.ndarray, *, norm: np.ndarray | None = None, activation: str = "silu"
    ) -> LinearOp:
        return LinearOp(
            linear.matrix,
            address(x),
            address(norm),
            address(linear.bias),
            address(y) + 4 * linear.column,
            x.shape[1],
            y.shape[1],
            self.decoder.spec.eps,
            linear.epilogue,
            ACTIVATIONS[activation],
            linear.outputs,
        )

    def _attention(self, attention: Attention, block: Block, cache: Cache, angles: AnglesOp) -> AttentionOp:
        return AttentionOp(
            qkv=address(self.qkv),
            y=address(self.mixed),
            k_cache=address(cache.keys),
            v_cache=address(cache.values),
            cosines=angles.cosines,
            sines=angles.sines,
            q_norm=address(block.q_norm),
            k_norm=address(block.k_norm),
            qkv_stride=self.qkv.shape[1],
            y_stride=self.mixed.shape[1],
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            dim=attention.head_dim,
            rotary=attention.rope.dim,
            interleaved=attention.rope.style == "interleaved",
            window=attention.window or 0,
            bf16=self.decoder.precision.kv_bf16,
            scale=attention.scale,
            eps=self.decoder.spec.eps,
        )


def _aligned_zeros(rows: int, size: int) -> np.ndarray:
    """uint8 [rows, size] at an address that is a multiple of 64."""
    plain = np.zeros(rows * size + 64, np.uint8)
    return plain[-plain.ctypes.data % 64 :][: rows * size].reshape(rows, size)


def _bias(parts: list[Tensor | None]) -> np.ndarray | None:
    """Biases one after another, padded to whole panels; None when there are none."""
    if parts[0] is None:
        return None
    joined = np.concatenate([_floats(part) for part in parts if part is not None])
    return np.pad(joined, (0, -len(joined) % PANEL))


def _floats(tensor: Tensor) -> np.ndarray:
    array = tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor
    return np.ascontiguousarray(array, np.float32)


def _place(name: str) -> str:
    """ "layers.7" of what lies in a layer, else the name itself."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
