"""The network as data. One decoder serves every model:

    embed -> layers x (norm -> mixer [-> norm], norm -> feed-forward [-> norm]) -> norm -> head

A family page (`martlet.model.families`) reads a config into a DecoderSpec and maps checkpoint names to ours; it holds
no maths. Runners read a DecoderSpec and know nothing of families.

Parameter names (see `martlet.model.weights.parameters`), N = layer number, all linears stored [out, in]:

    embed                      [vocab, width]
    layers.N.attn_norm         [width]
    layers.N.q|k|v             [heads * head_dim | kv_heads * head_dim, width]      (+ .bias)
    layers.N.q_norm|k_norm     [head_dim]                                           only with qk_norm
    layers.N.o                 [width, heads * head_dim]                            (+ .bias)
    layers.N.attn_post_norm    [width]                                              only with post_norms
    layers.N.mlp_norm          [width]
    layers.N.gate|up           [hidden, width]                                      (+ .bias) gate only if gated
    layers.N.down              [width, hidden]                                      (+ .bias)
    layers.N.mlp_post_norm     [width]                                              only with post_norms

With experts, in place of gate, up and down, E = number of the expert:

    layers.N.router            [experts, width]
    layers.N.experts.E.gate|up [hidden, width]
    layers.N.experts.E.down    [width, hidden]
    layers.N.shared.gate|up    [shared, width]                                      only with a shared expert
    layers.N.shared.down       [width, shared]
    layers.N.shared_gate       [1, width]                                           only if shared_gated

Last:

    norm                       [width]
    head                       [vocab, width]                                       absent when tied to embed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from martlet.model.shard import Part


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How inverse frequencies are stretched for long contexts; what each kind does is in `martlet.model.rope`.

    linear: all divided by `factor`. llama3: Llama 3.1's rule. yarn: by how often a pair turns within the original
    length. factors: pair i divided by short[i], or by long[i] when the runner's longest sequence goes beyond the
    original length (LongRoPE, and the table in GGUF files of Llama 3.1). magnitude multiplies cos and sin.
    """

    kind: Literal["linear", "llama3", "yarn", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3; the fields carry the names of Hugging Face configs
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of the first `dim` elements of each head; dim 0: none.

    `half`: element i pairs with i + dim / 2 (GPT-NeoX, Hugging Face). `interleaved`: 2i pairs with 2i + 1 (GPT-J).
    """

    base: float
    dim: int
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal grouped-query attention. window: a token sees itself and the window - 1 tokens before it (None: all).

    softcap: scores s become softcap * tanh(s / softcap), before the mask (Gemma 2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    window: int | None = None
    softcap: float | None = None
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
class Experts:
    """A mixture: each token goes through the `active` of `count` feed-forwards that its router rates highest.

    Weights are the softmax over all experts' ratings; renormalise: over the chosen ones'. shared: hidden size of a
    feed-forward that every token takes as well (0: none); shared_gated: times sigmoid(shared_gate . x).
    """

    count: int
    active: int
    renormalise: bool
    shared: int = 0
    shared_gated: bool = False


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(act(gate(x)) * up(x)) if gated, else down(act(up(x))). With experts, hidden is the size of each of them."""

    hidden: int
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    gated: bool = True
    bias: bool = False
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """post_norms: what mixer and feed-forward give is normed before it is added (Gemma 2, GLM-4)."""

    mixer: Attention
    mlp: FeedForward
    post_norms: bool = False


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole decoder. eps: of every RMSNorm. tied: the head is the embedding matrix.

    embedding_scale multiplies embeddings where they enter; logit_softcap: logits x become softcap * tanh(x / softcap).
    part: what of a larger decoder this is, where several ranks share one (martlet.model.shard); vocab_size and width
    are the whole decoder's all the same.
    """

    family: str
    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    eps: float
    tied: bool
    max_positions: int
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    part: Part | None = None

    @property
    def vocabulary(self) -> slice:
        """Tokens whose rows of the embedding and the head are here."""
        return slice(0, self.vocab_size) if self.part is None else self.part.vocabulary

    @property
    def kv_elements_per_token(self) -> int:
        """Elements (keys and values) that one token keeps over all layers."""
        return sum(2 * layer.mixer.kv_size for layer in self.layers)
