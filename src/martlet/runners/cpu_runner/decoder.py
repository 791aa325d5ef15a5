"""A DecoderSpec as a program: weights packed, operations listed once, activations and KV memory as arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from martlet.errors import BackendUnavailable
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import (
    ACTIVATIONS,
    MAX_HEAD_DIM,
    PANEL,
    AnglesOp,
    AnyOp,
    AttentionOp,
    CombineOp,
    EmbedOp,
    Epilogue,
    ExpertsOp,
    HeadOp,
    LinearOp,
    Matrix,
    NormAddOp,
    PickOp,
    Program,
    RouteOp,
    address,
)
from martlet.model.rope import inverse_frequencies, magnitude
from martlet.model.spec import TARGETS, Attention, DecoderSpec, Experts, FeedForward, Layer, Rope
from martlet.runners.base import MemoryPlan
from martlet.runners.cpu_runner.adapters import AdapterTables
from martlet.runners.cpu_runner.packed_cache import PackedCache, huge_pages, pages
from martlet.runners.cpu_runner.packing import Packer, Precision, floats, in_order, order_of, source_format

if TYPE_CHECKING:
    from martlet.runners.cpu_runner import recurrence

KV_GROUP = 16  # tokens of a tile of the cache: block sizes are multiples of it
HUGE_FROM = 4 << 20  # bytes of a layer's keys or values


class Linear(NamedTuple):
    """A packed matrix and what it does with its product. bias: float32 in panel order.

    parts: (name, rows) of the linears in it, where they may carry adapters. order: int32 [k], the input that each
    column takes, None where they follow each other.
    """

    matrix: Matrix
    bias: np.ndarray | None
    outputs: int
    epilogue: Epilogue = Epilogue.STORE
    column: int = 0  # of the output buffer where its columns begin
    parts: tuple[tuple[str, int], ...] = ()
    order: np.ndarray | None = None


class Dense(NamedTuple):
    """A feed-forward: one linear up, or gate and up where their formats differ."""

    up: list[Linear]
    down: Linear

    @property
    def linears(self) -> list[Linear]:
        return [*self.up, self.down]


class Mixture(NamedTuple):
    """A mixture of experts. up, down: one linear an expert; their matrices stand in arrays that C reads."""

    router: Linear
    up: list[Linear]
    down: list[Linear]
    shared: Dense | None
    shared_gate: Linear | None

    @property
    def linears(self) -> list[Linear]:
        return [*self.up, *self.down, *(self.shared.linears if self.shared else [])]


class Block(NamedTuple):
    """The linears of one layer in the order they run, and its norms (float32)."""

    attn_norm: np.ndarray
    qkv: list[Linear]
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    o: Linear
    attn_post_norm: np.ndarray | None
    mlp_norm: np.ndarray
    mlp: Dense | Mixture
    mlp_post_norm: np.ndarray | None

    @property
    def linears(self) -> list[Linear]:
        return [*self.qkv, self.o, *self.mlp.linears]


class Cache(NamedTuple):
    """Keys and values of one layer, uint8 [blocks, bytes a block] each; their inner layout is the kernels' own."""

    keys: np.ndarray
    values: np.ndarray


def check(spec: DecoderSpec, block_size: int) -> None:
    """Raise BackendUnavailable for a decoder that the kernels cannot run."""
    if spec.recurrent:
        from martlet.runners.cpu_runner import recurrence

        recurrence.check(spec)
        return
    if block_size % KV_GROUP:
        raise BackendUnavailable(f"the native CPU kernels want KV blocks of a multiple of {KV_GROUP}, not {block_size}")
    if any(layer.mlp.experts and (layer.mlp.bias or not layer.mlp.gated) for layer in spec.layers):
        raise BackendUnavailable("the native CPU kernels run experts that are gated and have no biases")
    if any(layer.mlp.experts and layer.mlp.experts.shared and layer.post_norms for layer in spec.layers):
        raise BackendUnavailable("the native CPU kernels have no shared experts with a norm behind")
    for attention in {layer.mixer for layer in spec.layers}:
        if attention.head_dim % 16 or attention.head_dim > MAX_HEAD_DIM:
            raise BackendUnavailable(
                f"the native CPU kernels take head sizes that are multiples of 16 up to {MAX_HEAD_DIM}, "
                f"not {attention.head_dim}"
            )
        if attention.heads % attention.kv_heads or attention.rope.dim % 2:
            raise BackendUnavailable(f"the native CPU kernels cannot run {attention}")


