"""The network as data. One decoder serves every model:

    embed -> layers x (norm -> mixer [-> norm], norm -> feed-forward [-> norm]) -> norm -> head

A family page (`martlet.model.families`) reads a config into a DecoderSpec and maps checkpoint names to ours; it holds
no maths. Runners read a DecoderSpec and know nothing of families.

Parameter names (see `martlet.model.weights.parameters`), N = layer number, all linears stored [out, in]; every norm has
a .bias where norms are LayerNorms:

    embed                      [vocab, width]
    embed_norm                 [width]                                              only with embed_norm
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

A recurrence, in place of q ... o, has R numbers in each of its low-rank maps; which generation has what is said there:

    layers.N.time.mix_r|k|v|g|w|a     [width]            share of the token before in what each linear takes
    layers.N.time.r|k|v|g|o           [width, width]
    layers.N.time.decay               [heads, 1 or head_dim], or [width] after generation 5
    layers.N.time.bonus               [heads, 1 or head_dim]                        log_bonus: its logarithm
    layers.N.time.norm                [width]            (+ .bias) of each head
    layers.N.time.decay_down|decay_up [R, width] | [width, R]                       likewise value, rate and gate
    layers.N.time.mix_x               [width]                                       only in generation 6, with
    layers.N.time.mix_down|mix_up     [5 * R, width] | [5, R, width]                the shares of w, k, v, r and g
    layers.N.time.value|rate          [width]                                       only in generation 7, with
    layers.N.time.removal|renewal     [width]                                       what is taken out and put in anew

and a channel mix, in place of gate, up and down:

    layers.N.channel.mix_k|mix_r      [width]
    layers.N.channel.k|r|v            [hidden, width] | [width, width] | [width, hidden]

Last:

    norm                       [width]
    head                       [vocab, width]                                       absent when tied to embed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from martlet.model.shard import Part

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Linears of a layer that may carry an adapter."""


class RopeScaling(NamedTuple):
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


class Rope(NamedTuple):
    """Rotary position embedding of the first `dim` elements of each head; dim 0: none.

    `half`: element i pairs with i + dim / 2 (GPT-NeoX, Hugging Face). `interleaved`: 2i pairs with 2i + 1 (GPT-J).
    """

    base: float
    dim: int
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


class Attention(NamedTuple):
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


class Recurrence(NamedTuple):
    """RWKV's time mix. A head keeps a state S [head_dim, head_dim] of all tokens so far, and reads it: y = r S.

    Generations 5 and 6: y = r (S + diag(u) k^T v), then S <- diag(w) S + k^T v, with u the bonus and w the decay. In 5
    the decay and the share that the token before has in r, k, v and g are weights; in 6 they depend on the token.
    7: S <- S diag(w) - (S q) (q * a)^T + v k^T, then y = S r + bonus: what lies under the direction q = k * removal
    (normalised) is taken out at the rate a before v is put in. Formulas: martlet.kernels.reference.recurrence.

    gated: the result is multiplied by a gate (not so in 5.0). scalar: decay and bonus are one number a head (5.0, 5.1).
    log_bonus: the checkpoint holds the bonus's logarithm (early files of 5.0). eps: of the norm of each head.
    *_rank: of the low-rank maps of generations 6 (mix, decay) and 7 (decay, rate, value, gate). first: in 7 the values
    of this layer are mixed into those of the later ones, and it has no map for that.
    """

    generation: Literal[5, 6, 7]
    heads: int
    head_dim: int
    gated: bool = True
    scalar: bool = False
    log_bonus: bool = False
    eps: float = 64e-5
    mix_rank: int = 0
    decay_rank: int = 0
    rate_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    first: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def state_size(self) -> int:
        """Numbers (float32) of S in every head."""
        return self.width * self.head_dim


Mixer = Attention | Recurrence


class Experts(NamedTuple):
    """A mixture: each token goes through the `active` of `count` feed-forwards that its router rates highest.

    Weights are the softmax over all experts' ratings; renormalise: over the chosen ones'. shared: hidden size of a
    feed-forward that every token takes as well (0: none); shared_gated: times sigmoid(shared_gate . x).
    """

    count: int
    active: int
    renormalise: bool
    shared: int = 0
    shared_gated: bool = False


class FeedForward(NamedTuple):
    """down(act(gate(x)) * up(x)) if gated, else down(act(up(x))). With experts, hidden is the size of each of them."""

    hidden: int
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    gated: bool = True
    bias: bool = False
    experts: Experts | None = None


class ChannelMix(NamedTuple):
    """RWKV's feed-forward: v(relu(k(x')) ** 2), times sigmoid(r(x'')) if gated; x' and x'' have a share of the token
    before, so a sequence keeps that token's input."""

    hidden: int
    gated: bool = True


class Layer(NamedTuple):
    """post_norms: what mixer and feed-forward give is normed before it is added (Gemma 2, GLM-4)."""

    mixer: Mixer
    mlp: FeedForward | ChannelMix
    post_norms: bool = False

    @property
    def recurrent(self) -> bool:
        return isinstance(self.mixer, Recurrence)


class DecoderSpec(NamedTuple):
    """A whole decoder. eps: of every norm; norms: what they are. tied: the head is the embedding matrix.

    embed_norm: embeddings are normed where they enter. Layers are all recurrent or none is: see `recurrent`.
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
    norms: Literal["rms", "layer"] = "rms"
    embed_norm: bool = False

    @property
    def vocabulary(self) -> slice:
        """Tokens whose rows of the embedding and the head are here."""
        return slice(0, self.vocab_size) if self.part is None else self.part.vocabulary

    @property
    def recurrent(self) -> bool:
        """Whether a sequence keeps a state of fixed size instead of keys and values of every token."""
        return any(layer.recurrent for layer in self.layers)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements (keys and values) that one token keeps over all layers."""
        return sum(2 * layer.mixer.kv_size for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def state_size(self) -> int:
        """Numbers (float32) that a sequence keeps over all layers, however long it is: S, and the last token's inputs
        of time mix and channel mix."""
        mixers = (layer.mixer for layer in self.layers)
        return sum(mixer.state_size + 2 * self.width for mixer in mixers if isinstance(mixer, Recurrence))
