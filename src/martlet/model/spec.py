"""The network as data. One decoder serves every model:

    embed -> layers x (norm -> mixer, norm -> feed-forward) -> norm -> head

A family page (`martlet.model.families`) reads a config into a DecoderSpec and maps checkpoint names to ours; it holds
no maths. Runners read a DecoderSpec and know nothing of families.

Parameter names (see `martlet.model.weights.parameters`), N = layer number, all linears stored [out, in]:

    embed                      [vocab, width]
    layers.N.attn_norm         [width]
    layers.N.q|k|v             [heads * head_dim | kv_heads * head_dim, width]      (+ .bias)
    layers.N.q_norm|k_norm     [head_dim]                                           only with qk_norm
    layers.N.o                 [width, heads * head_dim]                            (+ .bias)
    layers.N.mlp_norm          [width]
    layers.N.gate|up           [hidden, width]                                      (+ .bias) gate only if gated
    layers.N.down              [width, hidden]                                      (+ .bias)
    norm                       [width]
    head                       [vocab, width]                                       absent when tied to embed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How inverse frequencies are stretched for long contexts. `llama3` is Llama 3.1's rule, `linear` divides all.

    Source of the llama3 rule: the Llama 3.1 reference code; fields carry the names of Hugging Face configs.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of the first `dim` elements of each head.

    `half`: element i pairs with i + dim / 2 (GPT-NeoX, Hugging Face). `interleaved`: 2i pairs with 2i + 1 (GPT-J).
    """

    base: float
    dim: int
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal grouped-query attention. window: a token sees itself and the window - 1 tokens before it (None: all)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(act(gate(x)) * up(x)) if gated, else down(act(up(x)))."""

    hidden: int
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    mixer: Attention
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole decoder. eps: of every RMSNorm. tied: the head is the embedding matrix."""

    family: str
    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    eps: float
    tied: bool
    max_positions: int

    @property
    def kv_elements_per_token(self) -> int:
        """Elements (keys and values) that one token keeps over all layers."""
        return sum(2 * layer.mixer.kv_size for layer in self.layers)