class Decoder:
    """A decoder ready to run. weight_bytes: what its packed weights take. widened: formats that have no kernel here,
    and what their matrices run as. cache: where they may lie packed already."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Iterable[tuple[str, Tensor]],
        executor: Executor,
        precision: Precision,
        cache: PackedCache | None = None,
    ):
        if spec.recurrent:
            from martlet.runners.cpu_runner import recurrence

        self.spec, self.precision = spec, precision
        self.blocks: list[Block] | list[recurrence.RecurrentBlock] = []
        self._packer = packer = Packer(executor, cache)
        for place, group in groupby(weights, key=lambda item: _place(item[0])):
            tensors = {name.removeprefix(place + "."): tensor for name, tensor in group}
            match place:
                case "embed":
                    # An embedding that is not also the head is only looked up, so it keeps the precision it has.
                    self.embed = self._table(tensors["embed"], precision if spec.tied else Precision("stored"))
                case "embed_norm":
                    self.embed_norm = recurrence.read_norm(tensors["embed_norm"], tensors["bias"])
                case "norm" if spec.recurrent:
                    self.last_norm = recurrence.read_norm(tensors["norm"], tensors["bias"])
                case "norm":
                    self.norm = floats(tensors["norm"])
                case "head":
                    self.head = self._table(tensors["head"], precision)
                case _:
                    layer = spec.layers[len(self.blocks)]
                    self.blocks.append(
                        recurrence.read_block(layer, tensors, packer, precision)
                        if spec.recurrent
                        else self._block(layer, tensors)
                    )
        if spec.tied:
            self.head = self.embed
        self.screen = packer.screen(self.head)
        self.weight_bytes, self.widened = packer.bytes, packer.widened
        if cache is not None:
            cache.keep()

    def _table(self, tensor: Tensor, precision: Precision) -> Matrix:
        tensor = in_order(tensor)
        return self._packer.stack([tensor], precision.target(tensor, table=True))

    def _linears(self, parts: list[str], tensors: Mapping[str, Tensor], epilogue: Epilogue) -> list[Linear]:
        """Matrices that share an input, stacked where their formats agree."""
        linears: list[Linear] = []
        column = 0
        for _, names in groupby(parts, key=lambda part: _kind(tensors[part])):
            stacked = list(names)
            first = tensors[stacked[0]]
            matrix = self._packer.stack([tensors[name] for name in stacked], self.precision.target(first))
            bias = _bias([tensors.get(name + ".bias") for name in stacked])
            at = (column, self._parts(stacked, tensors), order_of(first))
            linears.append(Linear(matrix, bias, matrix.n, epilogue, *at))
            column += matrix.n
        return linears

    def _parts(self, names: list[str], tensors: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
        at = f"layers.{len(self.blocks)}."
        return tuple((at + name, tensors[name].shape[0]) for name in names if name in TARGETS)

    def _block(self, layer: Layer, tensors: dict[str, Tensor]) -> Block:
        added = Epilogue.STORE if layer.post_norms else Epilogue.ADD
        post = layer.post_norms
        return Block(
            attn_norm=floats(tensors["attn_norm"]),
            qkv=self._linears(["q", "k", "v"], tensors, Epilogue.STORE),
            q_norm=floats(tensors["q_norm"]) if layer.mixer.qk_norm else None,
            k_norm=floats(tensors["k_norm"]) if layer.mixer.qk_norm else None,
            o=self._linears(["o"], tensors, added)[0],
            attn_post_norm=floats(tensors["attn_post_norm"]) if post else None,
            mlp_norm=floats(tensors["mlp_norm"]),
            mlp=self._mixture(layer.mlp, tensors) if layer.mlp.experts else self._dense(layer.mlp, tensors, added),
            mlp_post_norm=floats(tensors["mlp_post_norm"]) if post else None,
        )

    def _dense(self, mlp: FeedForward, tensors: Mapping[str, Tensor], added: Epilogue, at: str = "") -> Dense:
        return Dense(self._up(mlp, tensors, at), self._linears([at + "down"], tensors, added)[0])

    def _mixture(self, mlp: FeedForward, tensors: Mapping[str, Tensor]) -> Mixture:
        experts = mlp.experts
        assert experts is not None
        # One operation serves all experts, so it cannot take the inputs of each in another order.
        tensors = {
            name: in_order(tensor) if name.startswith("experts.") else tensor for name, tensor in tensors.items()
        }
        each = [self._dense(mlp, tensors, Epilogue.STORE, f"experts.{n}.") for n in range(experts.count)]
        if any(len(one.up) > 1 for one in each):
            raise BackendUnavailable("the native CPU kernels want gate and up of an expert in one format")
        return Mixture(
            router=self._router(tensors["router"]),
            up=[one.up[0] for one in each],
            down=[one.down for one in each],
            shared=self._dense(mlp, tensors, Epilogue.STORE, "shared.") if experts.shared else None,
            shared_gate=self._router(tensors["shared_gate"]) if experts.shared_gated else None,
        )

    def _router(self, tensor: Tensor) -> Linear:
        """A small matrix that decides where tokens go: as precise as the file has it."""
        matrix = self._table(tensor, Precision("stored"))
        return Linear(matrix, None, matrix.n)

    def _up(self, mlp: FeedForward, tensors: Mapping[str, Tensor], at: str = "") -> list[Linear]:
        if not mlp.gated:
            return self._linears([at + "up"], tensors, Epilogue.ACTIVATE)
        gate, up = tensors[at + "gate"], tensors[at + "up"]
        if _kind(gate) != _kind(up):
            (first,) = self._linears([at + "gate"], tensors, Epilogue.ACTIVATE)
            (second,) = self._linears([at + "up"], tensors, Epilogue.MULTIPLY)
            return [first, second]
        matrix = self._packer.interleave(gate, up, self.precision.target(gate))
        bias = None
        if mlp.bias:
            sides = np.zeros((2, matrix.n // 2), np.float32)
            sides[0, : mlp.hidden], sides[1, : mlp.hidden] = floats(tensors["gate.bias"]), floats(tensors["up.bias"])
            bias = np.ascontiguousarray(sides.reshape(2, -1, PANEL // 2).swapaxes(0, 1)).reshape(-1)
        parts = self._parts([at + "gate", at + "up"], tensors)
        return [Linear(matrix, bias, gate.shape[0], Epilogue.GATED, parts=parts, order=order_of(gate))]

    def caches(self, num_blocks: int, block_size: int) -> list[Cache]:
        """Zeroed KV memory, in whole cache lines; the system gives pages only as they are written."""
        kind, mixers = self.precision.kv, (layer.mixer for layer in self.spec.layers)
        sizes = [mixer.kv_heads * block_size * kind.bytes_per_token(mixer.head_dim) for mixer in mixers]
        return [Cache(*(_aligned_zeros(num_blocks, size) for _ in range(2))) for size in sizes]

    def states(self, plan: MemoryPlan) -> recurrence.States:
        """What a recurrent decoder has in place of caches."""
        from martlet.runners.cpu_runner import recurrence

        return recurrence.States(self.spec, plan)

    def adapter_tables(self, slots: int) -> AdapterTables:
        linears = (one for block in self.blocks if isinstance(block, Block) for one in block.linears)
        return AdapterTables(linears, slots, self._packer.executor)

    def program(
        self, tokens: int, memory: list[Cache] | recurrence.States, longest: int, adapters: AdapterTables
    ) -> Program:
        """The whole step, for at most `tokens` tokens of sequences of up to `longest`."""
        if self.spec.recurrent:
            from martlet.runners.cpu_runner import recurrence

            builder = recurrence.RecurrentProgram(self.spec, tokens, memory)
            return builder.build(self.embed, self.embed_norm, self.blocks, self.last_norm, self.head, self.screen)
        return _Builder(self, tokens, memory, longest, adapters).build()


class _Builder:
    """Lists the operations and owns the activations between them, float32 [tokens, size]."""

    def __init__(self, decoder: Decoder, tokens: int, caches: list[Cache], longest: int, adapters: AdapterTables):
        self.decoder, self.tokens, self.caches, self.longest = decoder, tokens, caches, longest
        self.adapters = adapters
        layers = decoder.spec.layers
        self.keep: list[Any] = [decoder, adapters]
        self.x = self._buffer(decoder.spec.width)
        self.qkv = self._buffer(max(layer.mixer.q_size + 2 * layer.mixer.kv_size for layer in layers))
        self.mixed = self._buffer(max(layer.mixer.q_size for layer in layers))
        mixtures = [layer.mlp.experts for layer in layers if layer.mlp.experts]
        self.hidden = self._buffer(
            max(layer.mlp.experts.shared if layer.mlp.experts else layer.mlp.hidden for layer in layers)
        )
        # What is normed before it is added, or weighted.
        needed = bool(mixtures) or any(layer.post_norms for layer in layers)
        self.y = self._buffer(decoder.spec.width if needed else 0)
        if mixtures:
            pairs = max(experts.active for experts in mixtures)
            self.ratings, self.gate = self._buffer(max(experts.count for experts in mixtures)), self._buffer(1)
            self.expert_hidden = self._buffer(max(x.mlp.hidden for x in layers if x.mlp.experts), pairs)
            self.expert_y = self._buffer(decoder.spec.width, pairs)

    def _buffer(self, size: int, times: int = 1) -> np.ndarray:
        self.keep.append(np.zeros((self.tokens * times, size), np.float32))
        return self.keep[-1]

    def build(self) -> Program:
        decoder, spec = self.decoder, self.decoder.spec
        ops: list[AnyOp] = [EmbedOp(decoder.embed, address(self.x), self.x.shape[1], spec.embedding_scale)]
        angles: dict[Rope, AnglesOp] = {}
        for rope in dict.fromkeys(layer.mixer.rope for layer in spec.layers):
            angles[rope] = self._angles(rope)
            ops.append(angles[rope])
        for layer, block, cache in zip(spec.layers, decoder.blocks, self.caches, strict=True):
            ops += [self._linear(one, self.x, self.qkv, norm=block.attn_norm) for one in block.qkv]
            ops.append(self._attention(layer.mixer, block, cache, angles[layer.mixer.rope]))
            if block is decoder.blocks[-1]:  # its keys and values are kept; the rest is for those who are asked alone
                strides = self.x.shape[1], self.mixed.shape[1]
                ops.append(PickOp(address(self.x), address(self.mixed), *strides, spec.width, layer.mixer.q_size))
            to = self.y if layer.post_norms else self.x
            ops.append(self._linear(block.o, self.mixed, to))
            if block.attn_post_norm is not None:
                ops.append(self._norm_add(block.attn_post_norm))
            if isinstance(block.mlp, Mixture):
                assert layer.mlp.experts is not None
                ops += self._mixture(layer.mlp, layer.mlp.experts, block.mlp, block.mlp_norm, to)
            else:
                ops += self._dense(layer.mlp, block.mlp, block.mlp_norm, to)
            if block.mlp_post_norm is not None:
                ops.append(self._norm_add(block.mlp_post_norm))
        cap = spec.logit_softcap or 0.0
        head = HeadOp(decoder.head, address(self.x), address(decoder.norm), self.x.shape[1], spec.eps, cap)
        ops.append(decoder.screen.put(head))
        program = Program(ops)
        program.keep = self.keep
        return program

    def _dense(self, mlp: FeedForward, weights: Dense, norm: np.ndarray, to: np.ndarray) -> list[AnyOp]:
        up = [self._linear(one, self.x, self.hidden, norm=norm, activation=mlp.activation) for one in weights.up]
        return [*up, self._linear(weights.down, self.hidden, to)]

    def _mixture(
        self, mlp: FeedForward, experts: Experts, weights: Mixture, norm: np.ndarray, to: np.ndarray
    ) -> list[AnyOp]:
        ops: list[AnyOp] = [self._linear(weights.router, self.x, self.ratings, norm=norm)]
        stride = self.ratings.shape[1]
        ops.append(RouteOp(address(self.ratings), stride, experts.count, experts.active, experts.renormalise))
        up = self._linear(weights.up[0], self.x, self.expert_hidden, norm=norm, activation=mlp.activation)
        ops.append(ExpertsOp(up, self._matrices(weights.up), True))
        down = self._linear(weights.down[0], self.expert_hidden, self.expert_y)
        ops.append(ExpertsOp(down, self._matrices(weights.down), False))
        shared = gate = None
        if weights.shared is not None:
            shared = address(self.y)
            ops += self._dense(mlp, weights.shared, norm, self.y)
        if weights.shared_gate is not None:
            ops.append(self._linear(weights.shared_gate, self.x, self.gate, norm=norm))
            gate = address(self.gate)
        width, strides = self.decoder.spec.width, (self.expert_y.shape[1], self.y.shape[1], 1, to.shape[1])
        ops.append(CombineOp(address(self.expert_y), shared, gate, address(to), *strides, width, to is self.x))
        return ops

    def _matrices(self, linears: list[Linear]) -> int:
        """The address of their matrices in a row."""
        array = (Matrix * len(linears))(*(linear.matrix for linear in linears))
        self.keep.append(array)
        return ctypes.addressof(array)

    def _norm_add(self, norm: np.ndarray) -> NormAddOp:
        strides = self.y.shape[1], self.x.shape[1]
        width, eps = self.decoder.spec.width, self.decoder.spec.eps
        return NormAddOp(address(self.y), address(norm), address(self.x), *strides, width, eps)

    def _angles(self, rope: Rope) -> AnglesOp:
        frequencies = np.ascontiguousarray(inverse_frequencies(rope, self.longest))
        self.keep.append(frequencies)
        cosines, sines = self._buffer(rope.dim // 2), self._buffer(rope.dim // 2)
        return AnglesOp(address(frequencies), address(cosines), address(sines), rope.dim // 2, magnitude(rope))

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
            self.adapters.address(linear),
            address(linear.order),
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
            cache=self.decoder.precision.kv,
            scale=attention.scale,
            eps=self.decoder.spec.eps,
            softcap=attention.softcap or 0.0,
        )


def _aligned_zeros(rows: int, size: int) -> np.ndarray:
    """uint8 [rows, size] at an address that is a multiple of 64: a page's. numpy would clear small ones at once, and a
    huge page in each would be cleared at the first token. Steps of many rows read large ones 2 % faster in huge pages.
    """
    memory = huge_pages if rows * size >= HUGE_FROM else pages
    return np.frombuffer(memory(max(1, rows * size)), np.uint8, rows * size).reshape(rows, size)


def _bias(parts: list[Tensor | None]) -> np.ndarray | None:
    """Biases one after another, padded to whole panels; None when there are none."""
    if parts[0] is None:
        return None
    joined = np.concatenate([floats(part) for part in parts if part is not None])
    return np.pad(joined, (0, -len(joined) % PANEL))


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What matrices must share to be one. Widened formats may differ in what they run as."""
    order = order_of(tensor)
    packed = tensor.format if isinstance(tensor, PackedTensor) else None
    return source_format(tensor), packed, None if order is None else order.tobytes()


def _place(name: str) -> str:
    """ "layers.7" of what lies in a layer, else the name itself (of what it is the bias, for one)."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.removesuffix(".bias")
