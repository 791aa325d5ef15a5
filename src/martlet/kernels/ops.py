"""The operations a decoder is made of: their shapes and meaning. One implementation a device, chosen by `ops_for`.

Letters: N tokens in a step, B sequences, S rows that sample, V vocabulary, W width, H heads, K kv_heads, D head_dim.
Activations are contiguous, in the model's dtype unless a line says otherwise; what is summed is summed in float32.

The KV cache is one tensor a layer, [blocks, block_size, 2, K, D], keys before values: what one token keeps lies in one
piece, so writing a token and reading a block are one copy each. It must start out as zeros: places not yet
written are read, weighted by zero, and a NaN would survive that.

`Tensor` is the implementation's own array type (torch.Tensor here); this page imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from martlet.model.spec import Attention, FeedForward, Rope

Tensor = Any
Weight = Any  # a linear layer as the implementation likes to keep it
Experts = Sequence[Weight]
Plan = Any  # what an implementation computes once a step for all layers that share an Attention


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a step lie, in host memory: sequence after sequence, each in order of position.

    start, count: int64 [B]. blocks: int32 [B, P], the block tables, P blocks being enough for the longest sequence;
    entries past a sequence's end may hold anything. positions, slots: int64 [N]; a slot is block * block_size + offset.
    """

    start: np.ndarray
    count: np.ndarray
    blocks: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    block_size: int


Snapshots = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Where states of a step's sequences are to be kept: sequence numbers, positions (how many tokens the state has seen,
more than start and at most start + count), and slots of the state memory."""


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What an adapter adds to columns `column` ... of a linear's output: a [rank, in], b [columns, rank], scaled."""

    column: int
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows of a Sampling whose tokens are penalised for having occurred.

    rows: int64 [P], which of the S. tokens: int64 [P, T], prompt then output, padded with -1. prompt_len: int64 [P].
    Repetition divides positive logits and multiplies negative ones of every token seen; presence is subtracted once and
    frequency once per occurrence for tokens of the output. repetition, presence, frequency: float32 [P].
    """

    rows: np.ndarray
    tokens: np.ndarray
    prompt_len: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray


@dataclass(frozen=True, slots=True)
class Sampling:
    """How S rows choose their token, in host memory. The parts that are None concern no row.

    temperature: float32 [S], 0 is greedy. top_k: int64 [S], 0 for all. top_p, min_p: float32 [S]. seed: uint64 [S].
    position: int64 [S], index in its sequence of the token being sampled.
    bias: (rows, tokens, values) to add. banned: (rows, tokens) never to choose. allowed: (rows, tokens): a row named
    here chooses among its tokens only. All int64 but the float32 values. masks: (rows int64 [M], bits uint32 [M,
    ceil(V / 32)]): a row named here chooses among tokens t whose bit t % 32 of word t // 32 is set.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    penalties: Penalties | None = None
    bias: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    banned: tuple[np.ndarray, np.ndarray] | None = None
    allowed: tuple[np.ndarray, np.ndarray] | None = None
    masks: tuple[np.ndarray, np.ndarray] | None = None


