"""RWKV as a program: a time mix and a channel mix a layer, and the memory of states, float32.

The large matrices run as any other's. What depends on the token in small ways (shares of the token before, decays,
rates) comes from low-rank maps, which stay as precise as the file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from martlet.errors import BackendUnavailable
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.cpu import program as c
from martlet.kernels.cpu.program import ACTIVATIONS, AnyOp, Epilogue, Format, Matrix, Program, Rows, address
from martlet.model.spec import ChannelMix, DecoderSpec, Layer, Recurrence
from martlet.runners.base import Batch, MemoryPlan
from martlet.runners.cpu_runner.packing import Packer, Precision, Screen, floats, order_of
from martlet.runners.states import StateSlots

SHIFTED = {5: "rkvg", 6: "wkvrg", 7: "rwkvag"}  # what takes a share of the token before, in the order of mix_up


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix, and what becomes of its product. bias: float32 in whole panels. order: as of decoder.Linear."""

    matrix: Matrix
    epilogue: Epilogue = Epilogue.STORE
    activation: str = "silu"
    bias: np.ndarray | None = None
    order: np.ndarray | None = None

    def op(self, x: Rows, y: Rows) -> c.LinearOp:
        return c.LinearOp(
            self.matrix, x.x, None, address(self.bias), y.x, x.stride, y.stride, 0.0, self.epilogue,
            ACTIVATIONS[self.activation], self.matrix.n, None, address(self.order),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TimeMix:
    """vectors: float32, by their names in martlet.model.weights, one number a channel. shares: [parts, W] of `shifted`.

    products: r, k, v, o, and g where there is one. maps: both halves of decay, and in generation 7 of rate, value and
    gate. mixing: what moves the shares in generation 6, the map down and one up for each part.
    """

    mixer: Recurrence
    vectors: dict[str, np.ndarray]
    shifted: str
    shares: np.ndarray
    products: dict[str, Product]
    maps: dict[str, tuple[Product, Product]]
    mixing: tuple[Product, ...]


@dataclass(frozen=True, slots=True)
class Channel:
    shifted: str
    shares: np.ndarray
    products: dict[str, Product]


Norm = tuple[np.ndarray, np.ndarray]  # weight and bias, float32


@dataclass(frozen=True, slots=True)
class RecurrentBlock:
    attn_norm: Norm
    time: TimeMix
    mlp_norm: Norm
    channel: Channel

    @property
    def linears(self) -> list[Product]:
        return [*self.time.products.values(), *self.channel.products.values()]


class States:
    """The states of all slots, float32 [slots, state_size]: for each layer the last input of its time mix, S of its
    heads, and the last input of its channel mix."""

    def __init__(self, spec: DecoderSpec, memory: MemoryPlan):
        self.slots = StateSlots(memory)
        self.all = np.zeros((self.slots.count, spec.state_size), np.float32)  # untouched pages take no memory
        self.kept = np.empty(0, np.int32)

    def begin(self, batch: Batch, blocks: np.ndarray) -> int | None:
        """Bring the rows' states to where the step begins. The address of Batch.kept, None where nothing is kept."""
        if (moves := self.slots.begin(batch, blocks)) is not None:
            self.all[moves.targets] = np.where(moves.fresh[:, None], np.float32(0), self.all[moves.sources])
        sequence, position, slot = self.slots.snapshots(batch)
        if not len(slot):
            return None
        first = np.cumsum(batch.count) - batch.count
        self.kept = np.full(int(batch.count.sum()), -1, np.int32)
        self.kept[first[sequence] + position - batch.start[sequence] - 1] = slot
        return self.kept.ctypes.data


def check(spec: DecoderSpec) -> None:
    """Raise BackendUnavailable for a recurrence that the kernels cannot run."""
    for mixer in {layer.mixer for layer in spec.layers}:
        if not isinstance(mixer, Recurrence):
            raise BackendUnavailable("the native CPU kernels run recurrences in all layers or in none")
        if mixer.head_dim % 16 or mixer.head_dim > c.MAX_HEAD_DIM:
            raise BackendUnavailable(
                f"the native CPU kernels take heads of a multiple of 16 up to {c.MAX_HEAD_DIM}, not {mixer.head_dim}"
            )


def read_norm(weight: Tensor, bias: Tensor) -> Norm:
    return floats(weight), floats(bias)


def read_block(layer: Layer, tensors: Mapping[str, Tensor], packer: Packer, precision: Precision) -> RecurrentBlock:
    assert isinstance(layer.mixer, Recurrence) and isinstance(layer.mlp, ChannelMix)
    time, channel = (
        {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
        for at in ("time.", "channel.")
    )
    return RecurrentBlock(
        read_norm(tensors["attn_norm"], tensors["attn_norm.bias"]),
        _Reader(time, packer, precision).time_mix(layer.mixer),
        read_norm(tensors["mlp_norm"], tensors["mlp_norm.bias"]),
        _Reader(channel, packer, precision).channel(layer.mlp),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Parts of a mix from its tensors."""

    tensors: Mapping[str, Tensor]
    packer: Packer
    precision: Precision

    def time_mix(self, mixer: Recurrence) -> TimeMix:
        tensors, seventh = self.tensors, mixer.generation == 7
        gate = "g" * (mixer.gated and not seventh)
        shifted = SHIFTED[mixer.generation] if gate or seventh else "rkv"
        bonus = np.exp(floats(tensors["log_bonus"])) if mixer.log_bonus else floats(tensors["bonus"])
        vectors = {"bonus": _by_channel(bonus, mixer), "decay": _by_channel(floats(tensors["decay"]), mixer)}
        for name in ("norm", "norm.bias", "removal", "renewal", "mix_x"):
            if name in tensors:
                vectors[name] = floats(tensors[name])
        products = {part: self._large(part) for part in "rkv"}
        if gate:
            products["g"] = self._large("g", Epilogue.ACTIVATE)
        products["o"] = self._large("o", Epilogue.ADD)
        maps = {"decay": self._map("tanh", "decay")} if mixer.generation > 5 else {}
        if seventh:
            maps["rate"] = self._map(None, "rate", "sigmoid")
            maps["gate"] = self._map("sigmoid", "gate")
            if not mixer.first:
                maps["value"] = self._map(None, "value", "sigmoid")
        mixing: tuple[Product, ...] = ()
        if mixer.generation == 6:
            up = [self._small(np.ascontiguousarray(part.T)) for part in _array(tensors["mix_up"])]
            mixing = (self._small(tensors["mix_down"], "tanh"), *up)
        return TimeMix(mixer, vectors, shifted, self._shares(shifted), products, maps, mixing)

    def channel(self, mlp: ChannelMix) -> Channel:
        products = {"k": self._large("k", Epilogue.ACTIVATE, "squared_relu")}
        if mlp.gated:
            products["r"] = self._large("r", Epilogue.ACTIVATE, "sigmoid")
        products["v"] = self._large("v", Epilogue.STORE if mlp.gated else Epilogue.ADD)
        shifted = "kr" if mlp.gated else "k"
        return Channel(shifted, self._shares(shifted), products)

    def _shares(self, shifted: str) -> np.ndarray:
        return np.stack([floats(self.tensors[f"mix_{part}"]) for part in shifted])

    def _large(self, name: str, epilogue: Epilogue = Epilogue.STORE, activation: str = "silu") -> Product:
        tensor = self.tensors[name]
        matrix = self.packer.stack([tensor], self.precision.target(tensor))
        return Product(matrix, epilogue, activation, None, order_of(tensor))

    def _small(self, tensor: Tensor, activation: str | None = None, bias: Tensor | None = None) -> Product:
        array = _array(tensor)
        matrix = self.packer.stack([array], Format.BF16 if array.dtype == ml_dtypes.bfloat16 else Format.F32)
        padded = None if bias is None else np.pad(floats(bias).reshape(-1), (0, -matrix.n % c.PANEL))
        return Product(matrix, Epilogue.ACTIVATE if activation else Epilogue.STORE, activation or "silu", padded)

    def _map(self, between: str | None, name: str, behind: str | None = None) -> tuple[Product, Product]:
        up = self._small(self.tensors[f"{name}_up"], behind, self.tensors.get(name))
        return self._small(self.tensors[f"{name}_down"], between), up


class RecurrentProgram:
    """Lists the operations of a step of at most `tokens` tokens, and owns the activations between them."""

    def __init__(self, spec: DecoderSpec, tokens: int, states: States):
        self.spec, self.tokens, self.states = spec, tokens, states
        self.keep: list[np.ndarray] = []
        mixers, width = [layer.mixer for layer in spec.layers], spec.width
        inner = max(mixer.width for mixer in mixers)
        self.x, self.normed, self.mixed, self.y = (self._buffer(width) for _ in range(4))
        self.shifted, self.moved = self._buffer(6 * width), self._buffer(5 * width)
        self.parts = {name: self._buffer(inner) for name in ("r", "k", "v", "decay", "gate", "rate", "value", "first")}
        self.low = self._buffer(max(max(5 * m.mix_rank, m.decay_rank, m.rate_rank, m.value_rank, m.gate_rank, 1)
                                    for m in mixers))  # fmt: skip
        self.hidden = self._buffer(max(layer.mlp.hidden for layer in spec.layers))

    def _buffer(self, size: int) -> Rows:
        self.keep.append(np.zeros((self.tokens, size), np.float32))
        return Rows(self.keep[-1].ctypes.data, size)

    def build(
        self,
        embed: Matrix,
        embed_norm: Norm,
        blocks: list[RecurrentBlock],
        norm: Norm,
        head: Matrix,
        screen: Screen,
    ) -> Program:
        spec, x = self.spec, self.x
        ops: list[AnyOp] = [
            c.EmbedOp(embed, x.x, x.stride, spec.embedding_scale),
            self._layer_norm(embed_norm, x, x),
        ]
        at = 0
        for block in blocks:
            mixer = block.time.mixer
            inner = at + spec.width
            channel = inner + mixer.state_size
            ops += [self._layer_norm(block.attn_norm, x, self.normed), *self._time_mix(block.time, at, inner)]
            ops += [self._layer_norm(block.mlp_norm, x, self.normed), *self._channel_mix(block.channel, channel)]
            at = channel + spec.width
        cap = spec.logit_softcap or 0.0
        ops += [self._layer_norm(norm, x, x), screen.put(c.HeadOp(head, x.x, None, x.stride, 0.0, cap))]
        program = Program(ops)
        program.keep = [self, blocks, embed_norm, norm]
        return program

    def _time_mix(self, mix: TimeMix, at: int, heads: int) -> Iterator[AnyOp]:
        """at, heads: where the layer's last input and S lie in a state."""
        mixer, width, parts, vectors = mix.mixer, self.spec.width, self.parts, mix.vectors
        if mix.mixing:
            down, *up = mix.mixing
            yield self._shift(at, vectors["mix_x"], 1)
            yield down.op(self.shifted, self.low)
            for i, one in enumerate(up):
                yield one.op(_columns(self.low, i * mixer.mix_rank), _columns(self.moved, i * width))
        yield self._shift(at, mix.shares, len(mix.shifted), moved=bool(mix.mixing))
        taken = {part: _columns(self.shifted, i * width) for i, part in enumerate(mix.shifted)}
        first = mixer.generation == 7 and mixer.first
        for part in "rkv":
            yield mix.products[part].op(taken[part], parts["first" if first and part == "v" else part])
        if "g" in mix.products:
            yield mix.products["g"].op(taken["g"], parts["gate"])
        for name, (down, up) in mix.maps.items():
            source = {"decay": "w", "rate": "a", "gate": "g", "value": "v"}[name]
            yield down.op(taken[source], self.low)
            yield up.op(self.low, parts[name])
        nothing = Rows(None, 0)
        yield c.RecurOp(
            r=parts["r"],
            k=parts["k"],
            v=parts["first"] if first else parts["v"],
            decay=parts["decay"] if "decay" in mix.maps else Rows(address(vectors["decay"]), 0),
            gate=parts["gate"] if "g" in mix.products or "gate" in mix.maps else nothing,
            rate=parts["rate"] if "rate" in mix.maps else nothing,
            value=parts["value"] if "value" in mix.maps else nothing,
            first=parts["first"],
            removal=address(vectors.get("removal")),
            renewal=address(vectors.get("renewal")),
            bonus=address(vectors["bonus"]),
            norm=address(vectors["norm"]),
            bias=address(vectors["norm.bias"]),
            y=self.mixed.x,
            state=self._state(heads),
            y_stride=self.mixed.stride,
            state_stride=self._state_stride,
            heads=mixer.heads,
            dim=mixer.head_dim,
            delta=mixer.generation == 7,
            eps=mixer.eps,
        )
        yield mix.products["o"].op(self.mixed, self.x)
        yield self._remember(at)

    def _channel_mix(self, mix: Channel, at: int) -> Iterator[AnyOp]:
        products, width = mix.products, self.spec.width
        yield self._shift(at, mix.shares, len(mix.shifted))
        yield products["k"].op(self.shifted, self.hidden)
        if "r" in products:
            gate, y = self.mixed, self.y
            yield products["r"].op(_columns(self.shifted, width), gate)
            yield products["v"].op(self.hidden, y)
            yield c.GateAddOp(y.x, gate.x, self.x.x, y.stride, gate.stride, self.x.stride, width)
        else:
            yield products["v"].op(self.hidden, self.x)
        yield self._remember(at)

    def _layer_norm(self, norm: Norm, x: Rows, y: Rows) -> c.LayerNormOp:
        weight, bias = norm
        return c.LayerNormOp(
            x.x, address(weight), address(bias), y.x, x.stride, y.stride, self.spec.width, self.spec.eps
        )

    def _shift(self, at: int, shares: np.ndarray, parts: int, *, moved: bool = False) -> c.ShiftOp:
        x, y, more = self.normed, self.shifted, self.moved
        return c.ShiftOp(
            x.x, self._state(at), address(shares), more.x if moved else None, y.x, x.stride, self._state_stride,
            more.stride, y.stride, self.spec.width, parts,
        )  # fmt: skip

    def _remember(self, at: int) -> c.RememberOp:
        x = self.normed
        return c.RememberOp(x.x, self._state(at), x.stride, self._state_stride, self.spec.width)

    def _state(self, at: int) -> int:
        return self.states.all.ctypes.data + 4 * at

    @property
    def _state_stride(self) -> int:
        return self.states.all.shape[1]


def _columns(rows: Rows, first: int) -> Rows:
    return Rows(rows.x + 4 * first, rows.stride)


def _by_channel(vector: np.ndarray, mixer: Recurrence) -> np.ndarray:
    """One number a channel of what may be one a head."""
    if vector.size == mixer.width:
        return np.ascontiguousarray(vector).reshape(-1)
    return np.repeat(vector.reshape(-1), mixer.head_dim)


def _array(tensor: Tensor) -> np.ndarray:
    """What nobody quantises, as float32, or bfloat16 where the file has that."""
    plain = not isinstance(tensor, PackedTensor) and tensor.dtype == ml_dtypes.bfloat16
    return np.ascontiguousarray(tensor) if plain else floats(tensor)
