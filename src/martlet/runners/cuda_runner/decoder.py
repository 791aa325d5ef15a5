"""The one decoder on a GPU: which kernels a step is, from token rows to logits.

Two ways through a layer. A step of one token reads weights and little else: six fused kernels a layer. A wider one is
cuBLAS for the products and light kernels between them; products of up to 64 rows with large matrices are ours where
that is faster (`few_rows`). With FP8 weights the first reads half the bytes, and the second multiplies FP8 by FP8, made
where the product's input is made.

Sums have a dtype of their own (`dtype_of_sums`), that of x: the residual stream, and what a product gives until it is
rounded to be multiplied again. Kernels go by the dtypes of their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from martlet.kernels.cuda import decode_attention, decode_hopper, few_rows, layers, prefill_attention, rotary
from martlet.kernels.cuda.fp8 import Fp8
from martlet.kernels.cuda.linear import Linear, linear, product
from martlet.kernels.cuda.lora import Groups
from martlet.model.rope import rotation_table
from martlet.model.spec import Attention, DecoderSpec, Layer, Rope
from martlet.runners.cuda_runner.adapters import Slots
from martlet.runners.cuda_runner.ranks import EMBED, MIXER, MLP, Ranks, Share
from martlet.runners.cuda_runner.weights import Block, Weights

NARROW = 1024  # from this width on, sums are kept as weights are


def dtype_of_sums(spec: DecoderSpec, dtype: torch.dtype) -> torch.dtype:
    """What the residual stream and products are kept in, where weights are in `dtype`: float32 in a narrow model.

    That takes two fifths off the error of bfloat16, most of it in the stream, which each layer rounds twice. It costs
    bytes, the more the wider the model; bench/results/h200.md has the figures.
    """
    return torch.float32 if spec.width < NARROW else dtype


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device. T tokens of B sequences: first those of one token, all among the first `decoding` tokens.

    rows, positions: int32 [T]. changes: int32 [2, T] for `layers.embed`, or None. tiles, sequences: of the others, as
    `prefill_attention` takes them. fresh: (first token, tokens, tokens with padding) of others that are whole long
    prompts and are attended one by one. picks: int32 [S], tokens whose hidden state is wanted; None for all.
    adapted: whether rows may have adapters.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    decoding: int
    changes: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    fresh: Sequence[tuple[int, int, int]] = ()
    picks: torch.Tensor | None = None
    adapted: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What a runner keeps on the device between steps.

    flat: int32, all that the host may change, one tensor so that one kernel writes any change; the next four are
    views of it. tokens [rows, max_model_len + 1]. blocks [rows, P], the block tables. settings [rows, SETTINGS].
    adapters [rows], the slot of each row's adapter, 0 for none.
    caches: [2, blocks, K, block_size, D] a layer; scales: float32 [2, blocks, K, block_size] a layer, or None where the
    cache needs none (`rotary.rotate_and_write`). room: where split attention leaves its parts.
    """

    flat: torch.Tensor
    tokens: torch.Tensor
    blocks: torch.Tensor
    settings: torch.Tensor
    adapters: torch.Tensor
    caches: list[torch.Tensor]
    scales: list[torch.Tensor] | list[None]
    room: decode_attention.Scratch