class Ops(Protocol):
    """The table. Implementations are stateless: all state is in the tensors passed in."""

    def pack(self, matrix: Tensor, bias: Tensor | None = None) -> Weight:
        """A linear layer from its matrix [out, in] and bias [out]. The caller drops the matrix afterwards."""
        ...

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [N, in] -> x @ matrix.T + bias, [N, out]."""
        ...

    def lora(self, x: Tensor, y: Tensor, groups: Sequence[tuple[Tensor, Sequence[LoraPart]]]) -> None:
        """y[tokens, column ...] += (x[tokens] @ a.T) @ b.T for the parts of each (tokens int64 [n], parts) of groups.

        x [N, in] is what the linear took, y [N, out] what it gave. Tokens in no group are left alone.
        """
        ...

    def embedding(self, tokens: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        """tokens int64 [N], table [V, W] -> [N, W], times scale."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x ** 2) + eps) * weight over the last axis; x [N, W], weight [W]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); may overwrite `residual`. All [N, W]."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; x [N, W], weight and bias [W]."""
        ...

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(layer_norm(x + residual), x + residual); may overwrite `residual`. All [N, W]."""
        ...

    def rotation(self, rope: Rope, length: int, device: str) -> Tensor:
        """The table of a rotary embedding for positions 0 ... length - 1, to be passed to `plan`."""
        ...

    def plan(self, layout: Layout, attention: Attention, rotation: Tensor, dtype: Any) -> Plan:
        """All that the layers with this `attention` need to know about a step and that does not differ among them."""
        ...

    def rotate_and_write(self, qkv: Tensor, norms: Tensor | None, eps: float, cache: Tensor, plan: Plan) -> Tensor:
        """Normalise the heads of q and k if `norms`, rotate them, write k and v to the cache; may overwrite qkv.

        qkv [N, (H + 2 K) * D]; norms [H + K, D], one weight a head; cache as above. Returns q [N, H, D].
        """
        ...

    def paged_attention(self, q: Tensor, cache: Tensor, plan: Plan) -> Tensor:
        """Causal attention of q [N, H, D] over the cache, which holds this step's keys already -> [N, H * D].

        A token at position p sees positions max(0, p - window + 1) ... p of its own sequence. Scores are capped if the
        Attention says so.
        """
        ...

    def recurrence_plan(self, layout: Layout, rows: np.ndarray, snapshots: Snapshots, chunk: int, device: str) -> Plan:
        """All that recurrent layers need to know about a step. rows: int64 [B], the slots of the sequences' states.

        chunk: most tokens of a sequence that are computed together; 1 for step by step.
        """
        ...

    def token_shift(self, x: Tensor, states: Tensor, plan: Plan) -> Tensor:
        """The token before each, [N, W], of x [N, W]; the first of a sequence finds it in states, float32 [slots, W].

        Leaves each sequence's last token in its slot, and those that snapshots want in theirs.
        """
        ...

    def wkv(
        self, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, states: Tensor, plan: Plan
    ) -> Tensor:
        """y_t = r_t (S + diag(bonus) k_t^T v_t); S <- diag(exp(log_decay_t)) S + k_t^T v_t. All in float32.

        r, k, v [N, H, D] -> y [N, H, D]; log_decay [N, H, D] or [H, D]; bonus [H, D]; states [slots, H, D, D], rows for
        keys and columns for values, read and written as in token_shift.
        """
        ...

    def delta_rule(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        removed: Tensor,
        rate: Tensor,
        states: Tensor,
        plan: Plan,
    ) -> Tensor:
        """S <- S diag(exp(log_decay_t)) - (S q_t) (q_t * rate_t)^T + v_t k_t^T, q being `removed`; y_t = S r_t.

        Shapes as in wkv, all [N, H, D]; but states have rows for values and columns for keys.
        """
        ...

    def head_norm(self, y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: Any) -> Tensor:
        """Each head's LayerNorm: y float32 [N, H, D], weight and bias [H * D] -> [N, H * D] in `dtype`."""
        ...

    def activation(self, x: Tensor, mlp: FeedForward) -> Tensor:
        """Gated: x [N, 2 * hidden] is gate then up -> act(gate) * up [N, hidden]. Else act(x), x [N, hidden]."""
        ...

    def experts(self, x: Tensor, ratings: Tensor, up: Experts, down: Experts, mlp: FeedForward) -> Tensor:
        """A mixture of experts: x [N, W], ratings [N, E] -> [N, W].

        Each token's `active` experts are those rated highest; its result is the sum of theirs, down(activation(up(x))),
        times their weights (see martlet.model.spec.Experts). up, down: one Weight an expert.
        """
        ...

    def logits(self, x: Tensor, head: Weight, softcap: float | None = None) -> Tensor:
        """x [S, W] -> float32 [S, V], the caller's to change; softcap: see martlet.model.spec.DecoderSpec."""
        ...

    def sample(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """float32 [S, V] -> tokens int64 [S]; may overwrite logits.

        In this order: masks, allowed, bias, banned; penalties; temperature; min_p (tokens less likely than min_p times
        the likeliest go); top_k; top_p over what is left, renormalised; then the draw of martlet.kernels.philox. Tokens
        rank by logit, equal ones by lower id; top_k keeps the first k, top_p those before which less than top_p lies.
        """
        ...

    def logprobs(self, logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw log-softmax of logits [S, V] at tokens [S]: logprob [S], rank [S] (1 + how many are likelier), and the k
        likeliest in order: ids [S, k], logprobs [S, k]. Leaves logits alone."""
        ...

    def copy_blocks(self, cache: Tensor, source: Tensor, target: Tensor) -> None:
        """cache[target] = cache[source] over blocks, all reads before all writes; source, target int64 [C]."""
        ...