class Decoder:
    """A DecoderSpec with its weights on the GPU. Stateless but for them. slots: adapters, None where there are none.

    ranks: those that share the model, None where it is whole. What a rank makes of o and down is a share then, to be
    added up before anything but adapters is done with it.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        max_model_len: int,
        slots: Slots | None = None,
        ranks: Ranks | None = None,
    ):
        self.spec, self.weights, self.slots, self.ranks = spec, weights, slots, ranks
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.sums = dtype_of_sums(spec, self.dtype)
        self.queries = prefill_attention.queries_for(self.dtype)  # of a tile
        self.rotations = {
            rope: self._rotation(rope, max_model_len) for rope in {layer.mixer.rope for layer in spec.layers}
        }

    def _rotation(self, rope: Rope, length: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(rotation_table(rope, length), axis=1)).to(self.device)

    def forward(self, step: StepTensors, state: State) -> torch.Tensor:
        """Hidden states ready for the head, [S, W]."""
        x = self._embed(step, state)
        delta, groups = None, self._groups(step.rows, step, state)
        picks = step.picks
        for number, (layer, block) in enumerate(zip(self.spec.layers, self.weights.blocks, strict=True)):
            if len(x) == 1 and groups is None:
                self._narrow(x, layer, block, number, step, state)
                continue
            qkv = self._project(x, delta, block, number, step, groups)
            y = self._attend(qkv, layer.mixer, block, number, step, state)
            if number == len(self.spec.layers) - 1 and picks is not None:  # of others only keys and values are wanted
                if not len(picks):
                    return x[:0]
                x, y = x.index_select(0, picks), y.index_select(0, picks)
                groups = self._groups(step.rows.index_select(0, picks), step, state)
                picks = None
            delta = self._behind(x, y, layer, block, number, groups)
        return self._add_norm(x, delta, self.weights.norm, picks)

    def _embed(self, step: StepTensors, state: State) -> torch.Tensor:
        """Embeddings, [T, W]."""
        ranks, first, out = self.ranks, None, None
        if ranks is not None:
            first, out = self.spec.vocabulary.start, ranks.place(EMBED, len(step.rows), self.device)
        x = layers.embed(
            state.tokens, step.rows, step.positions, self.weights.embed, scale=self.spec.embedding_scale,
            changes=step.changes, state=state.flat, first=first, dtype=self.sums, out=out,
        )  # fmt: skip
        return x if ranks is None else ranks.total(x)

    def _groups(self, rows: torch.Tensor, step: StepTensors, state: State) -> Groups | None:
        """The tokens of `rows` by adapter; None where there is none."""
        if not step.adapted:
            return None
        assert self.slots is not None
        return self.slots.group(rows, state.adapters)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, W] -> float32 [S, V]."""
        if len(hidden) == 1:
            y = linear(hidden, self.weights.head, dtype=torch.float32)
        elif (parts := self._few_rows(hidden, self.weights.head)) is not None:
            y = parts[0] if len(parts) == 1 else parts.sum(0)
        else:
            y = product(hidden, self.weights.head, torch.float32)
        if self.ranks is not None:
            y = self.ranks.logits(y, self.spec)
        cap = self.spec.logit_softcap
        return y if cap is None else y.div_(cap).tanh_().mul_(cap)

    def _narrow(
        self,
        x: torch.Tensor,
        layer: Layer,
        block: Block,
        number: int,
        step: StepTensors,
        state: State,
    ) -> None:
        """A layer in place on x [1, W]."""
        eps, mlp = self.spec.eps, layer.mlp
        qkv = linear(x, block.qkv, gain=block.attn_norm, eps=eps)
        y = self._attend(qkv, layer.mixer, block, number, step, state)
        self._add(x, y, block.o, block.attn_post_norm, MIXER, ahead=block.up)
        hidden = linear(
            x, block.up, gain=block.mlp_norm, eps=eps, activation=mlp.activation, gated=mlp.gated,
            ahead=block.down.matrix,
        )  # fmt: skip
        blocks = self.weights.blocks
        following = blocks[number + 1].qkv if number + 1 < len(blocks) else self.weights.head
        self._add(x, hidden, block.down, block.mlp_post_norm, MLP, ahead=following)

    def _add(
        self, x: torch.Tensor, y: torch.Tensor, weight: Linear, post_norm: torch.Tensor | None, at: int, ahead: Linear
    ) -> None:
        """x [1, W] += the product of y, normed if there is a norm behind it. at: MIXER or MLP. ahead: what is next."""
        share = None if self.ranks is None else linear(y, weight, out=self.ranks.place(at, 1, self.device))
        if post_norm is not None:
            y = linear(y, weight, dtype=x.dtype) if share is None else self.ranks.total(share)
            x += layers.add_rms_norm(y, None, post_norm, self.spec.eps, dtype=x.dtype)
        elif share is not None:
            self.ranks.add(x, share)
        else:
            linear(y, weight, residual=x, out=x, ahead=ahead.matrix)

    def _project(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | Share | None,
        block: Block,
        number: int,
        step: StepTensors,
        groups: Groups | None,
    ) -> torch.Tensor:
        """x [T, W] += delta; queries, keys and values of its norm, [T or more, (H + 2 K) * D], or parts of them.

        x misses a layer's last product until the next norm adds it.
        """
        # Nothing overlaps what writes the block tables, so kernels behind this one may read them before they wait.
        y = self._add_norm(x, delta, block.attn_norm, fp8=block.qkv.fp8, overlap=number > 0)
        if not step.fresh and (parts := self._few_rows(y, block.qkv, number, "qkv", groups)) is not None:
            return parts
        rows = max((first + padded for first, _, padded in step.fresh), default=0)
        if rows <= len(x):
            return self._product(y, block.qkv, x.dtype, number, "qkv", groups)
        qkv = x.new_empty(rows, len(block.qkv.matrix))
        qkv[len(x) :] = 0
        self._product(y, block.qkv, x.dtype, number, "qkv", groups, out=qkv[: len(x)])
        return qkv

    def _behind(
        self, x: torch.Tensor, y: torch.Tensor, layer: Layer, block: Block, number: int, groups: Groups | None
    ) -> torch.Tensor | Share | None:
        """What follows attention, y [T, H * D]: x [T, W] gets all of the layer but what is returned."""
        mlp = layer.mlp
        delta = self._onto(x, y, block.o, block.attn_post_norm, number, "o", groups)
        y = self._add_norm(x, delta, block.mlp_norm, fp8=block.up.fp8)
        hidden = self._few_rows(y, block.up, number, "up", groups, gated=mlp.activation) if mlp.gated else None
        if hidden is None and groups is None:
            up = product(y, block.up, x.dtype)
            hidden = layers.activation(up, mlp.activation, mlp.gated, fp8=block.down.fp8, dtype=self.dtype)
        elif hidden is None:
            assert self.slots is not None and isinstance(y, torch.Tensor)
            hidden = self.slots.hidden(y, block.up, x.dtype, number, mlp, groups)
        return self._onto(x, hidden, block.down, block.mlp_post_norm, number, "down", groups)

    def _onto(
        self,
        x: torch.Tensor,
        y: torch.Tensor | Fp8,
        weight: Linear,
        post_norm: torch.Tensor | None,
        number: int,
        name: str,
        groups: Groups | None,
    ) -> torch.Tensor | Share | None:
        """x += the product of y, in the product itself where one dtype and no norm allow it; else what is to be added.

        With ranks the product is a share, in the place where they join it. [P, T, W] are parts, to be summed.
        """
        if self.ranks is not None:
            share = self.ranks.place(MIXER if name == "o" else MLP, len(x), self.device)
            self._product(y, weight, x.dtype, number, name, groups, out=share)
            if post_norm is None:
                return Share(share)
            return layers.add_rms_norm(self.ranks.total(share), None, post_norm, self.spec.eps, dtype=x.dtype)
        if post_norm is None and weight.bias is None and weight.matrix.dtype == x.dtype:
            assert isinstance(y, torch.Tensor)
            if (parts := self._few_rows(y, weight, number, name, groups)) is not None:
                return parts
            if groups is None:
                x.addmm_(y, weight.matrix.T)
            else:
                assert self.slots is not None
                self.slots.product(y, weight, x.dtype, number, name, groups, out=x, onto=True)
            return None
        delta = self._product(y, weight, x.dtype, number, name, groups)
        return delta if post_norm is None else layers.add_rms_norm(delta, None, post_norm, self.spec.eps, dtype=x.dtype)

    def _few_rows(
        self,
        x: torch.Tensor | Fp8,
        weight: Linear,
        number: int = 0,
        name: str = "",
        groups: Groups | None = None,
        gated: str | None = None,
    ) -> torch.Tensor | None:
        """The product of few rows where `few_rows` has it, as parts [P, T, N] or, with a gate's activation, [T, N].

        None where cuBLAS is to do it.
        """
        if self.ranks is not None or isinstance(x, Fp8):
            return None
        if groups is not None:
            assert self.slots is not None
            return self.slots.few_rows(x, weight, number, name, groups, gated)
        tile = few_rows.tile_for(x, weight, gated=gated is not None)
        if tile is None:
            return None
        return few_rows.product(x, weight.matrix, tile, gated=gated is not None, activation=gated or "")

    def _product(
        self,
        x: torch.Tensor | Fp8,
        weight: Linear,
        dtype: torch.dtype,
        number: int,
        name: str,
        groups: Groups | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`product`, with what adapters add to that linear of layer `number`."""
        if groups is None:
            return product(x, weight, dtype, out=out)
        assert self.slots is not None and isinstance(x, torch.Tensor)
        return self.slots.product(x, weight, dtype, number, name, groups, out)

    def _add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | Share | None,
        gain: torch.Tensor,
        picks: torch.Tensor | None = None,
        fp8: bool = False,
        overlap: bool = True,
    ) -> torch.Tensor | Fp8:
        """`layers.add_rms_norm`, where delta may be a share."""
        if isinstance(delta, Share):
            assert self.ranks is not None
            return self.ranks.add_rms_norm(x, delta.values, gain, self.spec.eps, picks, fp8)
        return layers.add_rms_norm(x, delta, gain, self.spec.eps, picks, fp8=fp8, overlap=overlap)

    def _attend(
        self, qkv: torch.Tensor, spec: Attention, block: Block, number: int, step: StepTensors, state: State
    ) -> torch.Tensor:
        """qkv [T or more, (H + 2 K) * D] or its parts -> [T, H * D]; keys and values go to the cache of the layer."""
        n, cache, scales = step.decoding, state.caches[number], state.scales[number]
        hopper = n > 0 and decode_hopper.able(n, spec, self.dtype, cache)
        if hopper:  # it rotates by itself, so it comes before the rotation, which does these rows again beside prompts
            out = qkv.new_empty(len(step.rows), spec.q_size, dtype=self.dtype)
            decode_hopper.attend(
                qkv[..., :n, :], block.qk_norms, self.spec.eps, self.rotations[spec.rope], step.rows[:n],
                step.positions[:n], state.blocks, cache, spec, scales, out=out[:n],
            )  # fmt: skip
            if step.tiles is None and not step.fresh:  # in a graph `decoding` may be all tokens, and others among them
                return out
        rotated = qkv
        if qkv.dtype != self.dtype:
            rotated = qkv.new_empty(qkv.shape[-2:], dtype=self.dtype)
            rotated[len(step.rows) :] = 0
        q = self._rotate(qkv, rotated, spec, block, number, step, state)
        if len(step.fresh) == 1 and not n and step.tiles is None:  # its output is the step's
            return _fresh(rotated, *step.fresh[0], spec)
        if not hopper:
            out = q.new_empty(len(q), spec.q_size)
            if n:
                decode_attention.decode_attention(
                    q[:n], cache, state.blocks, step.rows[:n], step.positions[:n], spec, state.room,
                    scales=scales, out=out[:n],
                )  # fmt: skip
        if step.tiles is not None:
            assert step.sequences is not None
            prefill_attention.prefill_attention(
                q, cache, state.blocks, step.tiles, step.sequences, spec, out, scales=scales
            )
        for first, count, padded in step.fresh:
            out[first : first + count] = _fresh(rotated, first, count, padded, spec)
        return out

    def _rotate(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        spec: Attention,
        block: Block,
        number: int,
        step: StepTensors,
        state: State,
    ) -> torch.Tensor:
        """Queries [T, H, D], rotated, in `out`; keys and values go there too and to the cache of layer `number`."""
        count = len(step.rows)
        return rotary.rotate_and_write(
            qkv if qkv.dim() == 3 else qkv[:count], block.qk_norms, self.spec.eps, self.rotations[spec.rope], step.rows,
            step.positions, state.blocks, state.caches[number], spec, state.scales[number],
            out=None if out is qkv else out[:count],
        )  # fmt: skip


def _fresh(qkv: torch.Tensor, first: int, count: int, padded: int, spec: Attention) -> torch.Tensor:
    return prefill_attention.fresh_attention(qkv[first : first + padded], count, spec)
